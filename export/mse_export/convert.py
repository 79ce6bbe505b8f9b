"""A Hugging Face folder becomes a GGUF file, one tensor at a time, then is quantised.

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

from mse_export.backbones import TensorRecipe, architecture
from mse_export.gguf_write import GgufTensor, check_free_space, write_gguf
from mse_export.hf_folder import HfFolder
from mse_export.quant_types import QUANTS, Quant, file_bytes, tensor_types
from mse_export.quantize import quantize
from mse_export.synthetic import model_shape
from mse_export.vocab.folder import folder_vocabulary
from mse_export.watcher import Watcher
from mse_runtime.errors import BackboneError

__all__ = ["convert", "convert_and_quantize"]

ROWS_BYTES = 64 << 20  # converted at once


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

    The unquantised file lies beside it under a name that depends on the source; it is kept if the
    run is interrupted, and continued by the next. Free disk space is checked for both first.
    """
    watcher = watcher or Watcher()
    model = HfFolder(folder)
    unquantised = target.base in (T.F32, T.F16, T.BF16)
    plain = target if unquantised else QUANTS["bf16" if round_bf16 else model.common_dtype.lower()]
    recipes, _, shape = _plan(model)
    needed = sum(
        file_bytes(recipes, tensor_types(recipes, kind, shape)) for kind in {plain, target}
    )
    middle = path.with_name(f"unquantised-{_fingerprint(model, plain, round_bf16)}.gguf")
    if not middle.is_file():
        _forget_others(path.parent, middle)
        check_free_space(path.parent, needed, "Converting and quantising the model")
        convert(model, middle, plain, round_bf16=round_bf16, watcher=watcher)
    if unquantised:
        middle.replace(path)
        return
    watcher.stage(f"Quantising to {target.name}")
    quantize(middle, path, target, threads=threads, progress=watcher.progress)
    middle.unlink()


def _forget_others(folder: Path, keep: Path) -> None:
    """Half-done conversions of other models or types in the same work folder."""
    for path in folder.glob("unquantised-*.gguf*"):
        if not path.name.startswith(keep.name):
            path.unlink()


def _fingerprint(model: HfFolder, target: Quant, round_bf16: bool) -> str:
    """What a half-done conversion must agree on to be continued."""
    files = sorted({tensor.file for tensor in model.tensors.values()})
    facts: list[Any] = [target.name, round_bf16, model.config]
    facts += [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _plan(model: HfFolder) -> tuple[list[TensorRecipe], dict[str, Any], Any]:
    module = architecture(model.config)
    recipes, metadata = module.tensors(model.config), module.metadata(model.config)
    return recipes, metadata, model_shape(metadata, (recipe.name for recipe in recipes))


def convert(
    model: HfFolder,
    path: Path,
    target: Quant,
    *,
    round_bf16: bool,
    watcher: Watcher | None = None,
) -> None:
    """Write an unquantised GGUF (f32, f16 or bf16), resuming an interrupted one.

    Raises BackboneError for a missing or misshapen tensor before anything is written.
    """
    watcher = watcher or Watcher()
    module = architecture(model.config)
    recipes, arch_metadata, shape = _plan(model)
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
    types = tensor_types(recipes, target, shape)
    table = [
        GgufTensor(recipe.name, recipe.shape, kind)
        for recipe, kind in zip(recipes, types, strict=True)
    ]
    watcher.stage(f"Converting to {target.name}")
    write_gguf(
        path,
        module.ARCH,
        metadata,
        table,
        lambda i: _converted(model, recipes[i], types[i], round_bf16),
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
    model: HfFolder, recipe: TensorRecipe, kind: T, round_bf16: bool
) -> Iterator[NDArray[Any]]:
    """A tensor's bytes in the target type, some rows at a time."""
    if recipe.values is not None:
        yield np.array(recipe.values, np.float32)
        return
    values, dtype = model.read(recipe.source)
    if recipe.interleave_heads:
        values = _interleaved(values, recipe.interleave_heads)
    same = {"F32": T.F32, "F16": T.F16, "BF16": T.BF16}[dtype] == kind
    rounding = round_bf16 and dtype != "BF16" and not recipe.keeps_f32
    if same and not rounding:
        yield values
        return
    step = max(1, ROWS_BYTES // max(1, values[:1].size * 4))
    for start in range(0, len(values), step):
        rows = _as_f32(values[start : start + step], dtype)
        if round_bf16:
            rows = _as_f32(_to_bf16(rows), "BF16")
        yield _to_type(rows, kind, recipe)


def _interleaved(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head from (first halves, second halves) to (pair, pair, ...)."""
    rest = values.shape[1:]
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *rest)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _as_f32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _to_type(rows: NDArray[np.float32], kind: T, recipe: TensorRecipe) -> NDArray[Any]:
    if not np.isfinite(rows).all():
        raise BackboneError(
            f"The tensor {recipe.source!r} holds NaN or infinity. The weights are damaged: "
            "download them again."
        )
    if kind == T.BF16:
        return _to_bf16(rows)
    if kind == T.F32:
        return rows
    if np.abs(rows).max(initial=0.0) > np.finfo(np.float16).max:
        raise BackboneError(
            f"The tensor {recipe.source!r} has values that F16 cannot hold. Use --quant bf16."
        )
    return rows.astype(np.float16)
