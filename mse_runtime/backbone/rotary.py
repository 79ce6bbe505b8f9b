"""llama.cpp's own graph with a rotary table rounded to bf16, as published runs had it.

transformers 4.36 makes the tables of Llama and Qwen 2 while the model is loaded, in the default
type of the load: eight bits for each cosine and sine where that was bf16. No GGUF can say so. But
ggml's scheduler shows each tensor that is asked for once it is computed, and takes back a changed
one: there every rotation is turned on to where the rounded table would have brought it.

ggml has no C function that tells what a tensor is, so its struct is read. A build that lays it out
differently is found by `_check_layout` before any model runs.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import BackboneError

__all__ = ["TABLES", "RopeTable", "Rounding"]

RopeTable = Literal["exact", "bf16"]
TABLES: tuple[RopeTable, ...] = ("exact", "bf16")

INTERLEAVED, HALF_SPLIT = 0, 2  # GGML_ROPE_TYPE_NORMAL, _NEOX
F32, I32 = 0, 26  # ggml_type
_FLOATS = slice(5, 9)  # of op_params: base, scale, extension, attention
_OFFSET = 15

Floats = NDArray[np.float32]


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


class _Rotation(NamedTuple):
    """What one operation rotates by: equal ones share their table."""

    positions: bytes
    """int32 [L]."""
    n_dims: int
    """Leading columns of a head that are rotated."""
    base: float
    factors: bytes
    """float32 [n_dims / 2], divisors of the frequencies; empty where there are none."""


class Rounding:
    """The callback of one context. Keep it for as long as the context lives."""

    def __init__(self, lib: Any) -> None:
        """Raises BackboneError where this build of llama.cpp does not allow it."""
        self._ggml = lib._lib  # libllama, which is linked against ggml
        self._rope = _check_layout(self._ggml)
        access = [ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        for name in ("ggml_backend_tensor_get", "ggml_backend_tensor_set"):
            _function(self._ggml, name, None, *access)
        self._error: BaseException | None = None
        self._count = 0
        self._known: tuple[_Rotation, tuple[Floats, Floats]] | None = None
        self.callback = lib.ggml_backend_sched_eval_callback(self._call)

    def finish(self, decoded: bool) -> None:
        """To be called after each `llama_decode`: raises what could not pass through C.

        decoded: whether llama.cpp was content. Raises BackboneError, too, where nothing was
        rotated, so that the answer would be the exact table's.
        """
        error, count = self._error, self._count
        self._error, self._count = None, 0
        if error is not None:
            raise error
        if decoded and not count:
            raise BackboneError(
                "No rotation was seen in this model, so its rotary table cannot be rounded. Open "
                "it with rope_table='exact' (leave --parity published out)."
            )

    def _call(self, address: int, ask: bool, _user: Any) -> bool:
        """ggml's question whether a tensor is wanted (`ask`), and then the computed tensor."""
        try:
            if self._error is not None:  # the pass is lost: let the rest of it run through
                return False
            if ctypes.c_int.from_address(address + Tensor.op.offset).value != self._rope:
                return not ask
            if not ask:
                self._turn_on(Tensor.from_address(address))
                self._count += 1
        except BaseException as error:  # carried past the C frames and raised by `finish`
            self._error = error
            return False
        return True

    def _turn_on(self, tensor: Tensor) -> None:
        """Change a rotated tensor [1, L, heads, head] as if by the rounded table."""
        values: Floats = self._read(tensor, F32, np.float32)
        rotation, mode = self._rotation(tensor)
        cos, sin = self._table(rotation)
        n, half = rotation.n_dims, rotation.n_dims // 2
        first, second = slice(0, half), slice(half, n)
        if mode == INTERLEAVED:
            first, second = slice(0, n, 2), slice(1, n, 2)
        a, b = values[..., first], values[..., second]
        values[..., first], values[..., second] = a * cos - b * sin, b * cos + a * sin
        self._ggml.ggml_backend_tensor_set(
            ctypes.byref(tensor), values.ctypes.data, 0, values.nbytes
        )

    def _rotation(self, tensor: Tensor) -> tuple[_Rotation, int]:
        """What `ggml_rope_ext` was asked for, and its mode; BackboneError where it is unknown."""
        n_dims, mode = tensor.op_params[1:3]
        floats = np.array(tensor.op_params[_FLOATS], np.int32).view(np.float32).tolist()
        base, scale, extension, attention = floats
        why = ""
        if mode not in (INTERLEAVED, HALF_SPLIT):
            why = "its positions are multi-dimensional"
        elif (scale, extension, attention) != (1, 0, 1):
            why = "its angles are scaled for longer contexts"
        elif tensor.op_params[_OFFSET] or tensor.ne[3] != 1:
            why = "it is not one rotation of each head's beginning"
        if why:
            raise BackboneError(
                f"The rotary table of {tensor.name.decode(errors='replace')} cannot be rounded: "
                f"{why}. Open the model with rope_table='exact' (leave --parity published out)."
            )
        factors = b""
        if tensor.src[2]:
            given = self._read(tensor.src[2].contents, F32, np.float32)
            factors = given.ravel()[: n_dims // 2].tobytes()
        positions = self._read(tensor.src[1].contents, I32, np.int32)
        return _Rotation(positions.tobytes(), n_dims, base, factors), mode

    def _table(self, rotation: _Rotation) -> tuple[Floats, Floats]:
        """cos and sin [L, 1, n_dims / 2] of the turn from the exact table to the rounded one.

        All layers of a pass rotate alike, so the last table is kept.
        """
        if self._known is None or self._known[0] != rotation:
            n = rotation.n_dims
            exponents = np.arange(0, n, 2, dtype=np.float32) / np.float32(n)
            frequencies: Floats = 1 / np.power(rotation.base, exponents, dtype=np.float32)
            if rotation.factors:
                frequencies /= np.frombuffer(rotation.factors, np.float32)
            positions = np.frombuffer(rotation.positions, np.int32).astype(np.float32)
            angles = positions[:, None] * frequencies
            cos, sin = np.cos(angles), np.sin(angles)
            to_cos, to_sin = _bf16(cos), _bf16(sin)
            # Back by the exact angle, forth by the rounded pair, which is no angle any more.
            table = (to_cos * cos + to_sin * sin, to_sin * cos - to_cos * sin)
            self._known = rotation, (table[0][:, None], table[1][:, None])
        return self._known[1]

    def _read(self, tensor: Tensor, kind: int, dtype: type[Any]) -> NDArray[Any]:
        """A contiguous tensor's values, slowest dimension first."""
        values = np.empty(tuple(tensor.ne)[::-1], dtype)
        strides = zip(values.shape, tuple(tensor.nb)[::-1], values.strides, strict=True)
        dense = all(size == 1 or given == wanted for size, given, wanted in strides)
        if tensor.type != kind or not dense:
            raise BackboneError(
                f"llama.cpp's tensor {tensor.name.decode(errors='replace')} is of a type or layout "
                "that the rounded rotary table does not know. Open the model with "
                "rope_table='exact' (leave --parity published out)."
            )
        self._ggml.ggml_backend_tensor_get(
            ctypes.byref(tensor), values.ctypes.data, 0, values.nbytes
        )
        return values


def _bf16(values: Floats) -> Floats:
    """Rounded to nearest, ties to even, and back."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def _function(ggml: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ggml, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


def _check_layout(ggml: Any) -> int:
    """GGML_OP_ROPE of this build, its `ggml_tensor` having been compared with `Tensor`.

    ggml itself describes a rotation, without memory for its numbers; every field that is used
    must be found where `Tensor` has it. Raises BackboneError.
    """
    try:
        found = _described(ggml)
    except AttributeError as error:
        found = str(error)
    if isinstance(found, int):
        return found
    raise BackboneError(
        f"This build of llama.cpp keeps its tensors in another way than is known here ({found}), "
        "so the rotary table cannot be rounded. Install llama-cpp-python 0.3.36, or open the model "
        "with rope_table='exact' (leave --parity published out)."
    )


def _described(ggml: Any) -> int | str:
    """The operation's number, or which field of a described rotation is not what was asked for."""
    pointer, number, real, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
    init = _function(ggml, "ggml_init", pointer, _InitParams)
    free = _function(ggml, "ggml_free", None, pointer)
    overhead = _function(ggml, "ggml_tensor_overhead", ctypes.c_size_t)
    new_1d = _function(ggml, "ggml_new_tensor_1d", pointer, pointer, number, wide)
    new_3d = _function(ggml, "ggml_new_tensor_3d", pointer, pointer, number, *[wide] * 3)
    rope = _function(
        ggml, "ggml_rope_ext", pointer, *[pointer] * 4, *[number] * 3, *[real] * 6
    )  # fmt: skip
    set_name = _function(ggml, "ggml_set_name", pointer, pointer, ctypes.c_char_p)
    op_name = _function(ggml, "ggml_op_name", ctypes.c_char_p, number)
    floats = (1234.5, 0.5, 0.25, 0.75)
    context = init(_InitParams(16 * overhead(), None, True))
    if not context:
        return "it has no memory for a description"
    try:
        values, positions = new_3d(context, F32, 8, 3, 5), new_1d(context, I32, 5)
        factors = new_1d(context, F32, 3)
        address = rope(context, values, positions, factors, 6, HALF_SPLIT, 77, *floats, 32.0, 1.0)
        set_name(address, b"turned")
        tensor = Tensor.from_address(address)
        sources = [ctypes.cast(source, pointer).value for source in tensor.src]
        given = np.array(tensor.op_params[_FLOATS], np.int32).view(np.float32).tolist()
        checks = {
            "src": sources == [values, positions, factors, *[None] * 7],
            "type": tensor.type == F32 and Tensor.from_address(positions).type == I32,
            "ne": tuple(tensor.ne) == (8, 3, 5, 1),
            "nb": tuple(tensor.nb) == (4, 32, 96, 480),
            "op_params": [*tensor.op_params[1:3], *given, tensor.op_params[_OFFSET]]
            == [6, HALF_SPLIT, *floats, 0],
            "name": tensor.name == b"turned",
        }  # fmt: skip
        if wrong := [name for name, good in checks.items() if not good]:
            return f"{', '.join(wrong)} of a tensor"
        op = int(tensor.op)
        if not 0 <= op < 256 or op_name(op) != b"ROPE":  # a name is looked up without a check
            return "op of a tensor"
        return op
    finally:
        free(context)
