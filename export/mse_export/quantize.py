"""Quantising a GGUF in this process, through llama.cpp's own quantiser.

The call runs on a thread of its own so that Ctrl-C works and progress can be told from the size of
the growing file, which is known beforehand from the tensor table.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

from mse_export.backbones import TensorRecipe
from mse_export.gguf_write import Progress, check_free_space
from mse_export.quant_types import Quant, Shape, file_bytes, tensor_types
from mse_runtime.errors import BackboneError, DeviceError

__all__ = ["predicted_bytes", "quantize"]

POLL_SECONDS = 0.1


def predicted_bytes(source: Path, target: Quant) -> int:
    """Size of the quantised file, from the source's tensor table."""
    from mse_runtime.gguf import Gguf

    with Gguf.open(source) as header:
        infos = list(header.tensors.values())
        recipes = [TensorRecipe(info.name, info.shape, "") for info in infos]
        shape = Shape(
            n_layer=header.n_layer,
            gqa=header.n_head // max(1, header.n_head_kv),
            tied="output.weight" not in header.tensors,
        )
        start = min(info.offset for info in infos)
    return start + file_bytes(recipes, tensor_types(recipes, target, shape))


def quantize(
    source: Path,
    path: Path,
    target: Quant,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `source` quantised to `path`; the final name appears when the file is whole.

    Raises DeviceError where the disk is too small, BackboneError where llama.cpp refuses, with its
    own words.
    """
    from mse_runtime.backbone import library

    predicted = predicted_bytes(source, target)
    check_free_space(path.parent, predicted, f"Quantising to {target.name}")
    lib = library.load()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = target.ftype
    parameters.nthread = threads or 0
    # Slabs instead of whole tensors: the peak stays far below the largest tensor in float32.
    parameters.max_buf_size = 256 << 20
    partial = path.with_name(path.name + ".partial")
    mark = library.log_mark()
    outcome: list[int] = []

    def run() -> None:
        outcome.append(
            lib.llama_model_quantize(
                str(source).encode(), str(partial).encode(), ctypes.byref(parameters)
            )
        )

    worker = threading.Thread(target=run, name="mse-export-quantise", daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(POLL_SECONDS)
        if progress is not None:
            progress(_size(partial), predicted)
    if outcome != [0]:
        partial.unlink(missing_ok=True)
        raise _failed(path, library.log_errors(mark), predicted)
    partial.replace(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _failed(path: Path, words: str, predicted: int) -> Any:
    try:
        check_free_space(path.parent, predicted, "Quantising")
    except DeviceError as error:
        return error
    if "basic_ios" in words or "iostream" in words:
        return DeviceError(
            f"Writing {path} failed half-way ({words}): the disk is full or a quota was reached. "
            "Free some space or choose another disk with -o, and run the same command again."
        )
    return BackboneError(
        f"llama.cpp could not quantise {path.name}: {words or 'no reason was given'}. Try another "
        "--quant, such as q8_0 or f16."
    )
