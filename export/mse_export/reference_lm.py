"""A plain forward pass over a Hugging Face folder, layer by layer, in float32.

The yardstick for converted models: written from the architectures' equations, not from llama.cpp,
it reads one layer's weights at a time, so a 7B model is checked within a few gigabytes. Covers
Llama 2/3, Qwen 2, Qwen (published-model spec, section 3.2) and ChatGLM3 (section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mse_export.backbones import architecture
from mse_export.backbones.base import number, rope_inverse_factors
from mse_export.hf_folder import HfFolder
from mse_runtime.errors import BackboneError

__all__ = ["ReferenceLM"]

Weights = Callable[[str], Tensor]


@dataclass(frozen=True)
class _Layer:
    """One decoder layer's weights: q, k, v as (matrix, bias), gate and up separate."""

    attn_norm: Tensor
    qkv: tuple[tuple[Tensor, Tensor | None], ...]
    out: Tensor
    out_bias: Tensor | None
    ffn_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class _Dims:
    width: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    epsilon: float
    rope_dim: int
    rope_base: float
    interleaved: bool
    factors: tuple[float, ...] | None = None


class ReferenceLM:
    """Logits for a sequence of embedding rows.

    round_bf16: weights rounded to bf16 first, as the published code loads them (spec, 1.6).
    rope_bf16: cosines and sines rounded to bf16 too. The published Llama 2 and Qwen 2 runs have
    such a table, because it is made while the model is loaded as bf16: it moves logits by some
    0.02 to 0.04, and with it this class equals the published logits to 2e-5.
    """

    def __init__(
        self, folder: HfFolder, *, round_bf16: bool = False, rope_bf16: bool = False
    ) -> None:
        self.folder = folder
        self.round_bf16 = round_bf16
        self.rope_bf16 = rope_bf16
        self.arch = architecture(folder.config).ARCH
        self.dims = _dims(folder, self.arch)

    def embed(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """Rows [n, D] of the input table."""
        name = architecture(self.folder.config).tensors(self.folder.config)[0].source
        return np.asarray(self._weight(name)[torch.as_tensor(np.asarray(ids, np.int64))].numpy())

    @torch.inference_mode()
    def logits(self, rows: NDArray[np.float32], last: int = 1) -> NDArray[np.float32]:
        """Logits [last, n_vocab] of the last positions, for rows [L, D] at positions 0..L-1."""
        x = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
        turn = _rotation(self.dims, len(rows), self.rope_bf16)
        mask = torch.full((len(rows), len(rows)), -math.inf).triu(1)
        for i in range(self.dims.layers):
            layer = self._layer(i)
            x = x + _attention(self.dims, layer, _norm(x, layer.attn_norm, self.dims), turn, mask)
            h = _norm(x, layer.ffn_norm, self.dims)
            x = x + (torch.nn.functional.silu(h @ layer.gate.T) * (h @ layer.up.T)) @ layer.down.T
        norm, head = _ends(self.folder, self.arch)
        x = _norm(x[-last:], self._weight(norm), self.dims)
        return np.asarray((x @ self._weight(head).T).numpy())

    def _weight(self, name: str) -> Tensor:
        values, dtype = self.folder.read(name)
        if dtype == "BF16":
            bits = torch.from_numpy(values.view(np.int16))
            return bits.view(torch.bfloat16).float()
        tensor = torch.from_numpy(values).float()
        if self.round_bf16:
            tensor = tensor.bfloat16().float()
        return tensor

    def _optional(self, name: str) -> Tensor | None:
        return self._weight(name) if name in self.folder.tensors else None

    def _layer(self, i: int) -> _Layer:
        dims = self.dims
        if self.arch in ("llama", "qwen2"):
            at = f"model.layers.{i}"
            qkv = tuple(
                (
                    self._weight(f"{at}.self_attn.{letter}_proj.weight"),
                    self._optional(f"{at}.self_attn.{letter}_proj.bias"),
                )
                for letter in "qkv"
            )
            return _Layer(
                self._weight(f"{at}.input_layernorm.weight"),
                qkv,
                self._weight(f"{at}.self_attn.o_proj.weight"),
                self._optional(f"{at}.self_attn.o_proj.bias"),
                self._weight(f"{at}.post_attention_layernorm.weight"),
                self._weight(f"{at}.mlp.gate_proj.weight"),
                self._weight(f"{at}.mlp.up_proj.weight"),
                self._weight(f"{at}.mlp.down_proj.weight"),
            )
        sizes = [dims.heads * dims.head, *[dims.kv_heads * dims.head] * 2]
        if self.arch == "qwen":
            at = f"transformer.h.{i}"
            return _Layer(
                self._weight(f"{at}.ln_1.weight"),
                self._fused(f"{at}.attn.c_attn", sizes),
                self._weight(f"{at}.attn.c_proj.weight"),
                None,
                self._weight(f"{at}.ln_2.weight"),
                self._weight(f"{at}.mlp.w2.weight"),
                self._weight(f"{at}.mlp.w1.weight"),
                self._weight(f"{at}.mlp.c_proj.weight"),
            )
        at = f"transformer.encoder.layers.{i}"
        gate, up = self._weight(f"{at}.mlp.dense_h_to_4h.weight").chunk(2)
        return _Layer(
            self._weight(f"{at}.input_layernorm.weight"),
            self._fused(f"{at}.self_attention.query_key_value", sizes),
            self._weight(f"{at}.self_attention.dense.weight"),
            None,
            self._weight(f"{at}.post_attention_layernorm.weight"),
            gate,
            up,
            self._weight(f"{at}.mlp.dense_4h_to_h.weight"),
        )

    def _fused(self, name: str, sizes: list[int]) -> tuple[tuple[Tensor, Tensor | None], ...]:
        weights = torch.split(self._weight(f"{name}.weight"), sizes)
        bias = self._optional(f"{name}.bias")
        biases = torch.split(bias, sizes) if bias is not None else (None,) * 3
        return tuple(zip(weights, biases, strict=True))


def _ends(folder: HfFolder, arch: str) -> tuple[str, str]:
    """Names of the final norm and of the output matrix."""
    recipes = architecture(folder.config).tensors(folder.config)
    norm = next(r.source for r in recipes if r.name == "output_norm.weight")
    head = [r.source for r in recipes if r.name == "output.weight"] or [recipes[0].source]
    return norm, head[0]


def _dims(folder: HfFolder, arch: str) -> _Dims:
    config = folder.config
    values = architecture(config).metadata(config)
    heads = values["attention.head_count"]
    head = values.get("attention.key_length", values["embedding_length"] // heads)
    scaling = config.get("rope_scaling") or {}
    if arch == "qwen" and config.get("use_dynamic_ntk") and values["context_length"] > 8192:
        raise BackboneError("The reference has no dynamic NTK scaling; use --no-verify.")
    return _Dims(
        width=values["embedding_length"],
        heads=heads,
        kv_heads=values["attention.head_count_kv"],
        head=head,
        layers=values["block_count"],
        epsilon=values["attention.layer_norm_rms_epsilon"],
        rope_dim=values["rope.dimension_count"],
        rope_base=float(number(values, "rope.freq_base")),
        interleaved=arch == "chatglm",
        factors=rope_inverse_factors(config, head) if scaling else None,
    )


def _norm(x: Tensor, weight: Tensor, dims: _Dims) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + dims.epsilon) * weight


def _rotation(dims: _Dims, length: int, rounded: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [length, rope_dim / 2]."""
    exponents = torch.arange(0, dims.rope_dim, 2, dtype=torch.float32) / dims.rope_dim
    frequencies = 1.0 / dims.rope_base**exponents
    if dims.factors is not None:
        frequencies = frequencies / torch.tensor(dims.factors, dtype=torch.float32)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if rounded:
        return cos.bfloat16().float(), sin.bfloat16().float()
    return cos, sin


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor], dims: _Dims) -> Tensor:
    """Rotary embedding of x [L, heads, head] on its first `rope_dim` columns."""
    cos, sin = turn[0][:, None], turn[1][:, None]
    part, rest = x[..., : dims.rope_dim], x[..., dims.rope_dim :]
    if dims.interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


def _attention(
    dims: _Dims, layer: _Layer, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor
) -> Tensor:
    parts = []
    for (weight, bias), heads in zip(
        layer.qkv, (dims.heads, dims.kv_heads, dims.kv_heads), strict=True
    ):
        projected = x @ weight.T
        if bias is not None:
            projected = projected + bias
        parts.append(projected.view(len(x), heads, dims.head))
    q, k, v = _rotate(parts[0], turn, dims), _rotate(parts[1], turn, dims), parts[2]
    groups = dims.heads // dims.kv_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dims.head) + mask
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    result = mixed @ layer.out.T
    return result if layer.out_bias is None else result + layer.out_bias
