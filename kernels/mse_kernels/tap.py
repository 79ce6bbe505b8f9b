"""Ending llama.cpp's passes early: `mse_tap` and `mse_stop_asked` of abi.h through ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from mse_kernels._cpu import library

__all__ = ["Stop", "Tap"]

_NAME = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
_SIZE = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)
_READ = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2)


class _Struct(ctypes.Structure):
    """mse_tap of abi.h."""

    _fields_ = (
        ("name", _NAME),
        ("size", _SIZE),
        ("read", _READ),
        ("wanted", ctypes.c_char_p),
        ("rows", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("taken", ctypes.c_int64),
        ("armed", ctypes.c_int32),
    )


class Tap:
    """A `ggml_backend_sched_eval_callback` that takes one tensor and ends the pass there.

    While it is armed, the float32 tensor called `wanted` is copied out, if it has at most `rows`
    rows of `width` values, and no node after it is computed; otherwise a pass runs as ever.
    `callback` and `user_data` are addresses, good for as long as this object lives.
    """

    def __init__(self, ggml: ctypes.CDLL, wanted: str, rows: int, width: int) -> None:
        """`ggml`: a library through which ggml's functions are found.

        Raises UnavailableError without the kernel library, AttributeError without a function.
        """
        self._rows = np.empty((rows, width), np.float32)
        self._struct = _Struct(
            name=_address(ggml.ggml_get_name, _NAME),
            size=_address(ggml.ggml_nbytes, _SIZE),
            read=_address(ggml.ggml_backend_tensor_get, _READ),
            wanted=wanted.encode(),
            rows=self._rows.ctypes.data,
            capacity=self._rows.nbytes,
        )
        self._library = library()
        self.callback = ctypes.cast(self._library.mse_tap_node, ctypes.c_void_p).value
        self.user_data = ctypes.addressof(self._struct)

    def arm(self) -> None:
        """For the next pass."""
        self._struct.taken, self._struct.armed = 0, 1

    def disarm(self) -> npt.NDArray[np.float32]:
        """The rows taken since `arm` [n, width], until the next; none where the pass ran through.

        Raises ValueError where the tensor was no whole number of rows.
        """
        self._struct.armed = 0
        n, rest = divmod(self._struct.taken, self._rows.strides[0])
        if rest:
            raise ValueError(f"the tensor had {self._struct.taken} bytes")
        return self._rows[:n]


class Stop:
    """A `ggml_abort_callback`, which ends a pass at the next node once it is `set`.

    `callback` and `user_data` are addresses, good for as long as this object lives.
    """

    def __init__(self) -> None:
        """Raises UnavailableError without the kernel library, AttributeError where it is older."""
        self._flag = ctypes.c_int32()
        self.callback = ctypes.cast(library().mse_stop_asked, ctypes.c_void_p)
        self.user_data = ctypes.c_void_p(ctypes.addressof(self._flag))

    def set(self) -> None:
        """By any thread."""
        self._flag.value = 1


def _address(function: Any, kind: Any) -> Any:
    return ctypes.cast(function, kind)
