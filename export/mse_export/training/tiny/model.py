"""The language model: LLaMA's architecture, small, in the fewest lines that train fast on a CPU.

Parameter names are Hugging Face's `LlamaForCausalLM`, so the weights load there and into the
GGUF writer unchanged. Attention is written out: for sequences of some forty tokens it is faster
on a CPU than the fused kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mse_export.training.tiny.schedule import TinyConfig

__all__ = ["TinyLlama"]


class _Attention(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width = config.width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q = self.q_proj(x).view(split).transpose(1, 2)
        k = self.k_proj(x).view(split).transpose(1, 2)
        v = self.v_proj(x).view(split).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        scores = torch.matmul(q * (1.0 / math.sqrt(split[-1])), k.transpose(-1, -2))
        weights = (scores + mask).softmax(-1).to(v.dtype)
        mixed = torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, width)
        out: Tensor = self.o_proj(mixed)
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


class _FeedForward(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Block(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Trunk(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)


class TinyLlama(nn.Module):
    """A causal language model over embeddings; `embed` and `lm_head` are its two ends."""

    inverse_frequency: Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Trunk(config)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.02)
        # Embeddings of this scale matter: with 0.02 the first thousand steps learn nothing.
        nn.init.normal_(self.model.embed_tokens.weight, 0.0, 0.5)
        size = config.width // config.heads
        frequency = config.rope_base ** (-torch.arange(0, size, 2).float() / size)
        self.register_buffer("inverse_frequency", frequency, persistent=False)

    @property
    def width(self) -> int:
        """Channels of an embedding."""
        return self.config.width

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding table, float32 [..., width]."""
        rows: Tensor = self.model.embed_tokens(ids)
        return rows

    def forward(
        self, rows: Tensor, positions: Tensor | None = None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the last norm, and after the second block (for auxiliary heads).

        `rows` [B, T, width]; `positions` [B or 1, T] (default 0..T-1); `allowed` bool
        [B or 1, T, T] (default causal).
        """
        length = rows.shape[1]
        if positions is None:
            positions = torch.arange(length)[None]
        angle = positions[..., None].float() * self.inverse_frequency
        angle = torch.cat((angle, angle), -1)[:, None]
        kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        cos, sin = angle.cos().to(kind), angle.sin().to(kind)
        if allowed is None:
            allowed = torch.ones(1, length, length, dtype=torch.bool).tril()
        mask = torch.zeros(allowed.shape, dtype=kind).masked_fill_(~allowed, -1e4)[:, None]
        x = middle = rows
        for index, block in enumerate(self.model.layers):
            x = block(x, cos, sin, mask)
            if index == 1:
                middle = x
        out: Tensor = self.model.norm(x)
        return out, middle
