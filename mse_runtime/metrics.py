"""The published metrics, in NumPy alone (published-model spec, section 8).

Regression works on float32 and rounds half to even, as the published code does; every published
number is rounded to four decimals. A metric that has no sample to speak about is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mse_runtime.errors import UsageError

__all__ = [
    "ClassReport",
    "classification_metrics",
    "confusion_matrix",
    "mosei_metrics",
    "pearson",
    "per_class",
    "r_squared",
    "regression_metrics",
    "simsv2_metrics",
    "weighted_f1",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Right-closed bins of the Chinese sets, on values clipped to -1..1.
SIMS_BINS = {
    2: (-1.01, 0.0, 1.01),
    3: (-1.01, -0.1, 0.1, 1.01),
    5: (-1.01, -0.7, -0.1, 0.1, 0.7, 1.01),
}
SIMS_WEAK = 0.4


@dataclass(frozen=True)
class ClassReport:
    """One class: precision, recall and F1 in 0..1 (0 where undefined), and its true samples."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


def confusion_matrix(truth: ArrayLike, predicted: ArrayLike, n_classes: int) -> Ints:
    """Counts [n_classes + 1, n_classes + 1]: rows truth, columns prediction.

    The last row and column collect values that are no class (the published parser can return
    89.0): they count as wrong, never as missing.
    """
    rows, columns = (_class_index(values, n_classes) for values in (truth, predicted))
    _same_length(rows, columns)
    counts = np.zeros((n_classes + 1, n_classes + 1), np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def per_class(truth: ArrayLike, predicted: ArrayLike, labels: Sequence[str]) -> list[ClassReport]:
    """Precision, recall, F1 and support of every class, in the labels' order."""
    counts = confusion_matrix(truth, predicted, len(labels))
    hits = np.diag(counts).astype(np.float64)
    precision = _ratio(hits, counts.sum(axis=0))
    recall = _ratio(hits, counts.sum(axis=1))
    f1 = _ratio(2 * hits, counts.sum(axis=0) + counts.sum(axis=1))
    support = counts.sum(axis=1)
    return [
        ClassReport(label, float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
        for i, label in enumerate(labels)
    ]


def weighted_f1(truth: ArrayLike, predicted: ArrayLike) -> float:
    """F1 of each true class, weighted by its support; NaN without samples.

    Classes that only the prediction names have no support and no weight.
    """
    true, guess = np.asarray(truth).ravel(), np.asarray(predicted).ravel()
    _same_length(true, guess)
    if not len(true):
        return float("nan")
    total = 0.0
    for value in np.unique(true):
        support, named = int((true == value).sum()), int((guess == value).sum())
        hits = int(((true == value) & (guess == value)).sum())
        total += support * 2 * hits / (support + named)
    return total / len(true)


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation; NaN where a side is constant or there are fewer than two samples."""
    x, y = (np.asarray(side, np.float64).ravel() for side in (a, b))
    _same_length(x, y)
    if len(x) < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(np.clip((x @ y) / scale, -1.0, 1.0)) if scale > 0 else float("nan")


def r_squared(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Coefficient of determination; NaN for fewer than two samples, 0 or 1 for constant truth."""
    y, p = (np.asarray(side, np.float64).ravel() for side in (truth, predicted))
    _same_length(y, p)
    if len(y) < 2:
        return float("nan")
    residual, spread = float(((y - p) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    if spread == 0:
        return 1.0 if residual == 0 else 0.0
    return 1.0 - residual / spread


def mosei_metrics(predicted: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """MOSI and MOSEI: values on -3..3, unclipped for MAE and correlation.

    `Has0` compares p >= 0 with t >= 0 over everything, `Non0` p > 0 with t > 0 where t != 0.
    """
    p, t = _values(predicted, truth)
    nonzero = t != 0
    results = {
        "Has0_acc_2": _agreement(p >= 0, t >= 0),
        "Has0_F1_score": weighted_f1(t >= 0, p >= 0),
        "Non0_acc_2": _agreement(p[nonzero] > 0, t[nonzero] > 0),
        "Non0_F1_score": weighted_f1(t[nonzero] > 0, p[nonzero] > 0),
        "Mult_acc_5": _rounded_agreement(p, t, 2.0),
        "Mult_acc_7": _rounded_agreement(p, t, 3.0),
        "MAE": float(np.mean(np.abs(p - t))),
        "Corr": pearson(p, t),
    }
    return _four_decimals(results)


def simsv2_metrics(predicted: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """CH-SIMS and CH-SIMS v2: everything on values clipped to -1..1."""
    p, t = (np.clip(side, -1.0, 1.0) for side in _values(predicted, truth))
    bins = {n: (_bin(p, edges), _bin(t, edges)) for n, edges in SIMS_BINS.items()}
    weak = (t >= -SIMS_WEAK) & (t <= SIMS_WEAK)
    guess, true = bins[2]
    results = {
        "Mult_acc_2": _agreement(*bins[2]),
        "Mult_acc_2_weak": _agreement(guess[weak], true[weak]),
        "Mult_acc_3": _agreement(*bins[3]),
        "Mult_acc_5": _agreement(*bins[5]),
        "F1_score": weighted_f1(true, guess),
        "MAE": float(np.mean(np.abs(p - t))),
        "Corr": pearson(p, t),
        "R_squre": r_squared(t, p),
    }
    return _four_decimals(results)


def regression_metrics(
    predicted: ArrayLike, truth: ArrayLike, low: float, high: float
) -> dict[str, float]:
    """The published metrics of the scale low..high: -1..1 as CH-SIMS, anything wider as MOSEI."""
    if max(abs(low), abs(high)) <= 1.0:
        return simsv2_metrics(predicted, truth)
    return mosei_metrics(predicted, truth)


def classification_metrics(predicted: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """Accuracy and weighted F1 over class indices (MELD, CHERMA, IEMOCAP)."""
    p, t = np.asarray(predicted).ravel(), np.asarray(truth).ravel()
    _same_length(p, t)
    return _four_decimals({"acc": _agreement(p, t), "weight_F1": weighted_f1(t, p)})


def _values(predicted: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats]:
    p, t = np.asarray(predicted, np.float32).ravel(), np.asarray(truth, np.float32).ravel()
    _same_length(p, t)
    return p, t


def _same_length(a: NDArray[np.generic], b: NDArray[np.generic]) -> None:
    if len(a) != len(b):
        raise UsageError(
            f"{len(a)} and {len(b)} values cannot be compared: every sample needs one prediction "
            "and one label."
        )


def _agreement(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    return float(np.mean(a == b)) if len(a) else float("nan")


def _rounded_agreement(p: Floats, t: Floats, limit: float) -> float:
    return _agreement(*(np.round(np.clip(side, -limit, limit)) for side in (p, t)))


def _bin(values: Floats, edges: tuple[float, ...]) -> Ints:
    """Number of the right-closed bin; edges compare as float32, like the values."""
    return np.searchsorted(np.asarray(edges, np.float32), values, side="left").astype(np.int64)


def _class_index(values: ArrayLike, n_classes: int) -> Ints:
    numbers = np.asarray(values, np.float64).ravel()
    known = (numbers >= 0) & (numbers < n_classes) & (numbers == np.floor(numbers))
    return np.where(known, numbers, n_classes).astype(np.int64)


def _ratio(part: NDArray[np.float64], whole: Ints) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _four_decimals(results: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in results.items()}
