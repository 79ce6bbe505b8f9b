"""The adapter: voice, face and text in, pseudo tokens out, by one of several backends."""

from typing import get_args

from mse_runtime.adapter.auto import open_best
from mse_runtime.adapter.backends import (
    Adapter,
    AdapterInputError,
    Backend,
    KernelAdapter,
    NumpyAdapter,
    OnnxAdapter,
    Provider,
    check_inputs,
    kernel_reasons,
    open_backend,
)
from mse_runtime.adapter.spare import WithSpare
from mse_runtime.bundle import Bundle
from mse_runtime.errors import UsageError

__all__ = [
    "Adapter",
    "AdapterInputError",
    "Backend",
    "KernelAdapter",
    "NumpyAdapter",
    "OnnxAdapter",
    "Provider",
    "check_inputs",
    "kernel_reasons",
    "open_adapter",
    "open_backend",
]


def open_adapter(
    bundle: Bundle, backend: str = "auto", threads: int = 1, provider: Provider = "cpu"
) -> Adapter:
    """Open the bundle's adapter.

    `provider` "cuda" asks for the GPU (ONNX Runtime's CUDA provider or `kernels-cuda`); it is never
    replaced by the CPU in silence. Raises `DeviceError` for a backend or device that cannot be
    used, `BundleError` for files that are not this bundle's adapter. A GPU that fails later, in the
    middle of the work, is replaced by the CPU with a warning (`spare`).
    """
    if backend not in get_args(Backend):
        raise UsageError(
            f"There is no adapter backend {backend!r}. The backends are: "
            f"{', '.join(get_args(Backend))}."
        )
    if threads < 1:
        raise UsageError(f"The adapter needs at least 1 thread, not {threads}.")
    if backend == "auto":
        opened = open_best(bundle, threads, provider)
    else:
        opened = open_backend(bundle, backend, threads, provider)
    if opened.name.endswith("cuda"):
        return WithSpare(opened, lambda: open_best(bundle, threads, "cpu"))
    return opened
