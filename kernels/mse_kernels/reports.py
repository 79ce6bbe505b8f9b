"""What llama.cpp reports while it loads, taken in without Python: `src/reports.cpp` through ctypes.

The loader tells of every tensor several times. Each time it would wait for Python's lock, which a
thread that reads a clip meanwhile holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from mse_kernels._cpu import library

__all__ = ["Log", "Progress"]

_LENGTH = 4097  # of the longest line, its end included


class Log:
    """A `ggml_log_callback` that keeps the latest lines but debug lines; one for the process."""

    def __init__(self) -> None:
        """Raises UnavailableError without the kernel library, AttributeError where it is older."""
        self._take = library().mse_log_take
        self._take.restype = ctypes.c_bool
        self._take.argtypes = [ctypes.POINTER(ctypes.c_int32), ctypes.c_char_p, ctypes.c_int64]
        self._level, self._text = ctypes.c_int32(), ctypes.create_string_buffer(_LENGTH)
        self.callback = ctypes.cast(library().mse_log_line, ctypes.c_void_p)

    def take(self) -> Iterator[tuple[int, bytes]]:
        """(level, text) of the lines since the last call, oldest first; they are gone then.

        One thread at a time.
        """
        while self._take(self._level, self._text, _LENGTH):
            yield self._level.value, self._text.value


class _Progress(ctypes.Structure):
    """mse_progress of abi.h."""

    _fields_ = (("report", ctypes.c_void_p), ("step", ctypes.c_float), ("last", ctypes.c_float))


class Progress:
    """A `llama_progress_callback` that calls another at the beginning, each `step`, and at the end.

    `callback` and `user_data` are addresses, good for as long as this object lives.
    """

    def __init__(self, report: Any, step: float) -> None:
        """`report`: a ctypes callback; `step`: a fraction of the whole, up to 1.

        Raises UnavailableError without the kernel library, AttributeError where it is older.
        """
        address = ctypes.cast(report, ctypes.c_void_p)
        self._report, self._struct = report, _Progress(address, step, -2.0)
        self.callback = ctypes.cast(library().mse_progress_step, ctypes.c_void_p)
        self.user_data = ctypes.c_void_p(ctypes.addressof(self._struct))
