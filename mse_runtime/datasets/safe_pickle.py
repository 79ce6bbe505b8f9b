"""Reading pickles that come from strangers: numpy arrays and plain types, nothing else.

The published data sets are pickles, and a pickle is a program. This unpickler knows a closed list
of instructions and of constructors; anything else is refused by name before it is looked up, so
nothing is imported and nothing is called. NumPy's own `__setstate__` is never reached with values
that were not checked, since it crashes the process on wrong ones.
"""

from __future__ import annotations

import collections
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from struct import unpack
from typing import IO, Any, ClassVar

import numpy as np

from mse_runtime.errors import MediaError

__all__ = ["load_pickle"]

# Booleans, integers, floats, complex numbers, bytes, text and objects: what a table may hold.
_DTYPE = re.compile(r"([<>|=]?)([biufcSU]\d{0,9}|\?|O8?)")
_KEYS = (str, bytes, int, float, bool, type(None))
_NDARRAY = "the class numpy.ndarray"
_NEVER = b"".join(
    (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2,
     pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
)  # fmt: skip


def load_pickle(path: str | Path) -> Any:
    """The object in `path`, built of numpy arrays and scalars and plain types alone.

    Raises:
        MediaError: the file is missing, damaged, or asks for anything else (named in the message).
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            return _Unpickler(handle).load()
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from None
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror or error}.") from error
    except MemoryError as error:
        raise MediaError(
            f"{path} does not fit into memory, or names an array that is larger than the file. "
            "Use the open format (docs/data.md), which is read sample by sample."
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way, numpy's own included
        raise MediaError(
            f"{path} is damaged or not a pickle ({type(error).__name__}: {error}). Download it "
            "again, or convert the data to the open format (docs/data.md)."
        ) from error


class _Bounded:
    """A file that is never asked for more than it has: a declared size takes no memory."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._size = handle.seek(0, os.SEEK_END)
        handle.seek(0)

    def read(self, size: int) -> bytes:
        if size > self._size - self._handle.tell():
            raise EOFError("it ends too early")
        return self._handle.read(size)

    def readline(self) -> bytes:
        return self._handle.readline()


_Python: Any = pickle._Unpickler  # the one in C cannot be narrowed


class _Unpickler(_Python):  # type: ignore[misc]
    """Python's own unpickler, in Python, without the instructions that reach into objects."""

    def __init__(self, handle: IO[bytes]) -> None:
        # latin1 is what numpy arrays of Python 2 need; strings of Python 3 are not affected.
        super().__init__(_Bounded(handle), encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        # numpy's constructors moved (numpy.core to numpy._core in 2.0): both are in files.
        module = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        found = _ALLOWED.get((module, name))
        if found is None:
            raise MediaError(
                f"the pickle asks for {module}.{name}; only numpy arrays and plain types are read, "
                "and nothing was executed. If you trust the file, convert it to the open format "
                "(docs/data.md)."
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise MediaError("the pickle refers to objects outside of itself, which are not read.")

    def _refuse(self) -> None:
        raise MediaError("the pickle holds an instruction that no data set needs; it is not read.")

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _Array | _DType):
            raise MediaError(f"the pickle sets the state of a {type(target).__name__}.")
        target.restore(state)

    def _append(self) -> None:
        value = self.stack.pop()
        _expect(self.stack[-1], list).append(value)

    def _appends(self) -> None:
        values = self.pop_mark()
        _expect(self.stack[-1], list).extend(values)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _expect(self.stack[-1], dict)[_key(key)] = value

    def _set_items(self) -> None:
        found = self.pop_mark()
        _expect(self.stack[-1], dict).update(_pairs(found[::2], found[1::2]))

    def _dict(self) -> None:
        found = self.pop_mark()
        self.append(_pairs(found[::2], found[1::2]))

    def _add_items(self) -> None:
        values = self.pop_mark()
        _expect(self.stack[-1], set).update(map(_key, values))

    def _frozen_set(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    def _bytearray(self) -> None:
        self.append(bytearray(self.read(unpack("<Q", self.read(8))[0])))

    dispatch: ClassVar[dict[int, Callable[..., None]]] = _Python.dispatch | {
        **dict.fromkeys(_NEVER, _refuse),
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _frozen_set,
        pickle.BYTEARRAY8[0]: _bytearray,
    }


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise MediaError(f"the pickle fills a {type(value).__name__} like a {kind.__name__}.")
    return value


def _key(value: Any) -> Any:
    """A key that is hashed in one step: a tuple nested deeply enough overflows the stack."""
    if not isinstance(value, _KEYS):
        raise MediaError(f"the pickle uses a {type(value).__name__} as a key.")
    return value


def _pairs(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_key, keys), values, strict=True))


class _DType:
    """A numpy dtype on its way: a name, then the state with its byte order."""

    __slots__ = ("value",)

    def __init__(self, name: Any, _align: Any = False, _copy: Any = False) -> None:
        found = _DTYPE.fullmatch(name) if isinstance(name, str) else None
        if not found:
            raise MediaError(f"the pickle asks for arrays of the type {name!r}, which is not read.")
        self.value = np.dtype(name)

    def restore(self, state: Any) -> None:
        ok = isinstance(state, tuple) and 8 <= len(state) <= 9
        if not ok or state[1] not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
            raise MediaError(f"the pickle describes a type of array that is not read: {state!r}.")
        if state[1] in "<>":
            self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array on its way: empty, then the state with its shape and content."""

    def restore(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise MediaError("the pickle holds an array without a shape and content.")
        shape, dtype, fortran, content = state[-4:]
        if not isinstance(dtype, _DType):
            raise MediaError("the pickle holds an array without a type.")
        count = _count(shape)
        if isinstance(content, str):  # Python 2
            content = content.encode("latin1")
        if not isinstance(content, list if dtype.value.hasobject else bytes):
            raise MediaError("the pickle holds an array whose content is no memory.")
        size = 1 if dtype.value.hasobject else dtype.value.itemsize
        if len(content) != count * size:
            raise MediaError(f"the pickle holds {len(content)} values for an array of {shape}.")
        checked: Any = (1, shape, dtype.value, bool(fortran), content)
        self.__setstate__(checked)


def _count(shape: Any) -> int:
    """Elements of a shape that is one."""
    if not isinstance(shape, tuple) or len(shape) > 16:
        raise MediaError("the pickle holds an array without a shape.")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise MediaError(f"the pickle holds an array of the shape {shape!r}.")
    return math.prod(shape)


def _reconstruct(kind: Any, shape: Any, _dtype: Any) -> Any:
    """An empty array, filled by the state that follows in the stream."""
    if kind is not _NDARRAY or tuple(shape) not in ((0,), ()):
        raise MediaError(f"the pickle asks for an array of class {kind!r} and shape {shape!r}.")
    return _Array((0,), np.int8)


def _scalar(dtype: Any, value: Any = b"") -> Any:
    kind = _expect(dtype, _DType).value
    if kind.hasobject:
        return value
    if isinstance(value, str):  # Python 2
        value = value.encode("latin1")
    return np.frombuffer(_expect(value, bytes), kind, 1)[0]


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> Any:
    kind = _expect(dtype, _DType).value
    if kind.hasobject or not isinstance(buffer, bytes | bytearray):
        raise MediaError("the pickle stores objects as raw memory, which is not read.")
    count = _count(shape)
    if count * kind.itemsize != len(buffer):
        raise MediaError(f"the pickle holds {len(buffer)} bytes for an array of {shape}.")
    flat = np.frombuffer(buffer, kind) if count else np.empty(0, kind)
    if axes is not None:
        return flat.reshape(shape).transpose(axes)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _bytes(content: Any = b"", codec: str = "latin1") -> bytes:
    """`bytes` without its other reading, a number of zeros."""
    if isinstance(content, str):
        return _encode(content, codec)
    if not isinstance(content, bytes | bytearray | list):
        raise MediaError(f"the pickle builds bytes from {type(content).__name__}.")
    return bytes(content)


def _bytearray(content: Any = b"", codec: str = "latin1") -> bytearray:
    return bytearray(_bytes(content, codec))


def _encode(text: str, codec: str = "latin1") -> bytes:
    """Bytes as protocol 2 writes them; no codec but latin1 is ever asked for by a pickler."""
    if codec not in ("latin1", "latin-1"):
        raise MediaError(f"the pickle asks for the codec {codec!r}, which no pickler writes.")
    return text.encode("latin1")


def _plain(kind: type) -> Callable[..., Any]:
    """A number or text from one value."""

    def make(value: Any = 0) -> Any:
        if not isinstance(value, str | int | float | complex):
            raise MediaError(f"the pickle makes a {kind.__name__} of {type(value).__name__}.")
        return kind(value)

    return make


def _complex(real: float = 0.0, imaginary: float = 0.0) -> complex:
    return complex(_expect(real, float), _expect(imaginary, float))


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    pairs = list(pairs)
    return collections.OrderedDict((_key(key), value) for key, value in pairs)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DType,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _encode,
    **{("builtins", kind.__name__): _plain(kind) for kind in (int, float, str, bool)},
    ("builtins", "long"): _plain(int),
    ("builtins", "unicode"): _plain(str),
    ("builtins", "complex"): _complex,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "set"): lambda values=(): set(map(_key, values)),  # protocols 0 to 3
    ("builtins", "frozenset"): lambda values=(): frozenset(map(_key, values)),
}
