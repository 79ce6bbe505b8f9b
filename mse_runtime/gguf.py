"""GGUF files without llama.cpp: a memory-mapped header scan and rows of the embedding table.

`gguf.GGUFReader` takes seconds on a large vocabulary because it builds an object per array
element. Nothing here needs the arrays, so the scan steps over them: what a model is, where its
tensors lie and how they are quantised is known in some 10 ms.

The file is treated as hostile: every count, length and offset is checked against the bytes that
are really there before anything is read or allocated.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from mse_runtime.errors import BackboneError, DeviceError
from mse_runtime.gguf_scan import (
    ARRAY,
    FORMATS,
    MAGIC,
    MAX_DIMS,
    MIN_KV,
    MIN_TENSOR,
    STRING,
    Array,
    Scalar,
    Scan,
    TensorInfo,
)
from mse_runtime.quants import BLOCKS, TYPE_NAMES, dequantize

__all__ = ["MAPPINGS", "Gguf", "Shortened", "TensorInfo"]

MAPPINGS = threading.Lock()
"""Held while a mapping of a model's file goes, or while addresses of mappings are in use."""


_ENTRIES = 16  # where a header counts its metadata entries
_FILLER = b"mse.left_out"
_SETTLED = 2.0  # seconds; file systems count time in coarser steps than they say


class Shortened(NamedTuple):
    """A header of which parts are left out: zeros between `head` and `tail`."""

    head: bytes
    tail: bytes
    size: int
    """Bytes in all."""
    data: int
    """Where the tensors' data begin in the file."""


class Gguf:
    """The header of one GGUF file, and rows of its embedding table.

    Open with `Gguf.open(path)`; a context manager. The file stays mapped until `close`.
    """

    path: Path
    version: int
    size: int
    """Bytes of the whole file."""
    metadata: Mapping[str, Scalar]
    """Scalar entries; arrays are read on demand with `array`."""
    tensors: Mapping[str, TensorInfo]

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._map: mmap.mmap | None = None
        self._stamp = (0, 0)
        self._arrays: dict[str, Array] = {}
        self._header = (0, 0, 0)  # ends of metadata and of the tensors' table; where data begin

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Scan the header of `path`.

        Raises BackboneError for anything but a complete little-endian GGUF (version 2 or 3):
        missing or unreadable files, other formats, truncated or inconsistent ones, and one part
        of a split model.
        """
        found = cls()
        found.path = Path(path)
        found._file, found._map = _map_file(found.path)
        found._stamp = _stamp(found._file)
        try:
            found._read_once()
        except BaseException:
            found.close()
            raise
        return found

    def _read_once(self) -> None:
        """Scan the header, unless it is the one that was scanned last: a model's file is opened
        several times on the way to an answer.
        """
        global _last
        key, last = _identity(self._file), _last
        if key is None or last is None or last[0] != key:
            self._read()
            found = (dict(self.metadata), dict(self.tensors), dict(self._arrays))
            _last = (key, *found, self.version, self._header)
            return
        _, metadata, tensors, arrays, self.version, self._header = last
        self.size = len(self._mapped())
        self.metadata, self.tensors, self._arrays = dict(metadata), dict(tensors), dict(arrays)

    def _read(self) -> None:
        scan = Scan(self._mapped(), self.path)
        self.size = scan.end
        if scan.data[:4] != MAGIC:
            raise BackboneError(
                f"{self.path} is not a GGUF file (it starts with {scan.data[:4]!r}). The language "
                "model must be in GGUF format: see `mse-export --help`."
            )
        scan.at = 4
        self.version = scan.u32("the header")
        if self.version not in (2, 3):
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big")
            why = "it is big-endian" if swapped in (2, 3) else "only 2 and 3 are known"
            raise scan.fail(f"GGUF version {self.version} is not supported, {why}")
        n_tensors, n_entries = scan.u64("the header"), scan.u64("the header")
        if n_entries > (scan.end - scan.at) // MIN_KV:
            raise scan.fail(f"it declares {n_entries} metadata entries, more than it can hold")
        self.metadata = dict(self._read_metadata(scan, n_entries))
        tables = scan.at
        if n_tensors > (scan.end - scan.at) // MIN_TENSOR:
            raise scan.fail(f"it declares {n_tensors} tensors, more than it can hold")
        self.tensors, data = self._read_tensors(scan, n_tensors)
        self._header = (tables, scan.at, data)
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise BackboneError(
                f"{self.path} is one part of a split model. Join the parts first: "
                "llama-gguf-split --merge FIRST_PART OUT.gguf"
            )

    def _read_metadata(self, scan: Scan, count: int) -> Iterator[tuple[str, Scalar]]:
        for _ in range(count):
            entry = scan.at
            key = scan.text("a metadata key")
            kind = scan.u32(f"the metadata entry {key[:80]!r}")
            if kind == ARRAY:
                self._arrays[key] = scan.skip_array(entry, f"the metadata array {key[:80]!r}")
            else:
                yield key, scan.scalar(kind, f"the metadata entry {key[:80]!r}")

    def _read_tensors(self, scan: Scan, count: int) -> tuple[dict[str, TensorInfo], int]:
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise scan.fail(f"general.alignment is {align!r}, not a power of two")
        table: list[tuple[str, tuple[int, ...], str, int, int]] = []
        for _ in range(count):
            name = scan.text("a tensor's name")
            what = f"the tensor {name[:80]!r}"
            n_dims = scan.u32(what)
            if not 1 <= n_dims <= MAX_DIMS:
                raise scan.fail(f"{what} has {n_dims} dimensions")
            shape = tuple(scan.u64(what) for _ in range(n_dims))
            kind = scan.u32(what)
            if kind not in TYPE_NAMES:
                raise scan.fail(f"{what} has the unknown type {kind}")
            per_block, block_bytes = BLOCKS[TYPE_NAMES[kind]]
            if 0 in shape or shape[0] % per_block:
                raise scan.fail(f"{what} has the impossible shape {shape}")
            size = math.prod(shape) // per_block * block_bytes
            table.append((name, shape[::-1], TYPE_NAMES[kind], scan.u64(what), size))
        start = -(-scan.at // align) * align
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind_name, offset, size in table:
            if offset % align or start + offset + size > scan.end:
                raise scan.fail(f"the data of the tensor {name[:80]!r} lie outside the file")
            if name in tensors:
                raise scan.fail(f"the tensor {name[:80]!r} occurs twice")
            tensors[name] = TensorInfo(name, shape, kind_name, start + offset, size)
        return tensors, start

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise BackboneError(f"{self.path} has been closed. Open it again with Gguf.open.")
        return self._map

    def _data(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, of a file that is still the one that was opened.

        Replaced by renaming, the old file stays readable here. Written into or cut, the map shows
        the new bytes, or ends the process by SIGBUS: such a file is refused before it is touched.
        """
        mapped = self._mapped()
        self._check_same()
        return np.frombuffer(mapped, np.uint8, info.size, info.offset)

    def same_file(self) -> Path:
        """A path to what was opened, though another file may have its name by now (Linux).

        Raises BackboneError where it was written into meanwhile.
        """
        self._check_same()
        assert self._file is not None
        return Path(f"/proc/self/fd/{self._file.fileno()}")

    def _check_same(self) -> None:
        if self._file is None or _stamp(self._file) != self._stamp:
            raise BackboneError(
                f"{self.path} was changed while it was in use. Start again; to put another model "
                "in its place, write it under another name and rename it."
            )

    def close(self) -> None:
        """Unmap the file. Arrays handed out before are copies and stay valid."""
        if self._map is not None and self._file is not None:
            # Still looked at where an error is on its way up: then it goes with that.
            with MAPPINGS, contextlib.suppress(BufferError):
                self._map.close()
            self._file.close()
            self._map = self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def identity(self) -> str | None:
        """A name of the file as it is, for what is remembered of it; None for a very new one."""
        found = _identity(self._file)
        return None if found is None else "-".join(map(str, found))

    # What the file says about the model

    def value(self, key: str, default: Scalar | None = None) -> Scalar:
        """A metadata scalar; `{arch}` in the key stands for the architecture."""
        key = key.replace("{arch}", self.arch) if "{arch}" in key else key
        found = self.metadata.get(key, default)
        if found is None:
            raise BackboneError(
                f"{self.path} lacks the metadata entry {key!r}. It is not a complete language "
                "model: export or download it again."
            )
        return found

    def integer(self, key: str, default: int | None = None) -> int:
        """Like `value`, for entries that must be whole numbers."""
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int):
            raise BackboneError(
                f"{self.path}: the metadata entry {key!r} is {found!r}, not a whole number. "
                "Export or download the model again."
            )
        return found

    def array(self, key: str) -> list[Any]:
        """One metadata array, read now. Large vocabularies take some 0.1 s.

        Raises BackboneError where there is none of that name.
        """
        if key not in self._arrays:
            raise BackboneError(f"{self.path} has no metadata array {key!r}.")
        where = self._arrays[key]
        if where.kind != STRING:
            return list(self.numbers(key).tolist())
        scan = Scan(self._mapped(), self.path)
        scan.at = where.offset
        return [scan.text(key) for _ in range(where.count)]

    def numbers(self, key: str) -> npt.NDArray[Any]:
        """A metadata array of numbers [n]. Raises BackboneError where there is none."""
        where = self._arrays.get(key)
        if where is None or where.kind == STRING:
            raise BackboneError(f"{self.path} has no metadata array of numbers {key!r}.")
        dtype = np.dtype(FORMATS[where.kind])
        view = self._mapped()[where.offset : where.offset + where.count * dtype.itemsize]
        return np.frombuffer(view, dtype)

    def strings_within(
        self,
        key: str,
        text: bytes,
        *,
        always: npt.NDArray[np.bool_] | None = None,
        pairs: bool = False,
    ) -> list[tuple[int, bytes]]:
        """(number, string) of those strings of an array that occur in `text`, as
        `mse_kernels.strings.find_strings` has it; some milliseconds for a large vocabulary.

        Raises BackboneError where there is no such array, or no kernel library.
        """
        where = self._arrays.get(key)
        found = None
        if where is not None and where.kind == STRING:
            try:
                from mse_kernels.strings import find_strings

                found = find_strings(
                    self._mapped(), where.offset, where.count, text, always=always, pairs=pairs
                )
            except (ImportError, RuntimeError, AttributeError):  # no kernels, or older ones
                found = None
        if found is None:
            raise BackboneError(f"{self.path}: the strings of {key!r} cannot be searched.")
        return found

    def header_without(self, prefix: str) -> Shortened:
        """The header without the arrays whose keys begin with `prefix`.

        A text of zeros at the end of the metadata takes their room, so that the tensors' data stay
        where they are. Raises BackboneError where the arrays are too short for that, or such a text
        is there already.
        """
        mapped, (metadata, table, data) = self._mapped(), self._header
        gaps = sorted(
            (array.start, array.end)
            for key, array in self._arrays.items()
            if key.startswith(prefix)
        )
        filler = struct.pack("<Q", len(_FILLER)) + _FILLER + struct.pack("<I", STRING)
        left = sum(end - start for start, end in gaps) - len(filler) - 8
        taken = _FILLER.decode() in {*self.metadata, *self._arrays}
        if left < 0 or taken:
            raise BackboneError(f"{self.path} has no arrays {prefix!r} that could be left out.")
        entries = struct.unpack_from("<Q", mapped, _ENTRIES)[0] - len(gaps) + 1
        starts = [_ENTRIES + 8, *(end for _, end in gaps)]
        kept = [mapped[a:b] for a, b in zip(starts, [*(a for a, _ in gaps), metadata], strict=True)]
        head = b"".join(
            (mapped[:_ENTRIES], struct.pack("<Q", entries), *kept, filler, struct.pack("<Q", left))
        )
        return Shortened(head, mapped[metadata:table], table, data)

    def has_repeats(self, key: str) -> bool:
        """Whether an array of strings holds one twice, as C strings; empty ones don't count.

        Takes some 0.1 s for 50,000 strings.
        """
        if key not in self._arrays or self._arrays[key].kind != STRING:
            return False
        scan = Scan(self._mapped(), self.path)
        scan.at = self._arrays[key].offset
        seen = list(filter(None, scan.strings(self._arrays[key].count, key)))
        if b"\0" in b"".join(seen):
            seen = [text.partition(b"\0")[0] for text in seen]
        return len(set(seen)) < len(seen)

    def array_length(self, key: str) -> int:
        """Elements of a metadata array, 0 where there is none; nothing is read."""
        return self._arrays[key].count if key in self._arrays else 0

    @property
    def arch(self) -> str:
        """llama.cpp's architecture name: `llama`, `qwen`, `qwen2`, `chatglm`, ..."""
        return str(self.value("general.architecture"))

    @property
    def n_layer(self) -> int:
        return self.integer("{arch}.block_count")

    @property
    def n_embd(self) -> int:
        return self.integer("{arch}.embedding_length")

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding table."""
        return self._embedding().shape[0]

    @property
    def n_head(self) -> int:
        return self.integer("{arch}.attention.head_count")

    @property
    def n_head_kv(self) -> int:
        """Key/value heads: fewer than `n_head` for grouped- and multi-query attention."""
        return self.integer("{arch}.attention.head_count_kv", self.n_head)

    @property
    def n_ctx_train(self) -> int:
        return self.integer("{arch}.context_length")

    @property
    def head_dim(self) -> tuple[int, int]:
        """Width of one key head and of one value head."""
        plain = self.n_embd // max(self.n_head, 1)
        return (
            self.integer("{arch}.attention.key_length", plain),
            self.integer("{arch}.attention.value_length", plain),
        )

    @property
    def weight_type(self) -> str:
        """The type that most of the weights' bytes are in, such as `Q4_0`."""
        total: dict[str, int] = {}
        for info in self.tensors.values():
            total[info.type] = total.get(info.type, 0) + info.size
        return max(total, key=lambda kind: total[kind]) if total else "none"

    # Weights

    def _embedding(self) -> TensorInfo:
        info = self.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            raise BackboneError(
                f"{self.path} holds no embedding table (token_embd.weight), so it is no language "
                "model with weights. Use the full model file, not a vocabulary or an adapter."
            )
        return info

    def rows(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Rows of the embedding table: float32 [n, n_embd], only these rows being read.

        Bit for bit what llama.cpp feeds its first layer for the same ids. Raises BackboneError
        for ids outside 0 .. n_vocab - 1.
        """
        return self._rows(self._embedding(), ids)

    def head_rows(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Rows of the output matrix: float32 [n, n_embd]; the embedding table's where they are one.

        The logit of token i is row i times the last hidden state.
        """
        return self._rows(self.tensors.get("output.weight") or self._embedding(), ids)

    def _rows(self, info: TensorInfo, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        wanted = np.asarray(ids)
        if wanted.ndim != 1 or (wanted.size and not np.issubdtype(wanted.dtype, np.integer)):
            raise BackboneError(
                f"Token ids must be a list of whole numbers, not {wanted.dtype} {wanted.shape}."
            )
        if not wanted.size:
            return np.empty((0, info.shape[1]), np.float32)
        if wanted.min() < 0 or wanted.max() >= info.shape[0]:
            raise BackboneError(
                f"Token ids must lie in 0 .. {info.shape[0] - 1}, got {wanted.min()} .. "
                f"{wanted.max()}. Tokenise with the same model."
            )
        raw = self._data(info)
        return dequantize(raw.reshape(info.shape[0], -1)[wanted], info.type)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor, dequantised: float32 of its `shape`. Memory: 4 bytes an element."""
        if name not in self.tensors:
            raise BackboneError(f"{self.path} has no tensor {name!r}.")
        info = self.tensors[name]
        raw = self._data(info)
        flat = raw.reshape(info.elements // info.shape[-1], -1)
        return dequantize(flat, info.type).reshape(info.shape)


_Header = tuple[
    Any, dict[str, Scalar], dict[str, TensorInfo], dict[str, Array], int, tuple[int, int, int]
]
_last: _Header | None = None


def _identity(file: BinaryIO | None) -> tuple[int, ...] | None:
    """What tells an unchanged file; None for one that is so new that a change might not show."""
    if file is None:
        return None
    now = os.fstat(file.fileno())
    if time.time() - max(now.st_mtime, now.st_ctime) < _SETTLED:
        return None
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def _stamp(file: BinaryIO) -> tuple[int, int]:
    now = os.fstat(file.fileno())
    return now.st_size, now.st_mtime_ns


def _map_file(path: Path) -> tuple[BinaryIO, mmap.mmap]:
    try:
        if not path.is_file():
            kind = "is a directory" if path.is_dir() else "does not exist or is no regular file"
            raise BackboneError(
                f"The language model {path} {kind}. Give the path of a .gguf file, or download "
                "the bundle again."
            )
        handle = path.open("rb")
        try:
            return handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            handle.close()
            raise
    except ValueError as error:  # an empty file, or a NUL in the path
        raise BackboneError(
            f"The language model {path} is empty or its name is no path ({error}). Download or "
            "export it again."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise DeviceError(
                f"The language model {path} has {path.stat().st_size / 1e6:,.0f} MB, more than the "
                "address space that this process may still take. Raise the limit (ulimit -v), or "
                "take a smaller model."
            ) from error
        raise BackboneError(
            f"The language model {path} cannot be read: {error.strerror or error}. Check the "
            "file's permissions."
        ) from error
