"""The strings of a GGUF header, skipped and searched: `src/strings.cpp` through ctypes."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_kernels._cpu import library

__all__ = ["find_strings", "skip_strings"]


@cache
def _functions() -> tuple[Any, Any]:
    skip, find = library().mse_skip_strings, library().mse_find_strings
    skip.restype = find.restype = ctypes.c_int64
    skip.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
    find.argtypes = [
        *skip.argtypes, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32,
        ctypes.c_void_p, ctypes.c_int64,
    ]  # fmt: skip
    return skip, find


def skip_strings(data: bytes | mmap.mmap, at: int, count: int) -> int | None:
    """Where `count` strings end that begin at byte `at` of `data`; None where it ends inside one.

    Each is its length in eight bytes, little-endian, and as many bytes (GGUF). Raises
    UnavailableError without the kernel library, AttributeError where it is older.
    """
    skip, _ = _functions()
    view = np.frombuffer(data, np.uint8)
    if not 0 <= at <= len(view) or not 0 <= count < 1 << 62:
        return None
    end = int(skip(view.ctypes.data, at, len(view), count))
    return None if end < 0 else end


def find_strings(
    data: bytes | mmap.mmap,
    at: int,
    count: int,
    text: bytes,
    *,
    always: NDArray[np.bool_] | None = None,
    pairs: bool = False,
) -> list[tuple[int, bytes]] | None:
    """(number, string) of those of `count` strings that occur in `text`, or have `always` set.

    The strings begin at byte `at`, as in `skip_strings`. With `pairs` each is two strings with a
    space between (a merge), which must occur one after the other. None where they end inside one.
    Raises UnavailableError without the kernel library, AttributeError where it is older.
    """
    _, find = _functions()
    view = np.frombuffer(data, np.uint8)
    if not 0 <= at <= len(view) or not 0 <= count <= len(view):
        return None
    if always is not None and len(always) != count:
        raise ValueError(f"{len(always)} flags for {count} strings")
    flags = None if always is None else np.ascontiguousarray(always, np.uint8)
    room = 4096
    while True:
        found = np.empty((room, 3), np.int64)
        n = find(
            view.ctypes.data, at, len(view), count, text, len(text),
            None if flags is None else flags.ctypes.data, pairs, found.ctypes.data, room,
        )  # fmt: skip
        if n >= 0:
            return [(i, data[start : start + size]) for i, start, size in found[:n].tolist()]
        if n == -1:
            return None
        room *= 4
