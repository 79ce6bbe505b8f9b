"""Which ggml type each tensor gets under a quantisation, and so how large the file will be.

Nominal bits mislead: K-quants mix types by layer, fall back where the columns are not a multiple
of 256 (Qwen-1.8B's 5504, ChatGLM3's 13696) and give the output matrix more bits. The rules here
restate llama.cpp's quantiser for dense decoders without an importance matrix; a test quantises
models of each architecture and compares every tensor's type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as T

from mse_export.backbones.base import TensorRecipe
from mse_runtime.errors import UsageError

__all__ = ["QUANTS", "Quant", "Shape", "file_bytes", "quant", "tensor_bytes", "tensor_types"]

ALIGNMENT = 32


@dataclass(frozen=True)
class Quant:
    """A file type: llama.cpp's number, and the type that most matrices get."""

    name: str
    ftype: int
    base: T


QUANTS: dict[str, Quant] = {
    name: Quant(name, ftype, base)
    for name, ftype, base in (
        ("f32", 0, T.F32),
        ("f16", 1, T.F16),
        ("bf16", 32, T.BF16),
        ("q8_0", 7, T.Q8_0),
        ("q6_k", 18, T.Q6_K),
        ("q5_k_m", 17, T.Q5_K),
        ("q5_k_s", 16, T.Q5_K),
        ("q5_1", 9, T.Q5_1),
        ("q5_0", 8, T.Q5_0),
        ("q4_k_m", 15, T.Q4_K),
        ("q4_k_s", 14, T.Q4_K),
        ("q4_1", 3, T.Q4_1),
        ("q4_0", 2, T.Q4_0),
        ("iq4_nl", 25, T.IQ4_NL),
        ("iq4_xs", 30, T.IQ4_XS),
        ("q3_k_l", 13, T.Q3_K),
        ("q3_k_m", 12, T.Q3_K),
        ("q3_k_s", 11, T.Q3_K),
        ("q2_k", 10, T.Q2_K),
    )
}

_FALLBACK = {
    T.IQ4_XS: T.IQ4_NL,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
_UNQUANTISED = (T.F32, T.F16, T.BF16)


@dataclass(frozen=True)
class Shape:
    """What the rules ask about a model."""

    n_layer: int
    gqa: int
    """Query heads per key-value head."""
    tied: bool
    """The output matrix is the embedding table."""


def quant(name: str) -> Quant:
    """The quantisation called `name`; `UsageError` names the known ones."""
    found = QUANTS.get(name.lower())
    if found is None:
        raise UsageError(f"Unknown quantisation {name!r}. Known: {', '.join(QUANTS)}.")
    return found


def tensor_types(recipes: Sequence[TensorRecipe], target: Quant, shape: Shape) -> list[T]:
    """The type of each tensor, in the recipes' order."""
    return [_tensor_type(recipe, target, shape) for recipe in recipes]


def _tensor_type(recipe: TensorRecipe, target: Quant, shape: Shape) -> T:
    if recipe.keeps_f32:
        return T.F32
    if target.base in _UNQUANTISED:
        return target.base
    chosen = _mixture(recipe.name, recipe.shape[-1], target, shape)
    columns = recipe.shape[-1]
    if columns % GGML_QUANT_SIZES[chosen][0] == 0:
        return chosen
    chosen = _FALLBACK.get(chosen, chosen)
    return chosen if columns % GGML_QUANT_SIZES[chosen][0] == 0 else T.F16


def _mixture(name: str, columns: int, target: Quant, shape: Shape) -> T:
    base, kind = target.base, target.name
    if name == "output.weight" or (shape.tied and name == "token_embd.weight"):
        if columns % GGML_QUANT_SIZES[base][0]:
            return T.Q8_0
        return base if base == T.Q8_0 else T.Q6_K
    if not name.startswith("blk."):
        return base
    layer, part = int(name.split(".")[1]), name.split(".")[2]
    n = shape.n_layer
    more = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
    if part in ("attn_v", "attn_qkv"):
        return _value_type(kind, base, layer, shape.gqa, more)
    if part == "ffn_down":
        return _down_type(kind, base, layer, n, more)
    if part == "attn_output":
        return {"q2_k": T.Q3_K, "q3_k_m": T.Q4_K, "q3_k_l": T.Q5_K}.get(kind, base)
    return base


def _value_type(kind: str, base: T, layer: int, gqa: int, more: bool) -> T:
    """The value projection is the most sensitive; fused QKV counts as one."""
    if kind == "q2_k":
        return T.Q4_K if gqa >= 4 else T.Q3_K
    if kind == "q3_k_m":
        return T.Q5_K if layer < 2 else T.Q4_K
    if kind == "q3_k_l" or (kind == "q4_k_s" and layer < 4):
        return T.Q5_K
    if kind in ("iq4_nl", "iq4_xs") and gqa >= 4:
        return T.Q5_K
    if kind in ("q4_k_m", "q5_k_m") and more:
        return T.Q6_K
    return base


def _down_type(kind: str, base: T, layer: int, n: int, more: bool) -> T:
    if kind == "q2_k":
        return T.Q3_K
    if kind == "q3_k_m":
        return T.Q5_K if layer < n // 16 else T.Q4_K
    if kind == "q3_k_l" or (kind in ("q4_k_s", "iq4_nl", "iq4_xs") and layer < n // 8):
        return T.Q5_K
    if kind in ("q4_k_m", "q5_k_m") and more:
        return T.Q6_K
    return base


def tensor_bytes(shape: Sequence[int], kind: T) -> int:
    """Bytes of a tensor without padding."""
    block, size = (int(n) for n in GGML_QUANT_SIZES[kind])
    return math.prod(shape) // block * size


def file_bytes(recipes: Sequence[TensorRecipe], types: Sequence[T]) -> int:
    """Bytes of the tensor data, each padded; the header comes on top."""
    total = 0
    for recipe, kind in zip(recipes, types, strict=True):
        size = tensor_bytes(recipe.shape, kind)
        total += size + -size % ALIGNMENT
    return total
