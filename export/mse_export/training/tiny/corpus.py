"""Sentences as token ids with every target a training step may ask of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mse_export.training.tiny.grammar import (
    Sentence,
    any_sentence,
    clip_sentence,
    emotion_sentence,
)
from mse_export.training.tiny.lexicon import lexicon, vader

__all__ = ["NO_TARGET", "Example", "Feed", "clip_examples", "encode", "sentences", "word_examples"]

#: Marks a token with no word valence to predict.
NO_TARGET = -9.0
#: The longest text used in training, tokens.
MAX_TOKENS = 60


@dataclass(frozen=True)
class Example:
    """A tokenised sentence."""

    ids: list[int]
    words: list[float]
    """Per token: the valence (halved) of the word that ends there, or `NO_TARGET`."""
    valence: float
    emotion: int | None


class _Boundaries:
    """Finds where words end in a row of pieces."""

    def __init__(self, processor: Any) -> None:
        self.pieces = [processor.id_to_piece(k) for k in range(len(processor))]
        self.valence = vader().valence

    def targets(self, ids: Sequence[int]) -> list[float]:
        out = [NO_TARGET] * len(ids)
        word = ""
        for k, index in enumerate(ids):
            piece = self.pieces[index]
            word = piece[1:] if piece.startswith("▁") else word + piece
            after = self.pieces[ids[k + 1]] if k + 1 < len(ids) else "▁"
            if piece[-1:].isalpha() and not after[:1].isalpha():
                plain = "".join(c for c in word.lower() if c.isalpha() or c in "'-")
                out[k] = self.valence.get(plain.strip("'-"), 0.0) / 2.0
        return out


def encode(processor: Any, found: Sequence[Sentence]) -> list[Example]:
    """Tokenise sentences, cut to `MAX_TOKENS`."""
    where = _Boundaries(processor)
    out = []
    for sentence, ids in zip(found, processor.encode([s.text for s in found]), strict=True):
        kept = list(ids[:MAX_TOKENS])
        out.append(Example(kept, where.targets(kept), sentence.valence, sentence.emotion))
    return out


def sentences(processor: Any, count: int, seed: int) -> list[Example]:
    """`count` sentences of the grammar, a quarter of them with one emotion's words."""
    rng = random.Random(seed)
    drawn = [emotion_sentence(rng) if k % 4 == 0 else any_sentence(rng) for k in range(count)]
    return encode(processor, drawn)


def word_examples(processor: Any) -> list[Example]:
    """Every word of the lexicon alone, in lower case and capitalised."""
    words = lexicon().valent
    drawn = [
        Sentence(form, vader().score(form), None) for w in words for form in (w, w.capitalize())
    ]
    return encode(processor, drawn)


class Feed:
    """Endless batches of sentences of similar length (less padding, faster steps)."""

    def __init__(self, examples: list[Example], batch: int, rng: random.Random) -> None:
        self._by_task: dict[str, list[Example]] = {
            "sentiment": examples,
            "emotion": [e for e in examples if e.emotion is not None],
        }
        self._queues: dict[str, Iterator[list[Example]]] = {
            task: self._endless(pool, batch, rng) for task, pool in self._by_task.items()
        }

    @staticmethod
    def _endless(pool: list[Example], batch: int, rng: random.Random) -> Iterator[list[Example]]:
        while True:
            drawn = rng.choices(pool, k=batch * 50)
            drawn.sort(key=lambda e: len(e.ids))
            batches = [drawn[i : i + batch] for i in range(0, len(drawn), batch)]
            rng.shuffle(batches)
            yield from batches

    def next(self, task: str) -> list[Example]:
        """The next batch for a task."""
        return next(self._queues[task])


def clip_examples(processor: Any, count: int, seed: int) -> list[Example]:
    """Sentences as actors say them."""
    rng = random.Random(seed)
    return encode(processor, [clip_sentence(rng) for _ in range(count)])
