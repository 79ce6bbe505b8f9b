"""The library whose functions stand in for llama.cpp's (`src/ggml_mapped.cpp`), and its kernels.

    ggml.preload()              # before llama.cpp is loaded: later its names are bound already
    ...
    mapped.settle(folder)       # afterwards: compared with llama.cpp's own on samples

Linux on x86-64 only: elsewhere nothing is loaded and llama.cpp runs its own.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mse_kernels

__all__ = ["KERNELS", "flags", "kernels", "preload"]

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
KERNELS = {
    "amx": (4, (*_AVX512, "amx_tile", "amx_int8")),
    "avx512_vnni": (3, _AVX512),
    "avx_vnni": (2, (*_AVX2, "avx_vnni")),
    "avx2": (1, _AVX2),
}
"""Name -> number in the library, and what the processor must have; best first."""


@cache
def preload() -> Any:
    """The library, its symbols global; None where there is none that runs here."""
    if sys.platform != "linux":
        return None
    # An editable install has two folders on the path: the sources' and the built library's.
    for folder in mse_kernels.__path__:
        path = Path(folder) / "libmse_ggml.so"
        if not path.is_file():
            continue
        try:
            if not _runnable(ctypes.CDLL(str(path))):
                return None
            lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except (OSError, AttributeError):
            return None
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        lib.mse_mapped_use.argtypes = [pointer, pointer, number, number]
        lib.mse_attention_use.argtypes = [pointer, number]
        lib.mse_mapped_use.restype = lib.mse_attention_use.restype = None
        lib.mse_opening_use.argtypes = lib.mse_opening_header.argtypes = [pointer]
        lib.mse_opening_use.restype = lib.mse_opening_header.restype = None
        for count in ("mapped_calls", "attention_calls", "opening_headers", "opening_bytes"):
            getattr(lib, f"mse_{count}").restype = ctypes.c_uint64
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
        if set(needs) <= here and lib.mse_mapped_has(number)
    )
    # Without VNNI llama.cpp's own has twice the width of ours: not measured as the file has them.
    return () if "avx512bw" in here and "avx512_vnni" not in names else names


def flags() -> frozenset[str]:
    """What the processor has, in the kernel's words."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = text.splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
