"""Temperature scaling and calibration error over a known label set.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks": one temperature per task,
fitted on the validation split by the negative log-likelihood, changes confidence and never the
most probable label.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mse_runtime.errors import UsageError

__all__ = [
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "probabilities",
]

Floats = NDArray[np.float64]

LOWEST, HIGHEST = 0.05, 20.0
_GOLDEN = (np.sqrt(5.0) - 1) / 2


def probabilities(scores: ArrayLike, temperature: float = 1.0) -> Floats:
    """Softmax of log-scores [n, K] divided by `temperature`, rows summing to 1."""
    scaled = np.asarray(scores, np.float64) / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled)
    result: Floats = weights / weights.sum(axis=1, keepdims=True)
    return result


def negative_log_likelihood(scores: ArrayLike, truth: ArrayLike, temperature: float = 1.0) -> float:
    """Mean of -log p(true label), labels as columns of `scores` [n, K]."""
    scaled = np.asarray(scores, np.float64) / temperature
    rows = np.arange(len(scaled))
    log_sum = np.logaddexp.reduce(scaled, axis=1)
    return float(np.mean(log_sum - scaled[rows, np.asarray(truth, np.int64)]))


def fit_temperature(scores: ArrayLike, truth: ArrayLike) -> float:
    """The temperature in 0.05..20 with the smallest negative log-likelihood.

    `scores` [n, K] are log-scores at temperature 1, `truth` [n] column numbers. In 1/T the
    likelihood is convex, so a golden-section search over log T finds the one minimum.
    """
    table, true = np.asarray(scores, np.float64), np.asarray(truth, np.int64)
    if table.ndim != 2 or len(table) != len(true) or not len(table):
        raise UsageError(
            "A temperature needs one row of scores and one label for each of at least one sample: "
            "is the validation split empty?"
        )
    low, high = np.log(LOWEST), np.log(HIGHEST)

    def loss(x: float) -> float:
        return negative_log_likelihood(table, true, float(np.exp(x)))

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(60):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = loss(right)
    return float(np.exp((low + high) / 2))


def expected_calibration_error(table: ArrayLike, truth: ArrayLike, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence.

    `table` [n, K] are probabilities, `truth` [n] column numbers; NaN without samples.
    """
    chances, true = np.asarray(table, np.float64), np.asarray(truth, np.int64)
    if not len(chances):
        return float("nan")
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == true
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    error = 0.0
    for i in range(bins):
        inside = place == i
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)
