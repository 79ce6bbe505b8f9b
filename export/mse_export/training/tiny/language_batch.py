"""Batches of the language model's stages: prompts with their answers and auxiliary targets."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mse_export.training.tiny.corpus import NO_TARGET, Example
from mse_export.training.tiny.layout import Answers, Layout, Pieces, build_row, pad
from mse_export.training.tiny.world import Media, draw_media, fused_emotion, fused_sentiment

__all__ = ["Step", "prepare"]


def _media(rng: random.Random, example: Example) -> Media:
    media = draw_media(rng, example.valence, example.emotion)
    x = rng.random()
    return media.without(face=x < 0.15 or x > 0.94, voice=0.15 <= x < 0.30 or x > 0.94)


@dataclass
class Step:
    """One batch, ready for the model; B sentences, answers of A tokens, rows of T."""

    ids: Tensor
    slot: list[int]
    first: Tensor
    """[B, A]: positions whose next token is part of the answer."""
    target: Tensor
    words: Tensor
    value: Tensor
    media: list[Media]


def prepare(
    batch: list[Example],
    task: str,
    layout: Layout,
    slots: int,
    pieces: Pieces,
    answers: Answers,
    rng: random.Random,
) -> Step:
    """Rows with their answers; with `slots` also a face and a voice for every sentence."""
    rows, slot, last, words, values, media = [], [], [], [], [], []
    for example in batch:
        seen = _media(rng, example) if slots else Media(has_face=False, has_voice=False)
        row = build_row(pieces, example.ids, task, layout, slots)
        if task == "emotion":
            emotion = fused_emotion(example.emotion or 0, example.valence, seen)
            answer = answers.emotion_ids[emotion]
            values.append(0.0)
        else:
            value = fused_sentiment(example.valence, seen)
            answer = answers.number(value + rng.gauss(0, 0.1))
            values.append(value)
        media.append(seen)
        slot.append(row.slot)
        last.append(len(row.ids) - 1)
        words.append([NO_TARGET] * row.text + example.words)
        rows.append(row.ids + answer)
    ids = pad(rows)
    first = torch.tensor(last)[:, None] + torch.arange(len(answer))
    width = ids.shape[1]
    return Step(
        ids=ids,
        slot=slot,
        first=first,
        target=ids.gather(1, first + 1),
        words=torch.tensor([w[:width] + [NO_TARGET] * (width - len(w)) for w in words]),
        value=torch.tensor(values),
        media=media,
    )
