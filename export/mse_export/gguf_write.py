"""Streaming GGUF writer: the header first, then one tensor after the other, resumable.

Offsets follow from shapes and types alone, so the layout is fixed before the first weight is
read. The data goes to a `.partial` file; the final name appears by rename only when the last byte
is there. A run that was interrupted goes on behind the last whole tensor where `claim` finds that
the file is being made from the same source, and the header is the same to the byte.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from mse_export.quant_types import ALIGNMENT, tensor_bytes
from mse_runtime.errors import DeviceError

__all__ = [
    "NOTE",
    "GgufTensor",
    "check_free_space",
    "claim",
    "disk_full",
    "gguf_header",
    "unfinished",
    "write_gguf",
]

NOTE = ".from"
"""Suffix of the file beside an unfinished one that says what it is made from."""

Chunk = NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in the table. `shape` is row-major."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def size(self) -> int:
        return tensor_bytes(self.shape, self.type)

    @property
    def padded(self) -> int:
        return self.size + -self.size % ALIGNMENT


def check_free_space(
    folder: Path,
    needed: int,
    what: str,
    advice: str = "Free some space, choose a smaller --quant, or another disk with -o.",
) -> None:
    """`DeviceError` where fewer than `needed` bytes (and 64 MiB) are free for `folder`."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + (64 << 20):
        raise DeviceError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, and only {free / 1e9:.2f} GB are "
            f"free there. {advice}"
        )


def disk_full(path: Path, error: OSError) -> DeviceError:
    """The error for a write that failed half-way."""
    return DeviceError(
        f"Writing {path} failed: {error.strerror or error}. Nothing was left under the final name. "
        "Free some space (or choose another disk with -o) and run the same command again."
    )


def claim(path: Path, fingerprint: str | None) -> bool:
    """Whether `path` lies there whole, made from the source that `fingerprint` stands for.

    Whatever was made from another source (or from none that can be told, None) is removed, and
    the fingerprint is noted, so that the next run can go on with what this one leaves.
    """
    note = _beside(path, NOTE)
    try:
        if fingerprint is not None and note.is_file() and note.read_text("utf-8") == fingerprint:
            return path.is_file()
        for stale in (path, _beside(path, ".partial"), note):
            stale.unlink(missing_ok=True)
        if fingerprint is not None:
            note.write_text(fingerprint, "utf-8")
    except OSError as error:
        raise disk_full(path, error) from error
    return False


def unfinished(folder: Path) -> bool:
    """Whether a file that the next run can go on with lies in `folder`."""
    claimed = [note.with_suffix("") for note in folder.glob("*" + NOTE)]
    return any(path.exists() or _beside(path, ".partial").exists() for path in claimed)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def write_gguf(
    path: Path,
    header: bytes,
    tensors: Sequence[GgufTensor],
    data: Callable[[int], Iterable[Chunk]],
    *,
    progress: Progress | None = None,
    resume: bool = False,
) -> None:
    """Write a GGUF file to `path`.

    header: see `gguf_header`. data(i) yields tensor i's bytes as contiguous arrays, in order. With
    `resume`, tensors that an interrupted call with the same header already wrote are skipped, and
    what is written stays after an error. Raises DeviceError when the disk is full.
    """
    partial = _beside(path, ".partial")
    try:
        _write(path, partial, header, tensors, data, progress, resume)
    except BaseException as error:
        if not resume:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_full(path, error) from error
        raise


def _write(
    path: Path,
    partial: Path,
    header: bytes,
    tensors: Sequence[GgufTensor],
    data: Callable[[int], Iterable[Chunk]],
    progress: Progress | None,
    resume: bool,
) -> None:
    total = len(header) + sum(tensor.padded for tensor in tensors)
    first, offset = _resume_point(partial, header, tensors) if resume else (0, 0)
    there = partial.stat().st_size if offset else 0
    check_free_space(path.parent, total - there, f"Writing {path.name}")
    if not offset:
        partial.write_bytes(header)
        offset = len(header)
    with partial.open("r+b") as file:
        file.seek(offset)
        file.truncate()
        for i in range(first, len(tensors)):
            written = 0
            for chunk in data(i):
                file.write(np.ascontiguousarray(chunk).data)
                written += chunk.nbytes
                if progress is not None:
                    progress(offset + written, total)
            if written != tensors[i].size:
                raise ValueError(
                    f"{tensors[i].name}: {written} bytes written, {tensors[i].size} expected"
                )
            file.write(bytes(tensors[i].padded - written))
            offset += tensors[i].padded
        file.flush()
        os.fsync(file.fileno())
        _forget_pages(file.fileno())
    partial.replace(path)


def _forget_pages(file: int) -> None:
    """Let the next reader, who hashes it for the manifest, get the file from the disk.

    It sees what is really there. And Linux keeps in large pieces what it reads ahead, but page by
    page what was written, which takes every process longer to map.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _resume_point(partial: Path, header: bytes, tensors: Sequence[GgufTensor]) -> tuple[int, int]:
    """(first tensor still to write, its offset); (0, 0) where nothing can be kept."""
    if not partial.is_file():
        return 0, 0
    with partial.open("rb") as file:
        if file.read(len(header)) != header:
            return 0, 0
    size, offset = partial.stat().st_size, len(header)
    for i, tensor in enumerate(tensors):
        if offset + tensor.padded > size:
            return i, offset
        offset += tensor.padded
    return len(tensors), offset


def gguf_header(arch: str, metadata: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> bytes:
    """Everything before the first tensor's bytes.

    metadata: full keys; int becomes uint32, float float32, lists arrays.
    """
    with tempfile.TemporaryDirectory(prefix="mse-gguf-") as scratch:
        path = Path(scratch) / "header.gguf"
        try:
            writer = gguf.GGUFWriter(path, arch)
            for key, value in metadata.items():
                _add(writer, key, value)
            for tensor in tensors:
                writer.add_tensor_info(
                    tensor.name,
                    tensor.shape,
                    np.dtype(np.float32),
                    tensor.size,
                    raw_dtype=tensor.type,
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return padded(path.read_bytes())
        except OSError as error:
            raise disk_full(path, error) from error


def padded(data: bytes) -> bytes:
    """With zeros up to where tensors may begin."""
    return data + bytes(-len(data) % ALIGNMENT)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
