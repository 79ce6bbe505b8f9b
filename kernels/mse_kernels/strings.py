"""Skipping the strings of a GGUF header: `src/strings.cpp` through ctypes."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np

from mse_kernels._cpu import library

__all__ = ["skip_strings"]


@cache
def _function() -> Any:
    function = library().mse_skip_strings
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
    return function


def skip_strings(data: bytes | mmap.mmap, at: int, count: int) -> int | None:
    """Where `count` strings end that begin at byte `at` of `data`; None where it ends inside one.

    Each is its length in eight bytes, little-endian, and as many bytes (GGUF). Raises
    UnavailableError without the kernel library, AttributeError where it is older.
    """
    skip = _function()
    view = np.frombuffer(data, np.uint8)
    if not 0 <= at <= len(view) or not 0 <= count < 1 << 62:
        return None
    end = int(skip(view.ctypes.data, at, len(view), count))
    return None if end < 0 else end
