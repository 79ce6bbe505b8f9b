"""Figures with intervals, resampled by identity because clips of one person are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Answers", "describe", "interval"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What was said about clips, beside what was true; arrays of one length."""

    value: Floats
    truth: Floats
    words: Floats
    """VADER's value of the text alone."""
    emotion: NDArray[np.int64]
    """Index of the answer, -1 where it was not asked."""
    emotion_truth: NDArray[np.int64]
    """Index of the label, -1 where there is none."""
    identity: NDArray[np.int64]

    def take(self, index: NDArray[np.intp]) -> Answers:
        """The clips at `index` (repeats allowed)."""
        return Answers(
            self.value[index],
            self.truth[index],
            self.words[index],
            self.emotion[index],
            self.emotion_truth[index],
            self.identity[index],
        )


def correlation(a: Answers) -> float:
    """Pearson's r; NaN where the answers do not vary."""
    if len(a.value) < 3 or a.value.std() < 1e-9 or a.truth.std() < 1e-9:
        return float("nan")
    return float(np.corrcoef(a.value, a.truth)[0, 1])


def error(a: Answers) -> float:
    """Mean absolute error."""
    return float(np.abs(a.value - a.truth).mean())


def two_class(a: Answers) -> float:
    """Share with the right sign among clips whose label has one."""
    clear = np.abs(a.truth) > 0.05
    return float((np.sign(a.value) == np.sign(a.truth))[clear].mean()) if clear.any() else np.nan


def against_words(a: Answers) -> float:
    """Share with the right sign among clips whose media turn the words' sign around."""
    turned = contradicted(a)
    return float((np.sign(a.value) == np.sign(a.truth))[turned].mean()) if turned.any() else np.nan


def contradicted(a: Answers) -> NDArray[np.bool_]:
    """Clips whose label has the other sign than their words."""
    clear = (np.abs(a.truth) > 0.05) & (np.abs(a.words) > 0.3)
    return np.asarray(clear & (np.sign(a.truth) != np.sign(a.words)))


def emotion_accuracy(a: Answers) -> float:
    """Share of right emotions among clips that have one."""
    asked = (a.emotion_truth >= 0) & (a.emotion >= 0)
    return float((a.emotion == a.emotion_truth)[asked].mean()) if asked.any() else np.nan


def interval(
    answers: Answers, measure: Callable[[Answers], float], *, rounds: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval, resampling whole identities."""
    rng = np.random.default_rng(seed)
    people = np.unique(answers.identity)
    rows = {p: np.flatnonzero(answers.identity == p) for p in people}
    found = []
    for _ in range(rounds):
        drawn = rng.choice(people, len(people))
        found.append(measure(answers.take(np.concatenate([rows[p] for p in drawn]))))
    if np.isnan(found).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


_MEASURES: dict[str, Callable[[Answers], float]] = {
    "r": correlation,
    "mae": error,
    "acc2": two_class,
    "against": against_words,
    "emotion": emotion_accuracy,
}


def describe(answers: Answers) -> dict[str, list[float]]:
    """Every measure as [value, low, high], rounded to four decimals."""
    out = {}
    for name, measure in _MEASURES.items():
        low, high = interval(answers, measure)
        out[name] = [round(float(v), 4) for v in (measure(answers), low, high)]
    return out
