"""A ready GGUF in another type: its header copied entry by entry, its matrices encoded anew.

Tensor by tensor and resumable, with ggml's own quantiser and the rules of `quant_types`: for the
architectures that this package converts, the file is the one that llama.cpp's own tool writes (a
test compares the bytes).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as T
from numpy.typing import NDArray

from mse_export import __version__
from mse_export.backbones import TensorRecipe
from mse_export.encode import as_f32, encode_rows
from mse_export.gguf_write import GgufTensor, Progress, claim, padded, write_gguf
from mse_export.quant_types import Quant, Shape, tensor_types
from mse_runtime.cpu import physical_cores
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf, TensorInfo
from mse_runtime.gguf_scan import ARRAY, MAGIC, Scan

__all__ = ["predicted_bytes", "quantize"]

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_U32 = 4  # GGUF's number for it

KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight",
    "attn_rel_b.weight", "ssm_conv1d", "shortconv.conv", "time_mix_", "altup", "laurel",
    "per_layer_model_proj",
)  # fmt: skip
"""Names of matrices that stay as they are: routers, positions, small mixers (as in llama.cpp)."""


@dataclass(frozen=True)
class _Plan:
    header: bytes
    infos: list[TensorInfo]
    table: list[GgufTensor]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(tensor.padded for tensor in self.table)


def predicted_bytes(source: Path, target: Quant) -> int:
    """Size of the file that `quantize` will write."""
    return _plan(source, target).bytes


def quantize(
    source: Path,
    path: Path,
    target: Quant,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `source` in the type `target` to `path`, going on where an interrupted call stopped.

    The final name appears when the file is whole. Raises DeviceError where the disk is too small,
    BackboneError for a file that is quantised already or damaged.
    """
    plan = _plan(source, target)
    status = source.stat()
    facts = [__version__, target.name, source.name, status.st_size, status.st_mtime_ns]
    if claim(path, hashlib.sha256(json.dumps(facts).encode()).hexdigest()):
        return
    count = threads or physical_cores()
    write_gguf(
        path,
        plan.header,
        plan.table,
        lambda i: _encoded(source, plan.infos[i], plan.table[i].type, count),
        progress=progress,
        resume=True,
    )


def _plan(source: Path, target: Quant) -> _Plan:
    with Gguf.open(source) as header:
        infos = list(header.tensors.values())
        changing = [info for info in infos if _changes(info)]
        recipes = [TensorRecipe(info.name, info.shape, "") for info in changing]
        shape = Shape(
            n_layer=header.n_layer,
            gqa=header.n_head // max(1, header.n_head_kv),
            tied="output.weight" not in header.tensors,
        )
        types = dict(
            zip((info.name for info in changing), tensor_types(recipes, target, shape), strict=True)
        )
    table = [GgufTensor(i.name, i.shape, types.get(i.name, T[i.type])) for i in infos]
    for info, tensor in zip(infos, table, strict=True):
        if info.type not in FLOATS and tensor.type.name != info.type:
            raise BackboneError(
                f"{source} is quantised already ({info.type}); {target.name} on top of it would "
                "lose twice. Give the F16, BF16 or F32 file of the model, or leave --quant out to "
                "take this one as it is."
            )
    return _Plan(_header(source, table, target), infos, table)


def _changes(info: TensorInfo) -> bool:
    """Whether a tensor takes the new type: matrices of weights, in the main."""
    if len(info.shape) < 2 or not info.name.endswith("weight"):
        return False
    return not any(part in info.name for part in KEPT)


def _header(source: Path, table: list[GgufTensor], target: Quant) -> bytes:
    """The source's metadata byte for byte, but the file type, and the new tensor table."""
    entries: list[bytes] = []
    own = {"general.file_type": target.ftype, "general.quantization_version": 2}
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scan = Scan(data, source)
        scan.need(16, "the header")
        for _ in range(scan.u64("the header")):
            start = scan.at
            key = scan.text("a metadata key")
            kind = scan.u32("a metadata entry")
            if kind == ARRAY:
                scan.skip_array(scan.at, "a metadata array")
            else:
                scan.scalar(kind, "a metadata entry")
            if key not in (*own, "general.alignment"):
                entries.append(data[start : scan.at])
    entries += [_text(key) + struct.pack("<II", _U32, value) for key, value in own.items()]
    offset, infos = 0, []
    for tensor in table:
        dims = tensor.shape[::-1]
        where = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, int(tensor.type), offset)
        infos.append(_text(tensor.name) + where)
        offset += tensor.padded
    start_of_file = MAGIC + struct.pack("<IQQ", 3, len(infos), len(entries))
    return padded(b"".join([start_of_file, *entries, *infos]))


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encoded(source: Path, info: TensorInfo, kind: T, threads: int) -> Iterator[NDArray[Any]]:
    if info.type == kind.name:
        yield from _copied(source, info)
        return
    columns = info.shape[-1]
    dtype = np.dtype(FLOATS[info.type])

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        values = _read(source, info, dtype, start * columns, (stop - start) * columns)
        return as_f32(values, info.type).reshape(-1, columns)

    shape = (info.elements // columns, columns)
    yield from encode_rows(rows, shape, kind, info.name, threads)


def _copied(source: Path, info: TensorInfo, step: int = 16 << 20) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, info.size, step):
        yield _read(source, info, np.dtype(np.uint8), start, min(step, info.size - start))


def _read(
    source: Path, info: TensorInfo, dtype: np.dtype[Any], first: int, count: int
) -> NDArray[Any]:
    """`count` elements of a tensor's bytes from the `first` on; a plain read, not a mapping."""
    with source.open("rb") as file:
        file.seek(info.offset + first * dtype.itemsize)
        return np.fromfile(file, dtype=dtype, count=count)
