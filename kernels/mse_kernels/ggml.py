"""llama.cpp's product of repacked Q4_0 weights in our version (`src/ggml_q4_0.h`).

    ggml.preload()              # before llama.cpp is loaded: later its names are bound already
    ...
    ggml.settle(folder)         # afterwards: compared with llama.cpp's own on a sample

Linux on x86-64 only: elsewhere nothing is loaded and llama.cpp runs its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import mse_kernels
from mse_kernels.samples import between, whole

__all__ = [
    "AVX512", "KERNELS", "SYMBOL", "calls", "flags", "kernels", "preload", "product", "settle",
    "theirs", "use",
]  # fmt: skip

SYMBOL = "ggml_gemm_q4_0_8x8_q8_0"
_AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
KERNELS = {
    "avx512_vnni": (3, AVX512),
    "avx_vnni": (2, (*_AVX2, "avx_vnni")),
    "avx2": (1, _AVX2),
}
"""Name -> number in the library, and what the processor must have; best first."""
SIGNATURE = (
    *(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
)
"""Result and arguments of the function, for `ctypes.CFUNCTYPE`."""
_GEMM = ctypes.CFUNCTYPE(*SIGNATURE)
WEIGHTS = np.dtype([("scale", "<f2", 8), ("values", "u1", 128)])
ACTIVATIONS = np.dtype([("scale", "<f2", 4), ("values", "i1", 128)])


@cache
def preload() -> Any:
    """The library, its symbols global and its best kernel chosen; None where there is none."""
    if sys.platform != "linux":
        return None
    # An editable install has two folders on the path: the sources' and the built library's.
    for folder in mse_kernels.__path__:
        path = Path(folder) / "libmse_ggml.so"
        if not path.is_file():
            continue
        try:
            found = _runnable(ctypes.CDLL(str(path)))
            if not found:
                return None
            lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except (OSError, AttributeError):
            return None
        lib.mse_ggml_use.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        lib.mse_ggml_use.restype = None
        lib.mse_ggml_calls.argtypes, lib.mse_ggml_calls.restype = [], ctypes.c_uint64
        lib.mse_ggml_use(None, KERNELS[found[0]][0])
        return lib
    return None


def kernels() -> tuple[str, ...]:
    """The kernels of the library that this processor runs, best first."""
    lib = preload()
    return () if lib is None else _runnable(lib)


def _runnable(lib: ctypes.CDLL) -> tuple[str, ...]:
    here = flags()
    names = tuple(
        name
        for name, (number, needs) in KERNELS.items()
        if set(needs) <= here and lib.mse_ggml_has(number)
    )
    # Without VNNI llama.cpp's own has twice the width of ours (bench/product.py).
    return () if "avx512bw" in here and "avx512_vnni" not in names else names


def flags() -> frozenset[str]:
    """What the processor has, in the kernel's words."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = text.splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def theirs(folder: Path, *, load: bool = False) -> Any:
    """llama.cpp's own function in the library it has loaded from `folder`; None without one.

    load: also from one that it has not loaded yet.
    """
    for path in sorted(folder.glob("libggml-cpu*.so*")):
        try:
            lib = ctypes.CDLL(str(path), mode=os.RTLD_LAZY | (0 if load else os.RTLD_NOLOAD))
            return _GEMM((SYMBOL, lib))
        except (OSError, AttributeError):
            continue
    return None


def settle(folder: Path) -> str | None:
    """The name of the kernel that stands in from now on: ours and theirs agree on a sample."""
    lib, other, names = preload(), theirs(folder, load=True), kernels()
    if lib is None or other is None:
        return None
    # 68 rows and 20: every path of every kernel.
    weights, activations = np.zeros((3, 19), WEIGHTS), np.zeros((17, 19), ACTIVATIONS)
    weights["scale"] = between(weights["scale"].shape, -0.02, 0.02, 0)
    weights["values"] = whole(weights["values"].shape, 0, 256, 1)
    activations["scale"] = between(activations["scale"].shape, 0, 0.02, 2)
    activations["values"] = whole(activations["values"].shape, -127, 128, 3)
    use(names[0], folder)
    samples = activations, activations[:5]
    found, expected = (
        np.concatenate([product(function, weights, rows) for rows in samples])
        for function in (_GEMM((SYMBOL, lib)), other)
    )
    first = _address(getattr(ctypes.CDLL(None), SYMBOL))  # another's may have been there before
    agree = np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    if agree and first == _address(getattr(lib, SYMBOL)):
        return names[0]
    use(None, folder)
    return None


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def product(gemm: Any, weights: Any, activations: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Repacked weights [N / 8, K / 32] and rows [M / 4, K / 32] -> float32 [M, N]."""
    (columns, blocks), rows = weights.shape, len(activations)
    out = np.full((4 * rows, 8 * columns), np.nan, np.float32)
    gemm(
        32 * blocks, out.ctypes.data, 8 * columns, weights.ctypes.data, activations.ctypes.data,
        4 * rows, 8 * columns,
    )  # fmt: skip
    return out


def use(kernel: str | None, folder: Path) -> None:
    """What stands behind the name in this process from now on; None: llama.cpp's own."""
    lib, other = preload(), theirs(folder)
    if lib is not None and other is not None:
        number = KERNELS[kernel][0] if kernel else 0
        lib.mse_ggml_use(ctypes.cast(other, ctypes.c_void_p), number)


def calls() -> int:
    """How often ours has been called by name in this process."""
    lib = preload()
    return 0 if lib is None else int(lib.mse_ggml_calls())
