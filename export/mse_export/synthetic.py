"""Shape-true random backbones, written directly in the quantised type.

They answer nonsense at exactly the speed and memory of the real model, so anyone can measure
Llama-2-7B, Qwen-1.8B or ChatGLM3-6B without downloading it. Norms are 1 and every matrix has
variance 1 / columns, so activations stay finite through any depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as T

from mse_export.backbones import Config, architecture
from mse_export.gguf_write import GgufTensor, Progress, gguf_header, write_gguf
from mse_export.quant_types import Quant, Shape, tensor_types
from mse_export.random_weights import random_blocks
from mse_export.vocab import Vocabulary
from mse_export.vocab import synthetic as made_up

__all__ = ["model_shape", "write_synthetic"]

EMBEDDING_DEVIATION = 0.02  # about what trained tables have


def model_shape(metadata: dict[str, Any], tensor_names: Iterable[str]) -> Shape:
    """What the quantisation rules ask, from an architecture's metadata."""
    return Shape(
        n_layer=metadata["block_count"],
        gqa=metadata["attention.head_count"] // metadata["attention.head_count_kv"],
        tied="output.weight" not in set(tensor_names),
    )


def _vocabulary(arch: str, config: Config) -> Vocabulary:
    size = int(config.get("padded_vocab_size") or config["vocab_size"])
    if arch == "chatglm":
        names = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
        roles = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
        first = min(64789, size - 16)
        control = {name: first + i for i, name in enumerate(names + roles)}
        return made_up.sentencepiece(size, control, size - first - len(control), add_bos=False)
    if arch == "llama" and size < 100_000:
        return made_up.sentencepiece(size)
    if arch == "llama":
        special = {"<|begin_of_text|>": 128_000, "<|end_of_text|>": 128_001}
        return made_up.bpe(size, special, "llama-bpe", {"bos": 128_000, "eos": 128_001})
    end = min(151_643, size - 3)
    special = {"<|endoftext|>": end, "<|im_start|>": end + 1, "<|im_end|>": end + 2}
    return made_up.bpe(size, special, "qwen2", {"bos": end, "eos": end, "padding": end})


def write_synthetic(
    path: Path,
    config: Config,
    target: Quant,
    *,
    name: str,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write a random GGUF of the config's exact shape to `path` (atomic).

    config: a Hugging Face config.json. Raises DeviceError when the disk is too small.
    """
    module = architecture(config)
    recipes = module.tensors(config)
    arch_metadata = module.metadata(config)
    shape = model_shape(arch_metadata, (recipe.name for recipe in recipes))
    types = tensor_types(recipes, target, shape)
    metadata = {
        "general.name": f"{name} (synthetic)",
        "general.description": "Random weights of a real shape, for measuring speed and memory",
        "general.file_type": target.ftype,
        "general.quantization_version": 2,
        **{f"{module.ARCH}.{key}": value for key, value in arch_metadata.items()},
        **_vocabulary(module.ARCH, config).metadata(),
    }
    table = [
        GgufTensor(recipe.name, recipe.shape, kind)
        for recipe, kind in zip(recipes, types, strict=True)
    ]
    rng = np.random.default_rng(seed)

    def data(i: int) -> Iterable[Any]:
        recipe, kind = recipes[i], types[i]
        if recipe.values is not None:
            return [np.array(recipe.values, np.float32)]
        if recipe.name.endswith("_norm.weight"):
            return [np.ones(recipe.shape, np.float32)]
        if kind == T.F32 and recipe.keeps_f32:
            return [np.zeros(recipe.shape, np.float32)]
        deviation = 1 / math.sqrt(recipe.shape[-1])
        if recipe.name == "token_embd.weight":
            deviation = EMBEDDING_DEVIATION
        return random_blocks(rng, recipe.shape, kind, deviation)

    header = gguf_header(module.ARCH, metadata, table)
    write_gguf(path, header, table, data, progress=progress)
