"""Hugging Face model folders, read one tensor at a time.

Tensors are read with plain file reads, not mapped: a mapped 13 GB file counts as resident memory
while it is walked through, a read buffer does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import BackboneError

__all__ = ["HfFolder", "StoredTensor", "missing_shards", "read_config"]

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `dtype` is F32, F16 or BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype]


class _Shards(Protocol):
    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def read(self, tensor: StoredTensor) -> NDArray[Any]: ...


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; BackboneError where it is missing or broken."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BackboneError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder. Give the "
            "folder that holds config.json, the weights and the tokeniser."
        ) from error
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} cannot be read ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise BackboneError(f"{path} is not a JSON object. Download it again.")
    return config


def missing_shards(files: list[Path]) -> list[str]:
    """Names of shards that must exist beside `files`, by the numbers in their names."""
    there = {path.name for path in files}
    wanted = set()
    for name in there:
        if found := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", name):
            stem, count, suffix = found.groups()
            wanted |= {f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)}
    return sorted(wanted - there)


class HfFolder:
    """A folder's config and tensors: `tensors` by name, `read(name)` as float bits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self._shards = self._open()
        self.tensors = self._shards.tensors

    def _open(self) -> _Shards:
        for suffix, pattern in (("safetensors", "*.safetensors"), ("bin", "pytorch_model*.bin")):
            found = sorted(self.path.glob(pattern))
            index = sorted(self.path.glob(f"*.{suffix}.index.json"))
            if index:
                found = self._indexed(index[0])
            if found:
                return _Safetensors(found) if suffix == "safetensors" else _TorchFiles(found)
        raise BackboneError(
            f"{self.path} has no weights (*.safetensors or pytorch_model*.bin). Download them into "
            "the folder."
        )

    def _indexed(self, index: Path) -> list[Path]:
        """The shards that an index names, every one of which must be there."""
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise BackboneError(f"{index} is not a shard index. Download it again.") from error
        paths = [index.parent / Path(name).name for name in sorted(names)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise BackboneError(
                f"{index.parent} lacks {len(missing)} of {len(paths)} weight files, first "
                f"{missing[0]}. Download the folder again (the download may have been cut short)."
            )
        return paths

    def read(self, name: str) -> tuple[NDArray[Any], str]:
        """A tensor's values as stored and its dtype; BF16 comes as uint16 bits."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BackboneError(
                f"{self.path} has no tensor {name!r}. The weights are incomplete, or the model is "
                "of another family than its config.json says."
            )
        return self._shards.read(tensor), tensor.dtype

    @property
    def common_dtype(self) -> str:
        """The dtype that holds most of the bytes."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        return max(sizes, key=lambda dtype: sizes[dtype])


class _Safetensors:
    """Headers of all shards, read by hand: 8 bytes of length, JSON, then raw tensors."""

    def __init__(self, paths: list[Path]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        for path in paths:
            self.tensors.update(_header(path))

    def read(self, tensor: StoredTensor) -> NDArray[Any]:
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.dtype]
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            values = np.fromfile(file, dtype=kind, count=math.prod(tensor.shape))
        return values.reshape(tensor.shape)


def _header(path: Path) -> dict[str, StoredTensor]:
    def broken(what: str) -> BackboneError:
        return BackboneError(f"{path} is not a usable safetensors file: {what}. Download it again.")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            raise broken("its header is cut off")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise broken("its header is not JSON") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"the entry of {name!r} is malformed") from error
        if dtype not in _DTYPES:
            continue  # integer buffers; a weight of such a type is reported as missing
        tensor = StoredTensor(name, dtype, shape, path, 8 + length + start)
        if end - start != tensor.size or start < 0:
            raise broken(f"{name!r} does not have the bytes of its shape")
        if tensor.offset + tensor.size > size:
            raise broken(
                f"it is truncated, {name!r} ends at {tensor.offset + tensor.size} of {size}"
            )
        tensors[name] = tensor
    return tensors


class _TorchFiles:
    """`pytorch_model*.bin` shards, mapped and opened with weights_only."""

    def __init__(self, paths: list[Path]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._open_path: Path | None = None
        self._loaded: dict[str, Any] = {}
        import torch

        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        for path in paths:
            for name, value in self._load(path).items():
                dtype = names.get(value.dtype) if isinstance(value, torch.Tensor) else None
                if dtype is not None:
                    self.tensors[name] = StoredTensor(name, dtype, tuple(value.shape), path)

    def _load(self, path: Path) -> dict[str, Any]:
        import pickle

        import torch

        if self._open_path != path:
            try:
                self._loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
                reason = (str(error).splitlines() or ["?"])[0]
                raise BackboneError(
                    f"{path} cannot be read safely as weights ({reason}). Download it again, or "
                    "convert it to safetensors."
                ) from error
            self._open_path = path
        return self._loaded

    def read(self, tensor: StoredTensor) -> NDArray[Any]:
        import torch

        value = self._load(tensor.file)[tensor.name].contiguous()
        if tensor.dtype == "BF16":
            return np.asarray(value.view(torch.int16).numpy()).view(np.uint16)
        return np.asarray(value.numpy())
