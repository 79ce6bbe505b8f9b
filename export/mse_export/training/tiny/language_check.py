"""How well the language model alone rates sentences that it has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mse_export.training.tiny.corpus import sentences
from mse_export.training.tiny.layout import Answers, Pieces, build_row, pad
from mse_export.training.tiny.model import TinyLlama
from mse_export.training.tiny.readout import expected, read_emotions, read_numbers

__all__ = ["validate_text"]


def validate_text(
    model: TinyLlama, processor: Any, *, count: int = 600, seed: int = 990_001
) -> dict[str, float]:
    """On unseen sentences: correlation and error of the expected value, emotion accuracy."""
    found = sentences(processor, count, seed)
    pieces, answers = Pieces(processor), Answers(processor)
    guess, truth = [], list[float]()
    hits, asked = 0, 0
    ordered = sorted(found, key=lambda e: len(e.ids))
    for k in range(0, len(ordered), 100):
        part = ordered[k : k + 100]
        rows = [build_row(pieces, e.ids, "sentiment", "pseudo-last", 0).ids for e in part]
        lengths = torch.tensor([len(r) for r in rows])
        with torch.no_grad():
            prompt = model.embed(pad(rows))
        guess.append(expected(read_numbers(model, answers, prompt, lengths)[0]))
        truth.extend(e.valence for e in part)
        one = [e for e in part if e.emotion is not None]
        rows = [build_row(pieces, e.ids, "emotion", "pseudo-last", 0).ids for e in one]
        lengths = torch.tensor([len(r) for r in rows])
        with torch.no_grad():
            prompt = model.embed(pad(rows))
        best = read_emotions(model, answers, prompt, lengths)[0].argmax(1)
        hits += int((best == np.array([e.emotion for e in one])).sum())
        asked += len(one)
    value, real = np.concatenate(guess), np.array(truth)
    return {
        "r": round(float(np.corrcoef(value, real)[0, 1]), 4),
        "mae": round(float(np.abs(value - real).mean()), 4),
        "emotion_accuracy": round(hits / max(asked, 1), 4),
    }
