"""One module per architecture; `architecture(config)` picks it."""

from __future__ import annotations

from typing import cast

from mse_export.backbones import chatglm, llama, qwen, qwen2
from mse_export.backbones.base import Architecture, Config, TensorRecipe
from mse_runtime.errors import BackboneError

__all__ = ["ARCHITECTURES", "Architecture", "Config", "TensorRecipe", "architecture"]

ARCHITECTURES: tuple[Architecture, ...] = tuple(
    cast(Architecture, module) for module in (llama, qwen, qwen2, chatglm)
)


def architecture(config: Config) -> Architecture:
    """The module for a Hugging Face config; `BackboneError` names the supported families."""
    model_type, classes = config.get("model_type"), config.get("architectures") or []
    for module in ARCHITECTURES:
        if model_type in module.MODEL_TYPES and (
            not classes or any(name in module.CLASSES for name in classes)
        ):
            return module
    supported = ", ".join(f"{m.ARCH} ({m.CLASSES[0]})" for m in ARCHITECTURES)
    raise BackboneError(
        f"The folder holds a model of type {model_type!r} with architectures {classes!r}; this "
        f"converter knows {supported}. For any other, convert it with llama.cpp's own tools and "
        "give the result: mse-export --backbone FILE.gguf"
    )
