"""llama.cpp's product of repacked Q4_0 weights in our version (`src/ggml_q4_0.cpp`).

    ggml.preload()              # before llama.cpp is loaded: later its names are bound already
    ...
    ggml.settle(folder)         # afterwards: compared with llama.cpp's own on a sample

Linux on x86-64 with AVX-512 VNNI only: elsewhere nothing is loaded and llama.cpp runs its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import mse_kernels

__all__ = ["SYMBOL", "calls", "preload", "product", "settle", "theirs", "use"]

SYMBOL = "ggml_gemm_q4_0_8x8_q8_0"
_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "f16c")
_SIGNATURE = (
    *(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
)
_GEMM = ctypes.CFUNCTYPE(*_SIGNATURE)
WEIGHTS = np.dtype([("scale", "<f2", 8), ("values", "u1", 128)])
ACTIVATIONS = np.dtype([("scale", "<f2", 4), ("values", "i1", 128)])


@cache
def preload() -> Any:
    """The library, its symbols global; None where this machine or build has none."""
    if sys.platform != "linux" or not _suits():
        return None
    # An editable install has two folders on the path: the sources' and the built library's.
    for folder in mse_kernels.__path__:
        path = Path(folder) / "libmse_ggml.so"
        if path.is_file():
            try:
                lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                return None
            lib.mse_ggml_use.argtypes = [ctypes.c_void_p, ctypes.c_bool]
            lib.mse_ggml_use.restype = None
            lib.mse_ggml_calls.argtypes, lib.mse_ggml_calls.restype = [], ctypes.c_uint64
            return lib
    return None


def _suits() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return set(_FLAGS) <= set(flags)


def theirs(folder: Path) -> Any:
    """llama.cpp's own function in the library it has loaded from `folder`; None without one."""
    for path in sorted(folder.glob("libggml-cpu*.so*")):
        try:
            lib = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return _GEMM((SYMBOL, lib))
        except (OSError, AttributeError):
            continue
    return None


def settle(folder: Path) -> bool:
    """Whether ours stands in from now on: both are there and agree on a sample."""
    lib, other = preload(), theirs(folder)
    if lib is None or other is None:
        return False
    own = _GEMM(("mse_ggml_gemm_q4_0", lib))
    rng = np.random.default_rng(0)
    weights, activations = np.zeros((3, 3), WEIGHTS), np.zeros((3, 3), ACTIVATIONS)
    weights["scale"] = rng.uniform(-0.02, 0.02, weights["scale"].shape)
    weights["values"] = rng.integers(0, 256, weights["values"].shape)
    activations["scale"] = rng.uniform(0, 0.02, activations["scale"].shape)
    activations["values"] = rng.integers(-127, 128, activations["values"].shape)
    found, expected = (product(f, weights, activations) for f in (own, other))
    agree = bool(np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max())
    use(agree, folder)
    return agree


def product(
    gemm: Callable[..., None], weights: np.ndarray, activations: np.ndarray
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Repacked weights [N / 8, K / 32] and rows [M / 4, K / 32] -> float32 [M, N]."""
    (columns, blocks), rows = weights.shape, len(activations)
    out = np.full((4 * rows, 8 * columns), np.nan, np.float32)
    gemm(
        32 * blocks, out.ctypes.data, 8 * columns, weights.ctypes.data, activations.ctypes.data,
        4 * rows, 8 * columns,
    )  # fmt: skip
    return out


def use(own: bool, folder: Path) -> None:
    """Let ours or llama.cpp's stand behind the name, in this process, from the next product on."""
    lib, other = preload(), theirs(folder)
    if lib is not None and other is not None:
        lib.mse_ggml_use(ctypes.cast(other, ctypes.c_void_p), own)


def calls() -> int:
    """How often ours has been called by name in this process."""
    lib = preload()
    return 0 if lib is None else int(lib.mse_ggml_calls())
