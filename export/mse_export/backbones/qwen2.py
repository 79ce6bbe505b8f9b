"""Qwen 2 and 2.5: Llama's shape with query, key and value biases and half-split rotary rows."""

from __future__ import annotations

from typing import Any

from mse_export.backbones import llama
from mse_export.backbones.base import Config, TensorRecipe, refuse

ARCH = "qwen2"
MODEL_TYPES: tuple[str, ...] = ("qwen2",)
CLASSES: tuple[str, ...] = ("Qwen2ForCausalLM",)


def metadata(config: Config) -> dict[str, Any]:
    """GGUF keys without the `qwen2.` prefix."""
    if config.get("use_sliding_window"):
        raise refuse("sliding-window attention")
    if config.get("rope_scaling"):
        raise refuse("rotary scaling")
    return llama.metadata(config)


def tensors(config: Config) -> list[TensorRecipe]:
    """Every tensor, in file order."""
    return llama.decoder(config, interleave=False, qkv_bias=True)
