"""The same bundle with its language model in another quantisation, for comparisons.

The copies lie in the cache folder under the original's hash and may be deleted at any time.
"""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace
from pathlib import Path

from mse_runtime.bundle import Bundle, HubRef
from mse_runtime.cache import cache_dir
from mse_runtime.errors import BackboneError, DeviceError, UsageError
from mse_runtime.gguf import Gguf

__all__ = ["FILE_TYPES", "requantised"]

# llama.cpp's file types by name, most precise first (llama.h, enum llama_ftype).
FILE_TYPES = {
    "f32": 0,
    "bf16": 32,
    "f16": 1,
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q5_k_s": 16,
    "q5_1": 9,
    "q5_0": 8,
    "q4_k_m": 15,
    "q4_k_s": 14,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "q3_k_l": 13,
    "q3_k_m": 12,
    "q3_k_s": 11,
    "q2_k": 10,
}
FULL = ("f32", "bf16", "f16")


def requantised(bundle: Bundle, name: str, *, threads: int = 0) -> tuple[Bundle, str]:
    """`bundle` with its language model as `name`, and a remark ("" where there is none).

    Raises UsageError for an unknown type or one more precise than what the bundle holds,
    DeviceError where the disk is too small, BackboneError where llama.cpp refuses.
    """
    name = name.strip().lower()
    if name not in FILE_TYPES:
        raise UsageError(f"Unknown type {name!r} in --compare; known: {', '.join(FILE_TYPES)}.")
    source = bundle.gguf_path()
    held = _held_type(bundle, source)
    if held == name:
        return bundle, ""
    if name in FULL and held not in FULL:
        raise UsageError(
            f"The bundle holds its language model as {held}, from which {name} cannot be had back. "
            f"Export it as {name} (mse-export --quant {name}) and compare that bundle."
        )
    target = cache_dir() / "quantised" / f"{bundle.backbone.gguf.sha256[:24]}-{name}.gguf"
    if not target.is_file():
        _quantise(source, target, FILE_TYPES[name], threads)
    remark = "" if held in FULL else f"made from {held}, so worse than made from the original"
    place = HubRef("local/cache", "0", target.name, target.stat().st_size, "0" * 64, name)
    backbone = replace(bundle.backbone, gguf=place)
    return replace(bundle, backbone=backbone, hub_gguf=target), remark


def _held_type(bundle: Bundle, source: Path) -> str:
    if bundle.backbone.gguf.type:
        return bundle.backbone.gguf.type.lower()
    with Gguf.open(source) as header:
        return header.weight_type.lower()


def _quantise(source: Path, target: Path, file_type: int, threads: int) -> None:
    from mse_runtime.backbone import library
    from mse_runtime.backbone.reports import log_errors, log_mark

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise DeviceError(
            f"{target.parent} cannot be made ({error.strerror}); comparing needs room for the "
            "quantised copies. Set MSE_CACHE to a folder that can be written."
        ) from error
    if free < source.stat().st_size:
        raise DeviceError(
            f"{target.parent} has {free / 2**30:.1f} GiB free, too little for a copy of {source} "
            f"({source.stat().st_size / 2**30:.1f} GiB). Set MSE_CACHE to a larger disk."
        )
    lib = library.load()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = threads
    parameters.allow_requantize = True
    partial = target.with_name(target.name + ".partial")
    mark = log_mark()
    failed = lib.llama_model_quantize(
        str(source).encode(), str(partial).encode(), ctypes.byref(parameters)
    )
    if failed:
        partial.unlink(missing_ok=True)
        raise BackboneError(
            f"llama.cpp could not quantise {source.name}: "
            f"{log_errors(mark) or 'no reason was given'}. Compare another type."
        )
    partial.replace(target)
