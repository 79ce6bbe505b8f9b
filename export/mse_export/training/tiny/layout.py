"""Sequences: the same pieces in the same order as the bundle's prompt segments.

`pseudo-last` is what the bundle uses: prompt and text first, then the pseudo tokens, then the
words the answer follows. `published` is the paper's order; both are trained so that they can be
compared and so that an adapter of either layout can be fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mse_export.training.tiny.lexicon import EMOTIONS
from mse_export.training.tiny.schedule import Layout
from mse_export.training.tiny.tokeniser import (
    BOS,
    CLOSE,
    CLOSE_ID,
    OPEN,
    OPEN_ID,
    PAD,
    PROMPT,
    TAIL,
)
from mse_runtime.errors import MSEError

__all__ = ["TASKS", "Answers", "Layout", "Row", "build_row", "pad", "segments"]

TASKS = ("sentiment", "emotion")


@dataclass(frozen=True)
class Row:
    """One prompt: ids with a stand-in where the pseudo tokens go."""

    ids: list[int]
    slot: int
    """Index of the first pseudo token."""
    text: int
    """Index of the first text token."""


class Pieces:
    """The fixed pieces of both layouts, tokenised once, each alone as the runtime does it."""

    def __init__(self, processor: Any) -> None:
        self.prompt = {task: list(processor.encode(PROMPT[task])) for task in TASKS}
        self.tail = {task: list(processor.encode(TAIL[task])) for task in TASKS}


class Answers:
    """Token ids of every answer: the numbers -3.0..+3.0 and the emotions' names."""

    def __init__(self, processor: Any) -> None:
        self.numbers = [f"{tenths / 10:+.1f}" for tenths in range(-30, 31)]
        self.number_ids = [list(processor.encode(text)) for text in self.numbers]
        self.emotion_ids = [list(processor.encode(name)) for name in EMOTIONS]
        if {len(ids) for ids in self.number_ids} != {4}:
            raise MSEError("a number of the answer scale is not sign, digit, point, digit")
        if {len(ids) for ids in self.emotion_ids} != {1}:
            raise MSEError("an emotion's name is not one piece of the vocabulary")

    def number(self, value: float) -> list[int]:
        """Ids of a value on -3..+3, rounded to tenths."""
        return self.number_ids[max(0, min(60, round(value * 10) + 30))]


def build_row(pieces: Pieces, text: list[int], task: str, layout: Layout, pseudo: int) -> Row:
    """The prompt's ids for one sentence, with `pseudo` places between the wrapper's pieces."""
    hole = [OPEN_ID, *([CLOSE_ID] * pseudo), CLOSE_ID]
    if layout == "published":
        head = [BOS, *hole[: 1 + pseudo]]
        ids = [*head, *text, CLOSE_ID, *pieces.prompt[task], *pieces.tail[task]]
        return Row(ids, 2, len(head))
    head = [BOS, *pieces.prompt[task], *text]
    return Row([*head, *hole, *pieces.tail[task]], len(head) + 1, 1 + len(pieces.prompt[task]))


def pad(rows: list[list[int]]) -> Tensor:
    """Right-pad rows of ids to one tensor [B, T]."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def segments(task: str, layout: Layout = "pseudo-last") -> list[dict[str, Any]]:
    """The same layout as the prompt segments of a bundle's manifest."""
    opened = {"text": OPEN, "bos": False, "special": True}
    closed = {"text": CLOSE, "bos": False, "special": True}
    prompt = {"text": PROMPT[task], "bos": False, "special": False}
    tail = {"text": TAIL[task], "bos": False, "special": False}
    if layout == "published":
        start = {"text": "", "bos": True, "special": False}
        return [start, opened, {"slot": "pseudo"}, {"slot": "text"}, closed, prompt, tail]
    first = {**prompt, "bos": True}
    return [first, {"slot": "text"}, opened, {"slot": "pseudo"}, closed, tail]
