"""Streaming GGUF writer: the header first, then one tensor after the other, resumable.

Offsets follow from shapes and types alone, so the layout is fixed before the first weight is
read. The data goes to a `.partial` file whose header is compared on resume; the final name appears
by rename only when the last byte is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from mse_export.quant_types import ALIGNMENT, tensor_bytes
from mse_runtime.errors import DeviceError

__all__ = ["GgufTensor", "check_free_space", "disk_full", "write_gguf"]

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


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """`DeviceError` where fewer than `needed` bytes (and 64 MiB) are free for `folder`."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + (64 << 20):
        raise DeviceError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, and only {free / 1e9:.2f} GB are "
            "free there. Free some space, choose a smaller --quant, or another disk with -o."
        )


def disk_full(path: Path, error: OSError) -> DeviceError:
    """The error for a write that failed half-way."""
    return DeviceError(
        f"Writing {path} failed: {error.strerror or error}. Nothing was left under the final name. "
        "Free some space (or choose another disk with -o) and run the same command again."
    )


def write_gguf(
    path: Path,
    arch: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[GgufTensor],
    data: Callable[[int], Iterable[Chunk]],
    *,
    progress: Progress | None = None,
    resume: bool = False,
) -> None:
    """Write a GGUF file to `path`.

    metadata: full keys; int becomes uint32, float float32, lists arrays. data(i) yields tensor i's
    bytes as contiguous arrays, in order. With `resume`, tensors that an interrupted call with the
    same header already wrote are skipped. Raises DeviceError when the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        _write(path, partial, arch, metadata, tensors, data, progress, resume)
    except OSError as error:
        if not resume:
            partial.unlink(missing_ok=True)
        raise disk_full(path, error) from error
    except BaseException:
        if not resume:
            partial.unlink(missing_ok=True)
        raise


def _write(
    path: Path,
    partial: Path,
    arch: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[GgufTensor],
    data: Callable[[int], Iterable[Chunk]],
    progress: Progress | None,
    resume: bool,
) -> None:
    header_file = path.with_name(path.name + ".header")
    try:
        _write_header(header_file, arch, metadata, tensors)
        header = header_file.read_bytes()
    finally:
        header_file.unlink(missing_ok=True)
    total = len(header) + sum(tensor.padded for tensor in tensors)
    first, offset = _resume_point(partial, header, tensors) if resume else (0, 0)
    if not offset:
        partial.write_bytes(header)
        offset = len(header)
    check_free_space(path.parent, total - offset, f"Writing {path.name}")
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
    partial.replace(path)


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


def _write_header(
    path: Path, arch: str, metadata: Mapping[str, Any], tensors: Sequence[GgufTensor]
) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(bytes(-size % ALIGNMENT))


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


def chunks(array: Chunk, rows: int = 1 << 24) -> Iterator[Chunk]:
    """A large array in pieces of about `rows` bytes along its first axis."""
    step = max(1, rows // max(1, array.nbytes // max(1, len(array))))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """Scalars of the metadata for a model card or a log."""
    return json.dumps({k: v for k, v in metadata.items() if not isinstance(v, list)}, indent=1)
