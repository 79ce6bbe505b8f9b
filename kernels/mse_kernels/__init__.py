"""Fused adapter kernels without Triton: the whole adapter in one call, on CPU or CUDA.

    import mse_kernels
    mse_kernels.available()                      # {"cpu": None, "cuda": "no NVIDIA driver ..."}
    with mse_kernels.open("cpu", weights, threads=2) as adapter:
        pseudo = adapter(audio, audio_len, video, video_len, text, text_len)   # [B, P, D]

`weights` are the published parameters by name (published-model spec, section 1.5, without the
prefix `Model.`). Importing never fails and loads nothing: a backend that cannot run keeps its
reason, which `available` gives and `open` raises. `mse_kernels.reference` is the same computation
in plain NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mse_kernels.errors import InputError, KernelError, UnavailableError, WeightsError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mse_kernels.weights import Weights

__all__ = [
    "BACKENDS",
    "InputError",
    "Kernel",
    "KernelError",
    "UnavailableError",
    "WeightsError",
    "available",
    "open",
]

BACKENDS = ("cpu", "cuda")


class Kernel(Protocol):
    """An opened backend."""

    name: str
    isa: str
    n_pseudo: int
    n_embd: int

    def __call__(
        self, audio: Any, audio_len: Any, video: Any, video_len: Any, text: Any, text_len: Any
    ) -> npt.NDArray[np.float32]:
        """[B, T, d] float32 and lengths [B] of each input -> pseudo tokens [B, P, D] float32."""
        ...

    def close(self) -> None:
        """Free everything the backend holds."""
        ...


def available() -> dict[str, str | None]:
    """Backend -> None where it can run, else the reason why not."""
    from mse_kernels import _cpu, _cuda

    return {"cpu": _cpu.reason(), "cuda": _cuda.reason()}


def open(
    backend: str,
    weights: Mapping[str, npt.NDArray[Any]] | Weights,
    threads: int = 1,
    storage: str = "f32",
    isa: str | None = None,
) -> Kernel:
    """Pack `weights` for `backend` ("cpu" or "cuda").

    storage "f32", "f16" or "bf16": how weights are kept; arithmetic is float32. isa forces an
    instruction set of the CPU library ("amx", "avx512", "avx2", "neon", "scalar"; also the
    environment variable MSE_KERNELS_ISA). Raises UnavailableError with the reason, or
    WeightsError.
    """
    from mse_kernels.weights import Weights

    checked = Weights.of(weights)
    if backend == "cpu":
        from mse_kernels._cpu import CpuAdapter

        return CpuAdapter(checked, threads, storage, isa)
    if backend == "cuda":
        from mse_kernels._cuda import CudaAdapter

        return CudaAdapter(checked, storage)
    raise UnavailableError(f"backend {backend!r} is unknown; choose one of {BACKENDS}")
