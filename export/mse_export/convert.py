"""A Hugging Face folder becomes a GGUF file in any type, one tensor at a time.

The published code loads the language model in bf16 and then halves it, so its effective weights
are the checkpoint's rounded to bf16 (published-model spec, section 1.6): `round_bf16` does that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as T
from numpy.typing import NDArray

from mse_export import __version__
from mse_export.backbones import TensorRecipe, architecture
from mse_export.encode import as_f32, encode_rows, to_bf16
from mse_export.gguf_write import GgufTensor, claim, gguf_header, write_gguf
from mse_export.hf_folder import HfFolder
from mse_export.quant_types import Quant, tensor_types
from mse_export.synthetic import model_shape
from mse_export.vocab.folder import folder_vocabulary
from mse_export.watcher import Watcher
from mse_runtime.cpu import physical_cores
from mse_runtime.errors import BackboneError

__all__ = ["convert", "convert_and_quantize"]


def convert_and_quantize(
    folder: Path,
    path: Path,
    target: Quant,
    *,
    round_bf16: bool,
    threads: int | None = None,
    watcher: Watcher | None = None,
) -> None:
    """Write `folder`'s model to `path` in the type `target`.

    An interrupted run is continued behind its last whole tensor by the next one with the same
    folder and type; a file that is whole already is left as it is.
    """
    model = HfFolder(folder)
    if not claim(path, _fingerprint(model, target, round_bf16)):
        convert(model, path, target, round_bf16=round_bf16, threads=threads, watcher=watcher)


def _fingerprint(model: HfFolder, target: Quant, round_bf16: bool) -> str:
    """What a half-done conversion must agree on to be continued."""
    files = sorted({tensor.file for tensor in model.tensors.values()})
    facts: list[Any] = [__version__, target.name, round_bf16, model.config]
    facts += [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def convert(
    model: HfFolder,
    path: Path,
    target: Quant,
    *,
    round_bf16: bool,
    threads: int | None = None,
    watcher: Watcher | None = None,
) -> None:
    """Write a GGUF, going on behind the whole tensors of `path`'s `.partial` file if there is one.

    Raises BackboneError for a missing or misshapen tensor before anything is written.
    """
    watcher = watcher or Watcher()
    module = architecture(model.config)
    recipes, arch_metadata = module.tensors(model.config), module.metadata(model.config)
    for recipe in recipes:
        _check_shape(model, recipe)
    vocabulary = folder_vocabulary(model.path, module.ARCH, model.config)
    metadata = {
        "general.name": model.path.resolve().name,
        "general.file_type": target.ftype,
        "general.quantization_version": 2,
        **{f"{module.ARCH}.{key}": value for key, value in arch_metadata.items()},
        **vocabulary.metadata(),
    }
    shape = model_shape(arch_metadata, (recipe.name for recipe in recipes))
    types = tensor_types(recipes, target, shape)
    table = [
        GgufTensor(recipe.name, recipe.shape, kind)
        for recipe, kind in zip(recipes, types, strict=True)
    ]
    count = threads or physical_cores()
    watcher.stage(f"Converting to {target.name}")
    write_gguf(
        path,
        gguf_header(module.ARCH, metadata, table),
        table,
        lambda i: _converted(model, recipes[i], types[i], round_bf16, count),
        progress=watcher.progress,
        resume=True,
    )


def _check_shape(model: HfFolder, recipe: TensorRecipe) -> None:
    if recipe.values is not None:
        return
    stored = model.tensors.get(recipe.source)
    if stored is None:
        raise BackboneError(
            f"{model.path} has no tensor {recipe.source!r}. A weight file is missing, or the model "
            "is of another family than its config.json says; download it again."
        )
    if stored.shape != recipe.shape:
        raise BackboneError(
            f"{model.path}: tensor {recipe.source!r} has shape {list(stored.shape)}, but "
            f"config.json implies {list(recipe.shape)}. They do not belong together."
        )


def _converted(
    model: HfFolder, recipe: TensorRecipe, kind: T, round_bf16: bool, threads: int
) -> Iterator[NDArray[Any]]:
    """A tensor's bytes in the target type, some rows at a time."""
    if recipe.values is not None:
        yield np.array(recipe.values, np.float32)
        return
    values, dtype = model.read(recipe.source)
    if recipe.interleave_heads:
        values = _interleaved(values, recipe.interleave_heads)
    rounding = round_bf16 and dtype != "BF16"
    if kind.name == dtype and not rounding:
        yield values
        return

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        found = as_f32(values[start:stop], dtype)
        return as_f32(to_bf16(found), "BF16") if rounding else found

    values = values.reshape(-1, values.shape[-1])
    shape = (values.shape[0], values.shape[1])
    yield from encode_rows(rows, shape, kind, recipe.source, threads)


def _interleaved(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head from (first halves, second halves) to (pair, pair, ...)."""
    rest = values.shape[1:]
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *rest)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
