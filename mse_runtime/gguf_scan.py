"""The cursor that reads a GGUF header: it cannot leave the mapped bytes.

Every count, length and offset is checked against what is really there before anything is read or
allocated, so a hostile file costs no more than its own size.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from mse_runtime.errors import BackboneError
from mse_runtime.records import dataclass

__all__ = [
    "ARRAY", "FORMATS", "MAGIC", "MAX_DIMS", "MIN_KV", "MIN_TENSOR", "STRING",
    "Array", "Scalar", "Scan", "TensorInfo",
]  # fmt: skip

Scalar = bool | int | float | str

MAGIC = b"GGUF"
FORMATS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_SCALARS = {kind: struct.Struct(text) for kind, text in FORMATS.items()}
STRING, ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
MAX_DIMS = 4
# The smallest possible entries: an empty key with a one-byte value; a nameless one-dimensional
# tensor. A count that cannot fit in the rest of the file is refused before the first step.
MIN_KV, MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the table. `shape` is numpy's order: rows first, the contiguous axis last."""

    name: str
    shape: tuple[int, ...]
    type: str
    """ggml's name, such as `Q4_0`."""
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Array:
    kind: int
    count: int
    start: int
    """Of the whole entry, its key included, in bytes from the start of the file."""
    offset: int
    """Of the first element."""
    end: int


class Scan:
    """A cursor over the mapped bytes that cannot leave them."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path
        self.at, self.end = 0, len(data)

    def fail(self, what: str) -> BackboneError:
        return BackboneError(
            f"{self.path} is not a usable GGUF file: {what} (at byte {self.at} of {self.end}). "
            "The file is probably damaged or cut short: download or export it again."
        )

    def need(self, size: int, what: str) -> int:
        """Move past `size` bytes and return where they start."""
        start = self.at
        if size > self.end - start:
            raise self.fail(f"it ends inside {what}")
        self.at = start + size
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.need(8, what))[0])

    def text(self, what: str) -> str:
        size = self.u64(what)
        start = self.need(size, what)
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def scalar(self, kind: int, what: str) -> Scalar:
        if kind == STRING:
            return self.text(what)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has the unknown type {kind}")
        packed = _SCALARS[kind]
        value: Scalar = packed.unpack_from(self.data, self.need(packed.size, what))[0]
        return value

    def skip_array(self, entry: int, what: str) -> Array:
        """entry: where the array's key begins."""
        kind, count = self.u32(what), self.u64(what)
        start = self.at
        if kind in _SCALARS:
            self.need(count * _SCALARS[kind].size, what)
        elif kind == STRING:
            self._skip_strings(count, what)
        else:
            raise self.fail(f"{what} is an array of the unsupported type {kind}")
        return Array(kind, count, entry, start, self.at)

    def strings(self, count: int, what: str) -> Iterator[bytes]:
        """The next `count` strings as bytes."""
        unpack, data, at, last = _U64.unpack_from, self.data, self.at, self.end - 8
        for _ in range(count):
            if at > last:
                raise self.fail(f"it ends inside {what}")
            start = at + 8
            at = start + unpack(data, at)[0]
            yield data[start:at]
        self.at = at

    def _skip_strings(self, count: int, what: str) -> None:
        if count > (self.end - self.at) // 8:
            raise self.fail(f"{what} declares {count} strings, more than the file can hold")
        end = _after_strings(self.data, self.at, count)
        if end is None:
            raise self.fail(f"it ends inside {what}")
        self.at = end


def _after_strings(data: mmap.mmap, at: int, count: int) -> int | None:
    """Where the strings end; None where the data does first.

    The only long loop over a header, 300,000 steps for a large vocabulary, and all of it with
    Python's lock held: the kernels' takes a tenth of the time.
    """
    try:
        from mse_kernels.strings import skip_strings

        return skip_strings(data, at, count)
    except (ImportError, RuntimeError, AttributeError):  # the kernels are optional
        return _after_strings_plain(data, at, count)


def _after_strings_plain(data: mmap.mmap, at: int, count: int) -> int | None:
    unpack, end = _U64.unpack_from, len(data)
    last = end - 8
    for _ in range(count):
        if at > last:
            return None
        at += 8 + unpack(data, at)[0]
    return at if at <= end else None
