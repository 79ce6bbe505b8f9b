"""Clips as the adapter sees them, and the language model's input rows made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mse_export.adapter import Adapter
from mse_export.training.tiny.assemble import Statistics
from mse_export.training.tiny.clips import Rendered
from mse_export.training.tiny.corpus import MAX_TOKENS
from mse_export.training.tiny.layout import Answers, Layout, Pieces, build_row, pad
from mse_export.training.tiny.model import TinyLlama
from mse_export.training.tiny.world import Media

__all__ = ["Item", "Prompter", "items", "padded", "statistics"]

_CLIP = 5.0


@dataclass(frozen=True)
class Item:
    """A clip as the adapter sees it: normalised features, text ids, and what the labels follow."""

    audio: NDArray[np.float32]
    face: NDArray[np.float32]
    ids: list[int]
    valence: float
    emotion: int | None
    media: Media
    identity: int


def statistics(clips: Sequence[Rendered]) -> dict[str, Statistics]:
    """Mean and standard deviation per column over every valid row of the training clips."""
    audio = np.concatenate([c.audio for c in clips]).astype(np.float64)
    face = np.concatenate([c.face[c.face_valid] for c in clips]).astype(np.float64)
    out = {}
    for name, rows, longest in (("audio", audio, 1200), ("face", face, 600)):
        std = rows.std(0)
        # A column that never changes carries nothing; a tiny deviation would blow it up.
        std = np.where(std < 1e-4, 1.0, std)
        out[name] = Statistics(rows.mean(0).astype("f4"), std.astype("f4"), longest)
    return out


def items(clips: Sequence[Rendered], processor: Any, stats: dict[str, Statistics]) -> list[Item]:
    """Normalise as the runtime does: z-score, clamp, zeros where no face was seen."""
    out = []
    for clip in clips:
        audio = (clip.audio - stats["audio"].mean) / stats["audio"].std
        face = (clip.face - stats["face"].mean) / stats["face"].std
        face = np.where(clip.face_valid[:, None], face, 0.0)
        spec = clip.spec
        out.append(
            Item(
                audio=np.clip(audio, -_CLIP, _CLIP).astype(np.float32),
                face=np.clip(face, -_CLIP, _CLIP).astype(np.float32),
                ids=list(processor.encode(spec.text))[:MAX_TOKENS],
                valence=spec.text_valence,
                emotion=spec.text_emotion,
                media=spec.media,
                identity=spec.identity,
            )
        )
    return out


def padded(rows: Sequence[NDArray[np.float32]]) -> Tensor:
    """Rows of different lengths [T, d] as one tensor [B, T, d], zeros at the end."""
    out = torch.zeros(len(rows), max(1, *(len(r) for r in rows)), rows[0].shape[1])
    for k, row in enumerate(rows):
        out[k, : len(row)] = torch.from_numpy(row)
    return out


class Prompter:
    """Builds the language model's input rows for clips, with the adapter's pseudo tokens in."""

    def __init__(
        self, model: TinyLlama, adapter: Adapter, processor: Any, layout: Layout, mixer: bool
    ) -> None:
        self.model, self.adapter, self.layout, self.mixer = model, adapter, layout, mixer
        self.pieces, self.answers = Pieces(processor), Answers(processor)

    def rows(
        self,
        batch: Sequence[Item],
        task: str,
        answer: list[list[int]] | None = None,
        *,
        audio: Sequence[bool] | None = None,
        face: Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, T, D], prompt lengths [B] and ids [B, T]; `answer` is appended where given."""
        pseudo = self.adapter.dims.n_pseudo
        built = [build_row(self.pieces, i.ids, task, self.layout, pseudo) for i in batch]
        tails = answer or [[] for _ in batch]
        ids = pad([row.ids + tail for row, tail in zip(built, tails, strict=True)])
        lengths = torch.tensor([len(row.ids) for row in built])
        text_length = torch.tensor([len(i.ids) for i in batch])
        text = self.model.embed(pad([i.ids or [0] for i in batch]))
        if not self.mixer:
            text = torch.zeros_like(text)
        keep_audio = audio if audio is not None else [True] * len(batch)
        keep_face = face if face is not None else [True] * len(batch)
        tokens = self.adapter(
            padded([i.audio for i in batch]),
            torch.tensor([len(i.audio) * k for i, k in zip(batch, keep_audio, strict=True)]),
            padded([i.face for i in batch]),
            torch.tensor([len(i.face) * k for i, k in zip(batch, keep_face, strict=True)]),
            text,
            text_length,
        )
        places = torch.tensor([row.slot for row in built])[:, None] + torch.arange(pseudo)
        rows = self.model.embed(ids)
        index = places[..., None].expand(-1, -1, self.model.width)
        return rows.scatter(1, index, tokens), lengths, ids
