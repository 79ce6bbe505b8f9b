"""llama.cpp's own graph with a rotary table rounded to bf16, as the published runs had it.

No GGUF says so, but ggml's scheduler can be asked to show each tensor once it is computed and to
take back a changed one: every rotation is undone there and done again with the rounded table. The
runtime is used as it is; only the defaults that it asks llama.cpp for carry the callback.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RopeRounding", "rounded_rope", "turned"]

INTERLEAVED, HALF_SPLIT = 0, 2  # GGML_ROPE_TYPE_NORMAL, _NEOX
F32, I32 = 0, 26  # ggml_type


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


def bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def turned(
    x: NDArray[np.float32],
    cos: NDArray[np.floating[Any]],
    sin: NDArray[np.floating[Any]],
    mode: int,
) -> NDArray[np.float32]:
    """x [L, heads, n] with each pair of columns turned by the angles of cos, sin [L, n / 2]."""
    half = x.shape[-1] // 2
    first = slice(0, None, 2) if mode == INTERLEAVED else slice(0, half)
    second = slice(1, None, 2) if mode == INTERLEAVED else slice(half, None)
    a, b = x[..., first].astype(np.float64), x[..., second].astype(np.float64)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    result = np.empty_like(x)
    result[..., first] = a * cos - b * sin
    result[..., second] = b * cos + a * sin
    return result


class RopeRounding:
    """The callback, and what it has seen: names of the tensors it has turned anew."""

    def __init__(self, lib: Any) -> None:
        self.seen: list[str] = []
        self.largest = 0.0
        """Largest change of a value."""
        self.error: BaseException | None = None
        self._ggml = lib._lib  # libllama, which is linked against ggml
        self._ggml.ggml_op_name.argtypes = [ctypes.c_int]
        self._ggml.ggml_op_name.restype = ctypes.c_char_p
        access = [ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
            getattr(self._ggml, name).argtypes = access
            getattr(self._ggml, name).restype = None
        self.callback = lib.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _user: Any) -> bool:
        try:
            tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
            wanted = self._ggml.ggml_op_name(tensor.op) == b"ROPE"
            if wanted and not ask:
                self._turn_anew(tensor)
        except BaseException as error:  # an exception cannot pass through C
            self.error = error
            return False
        return wanted if ask else True

    def _turn_anew(self, tensor: Tensor) -> None:
        positions = self._read(tensor.src[1].contents, I32, np.int32)[0, 0, 0]
        values = self._read(tensor, F32, np.float32)[0]  # [L, heads, head]
        _, n_dims, mode, _, _ = tensor.op_params[:5]
        base, scale, extension, attention = np.array(tensor.op_params[5:9], np.int32).view(
            np.float32
        )
        assert (scale, extension, attention) == (1, 0, 1), "a scaled rotation"
        assert not tensor.src[2], "frequencies with factors"
        assert mode in (INTERLEAVED, HALF_SPLIT)
        assert n_dims == values.shape[-1], "a partial rotation"
        exponents = np.arange(0, n_dims, 2, dtype=np.float32) / np.float32(n_dims)
        angles = positions.astype(np.float32)[:, None] * (np.float32(1) / base**exponents)
        cos, sin = np.cos(angles), np.sin(angles)
        plain = turned(values, cos, -sin, mode)
        result = turned(plain, bf16(cos), bf16(sin), mode)
        self.largest = max(self.largest, float(np.abs(result - values).max()))
        self._ggml.ggml_backend_tensor_set(
            ctypes.byref(tensor), result.ctypes.data, 0, result.nbytes
        )
        self.seen.append(tensor.name.decode())

    def _read(self, tensor: Tensor, kind: int, dtype: type[Any]) -> NDArray[Any]:
        """A contiguous tensor's values, slowest dimension first."""
        assert tensor.type == kind
        values = np.empty(tuple(tensor.ne)[::-1], dtype)
        strides = zip(values.shape, tuple(tensor.nb)[::-1], values.strides, strict=True)
        assert all(size == 1 or given == dense for size, given, dense in strides), "a view"
        self._ggml.ggml_backend_tensor_get(
            ctypes.byref(tensor), values.ctypes.data, 0, values.nbytes
        )
        return values


@contextmanager
def rounded_rope() -> Iterator[RopeRounding]:
    """Backbones opened inside have the rounded table; they must be closed inside, too."""
    from mse_runtime.backbone import library

    lib = library.load()
    rounding = RopeRounding(lib)
    defaults = lib.llama_context_default_params

    def with_callback() -> Any:
        params = defaults()
        params.cb_eval = rounding.callback
        return params

    lib.llama_context_default_params = with_callback
    try:
        yield rounding
    finally:
        lib.llama_context_default_params = defaults
    if rounding.error is not None:
        raise rounding.error
