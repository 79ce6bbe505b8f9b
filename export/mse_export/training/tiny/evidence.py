"""Stand-ins for an adapter's output, so that the language model learns to read its places."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from mse_export.training.tiny.lexicon import EMOTIONS
from mse_export.training.tiny.world import Media

__all__ = ["Evidence"]

_LEVELS = 13


class Evidence(nn.Module):
    """Vectors that stand for what an adapter would write; thrown away after the slot stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.face = nn.Embedding(len(EMOTIONS), width)
        self.voice = nn.Embedding(len(EMOTIONS), width)
        self.valence = nn.Embedding(_LEVELS, width)
        self.arousal = nn.Embedding(_LEVELS, width)
        for table in (self.face, self.voice, self.valence, self.arousal):
            nn.init.normal_(table.weight, 0.0, 0.5)

    def forward(self, media: list[Media], slots: int, noise: random.Random) -> Tensor:
        """Rows [B, slots, width]: one noisy sum per clip, differently scaled in each place."""
        total = self._level(
            self.valence, [m.valence / 3 + noise.gauss(0, 0.1) for m in media], "has_face", media
        ) + self._level(
            self.arousal, [m.arousal + noise.gauss(0, 0.1) for m in media], "has_voice", media
        )
        for table, name in ((self.face, "face"), (self.voice, "voice")):
            index = torch.tensor([getattr(m, name) for m in media])
            weight = [
                getattr(m, f"{name}_intensity") if getattr(m, f"has_{name}") else 0.0 for m in media
            ]
            total = total + torch.tensor(weight)[:, None] * table(index)
        scale = 0.6 + 0.8 * torch.rand(len(media), slots, 1)
        spread = torch.randn(len(media), slots, total.shape[-1])
        return scale * total[:, None] + 0.2 * spread

    @staticmethod
    def _level(table: nn.Embedding, values: list[float], flag: str, media: list[Media]) -> Tensor:
        there = torch.tensor([float(getattr(m, flag)) for m in media])[:, None]
        place = torch.tensor(values).clamp(-1, 1).add(1).mul((_LEVELS - 1) / 2)
        low = place.floor().clamp(0, _LEVELS - 2).long()
        part = (place - low)[:, None]
        out: Tensor = there * (table(low) * (1 - part) + table(low + 1) * part)
        return out
