"""Reading pickles that come from strangers: numpy arrays and plain types, nothing else.

The published data sets are pickles, and a pickle is a program. This unpickler knows a closed list
of constructors; anything else is refused by name before it is looked up, so nothing is imported
and nothing is called.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from mse_runtime.errors import MediaError

__all__ = ["load_pickle"]

PLAIN: dict[str, type] = {
    kind.__name__: kind
    for kind in (dict, list, tuple, set, frozenset, complex, int, float, str, bool)
}


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


class _Unpickler(pickle.Unpickler):
    def __init__(self, handle: IO[bytes]) -> None:
        # latin1 is what numpy arrays of Python 2 need; strings of Python 3 are not affected.
        super().__init__(handle, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        found = _allowed(module, name)
        if found is None:
            raise MediaError(
                f"the pickle asks for {module}.{name}; only numpy arrays and plain types are read, "
                "and nothing was executed. If you trust the file, convert it to the open format "
                "(docs/data.md)."
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise MediaError("the pickle refers to objects outside of itself, which are not read.")


def _allowed(module: str, name: str) -> Callable[..., Any] | type | None:
    # numpy's constructors moved (numpy.core to numpy._core in 2.0): both spellings stand in files.
    module = module.replace("numpy.core.", "numpy._core.")
    if module in ("builtins", "__builtin__"):
        if name in ("bytes", "bytearray"):
            return _bytes if name == "bytes" else _bytearray
        return PLAIN.get({"unicode": "str", "long": "int"}.get(name, name))
    if (module, name) == ("collections", "OrderedDict"):
        return collections.OrderedDict
    if (module, name) == ("_codecs", "encode"):
        return _encode
    if module == "numpy" and name == "dtype":
        return np.dtype
    if module == "numpy" and name == "ndarray":
        return np.ndarray
    if module == "numpy._core.multiarray" and name == "_reconstruct":
        return _reconstruct
    if module == "numpy._core.multiarray" and name == "scalar":
        return _scalar
    if module == "numpy._core.numeric" and name == "_frombuffer":
        return _frombuffer
    return None


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


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> Any:
    """An empty array, filled by the state that follows in the stream."""
    if kind is not np.ndarray or tuple(shape) not in ((0,), ()):
        raise MediaError(f"the pickle asks for an array of class {kind!r} and shape {shape!r}.")
    return np.ndarray.__new__(np.ndarray, (0,), np.dtype(dtype))


def _scalar(dtype: Any, value: Any = b"") -> Any:
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        return value
    if isinstance(value, str):  # Python 2
        value = value.encode("latin1")
    return np.frombuffer(value, dtype, 1)[0]


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> Any:
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise MediaError("the pickle stores objects as raw memory, which is not read.")
    flat = np.frombuffer(buffer, dtype)
    if axes is not None:
        return flat.reshape(shape).transpose(axes)
    return flat.reshape(shape, order="F" if order == "F" else "C")
