"""Metrics against scikit-learn and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mse_runtime.calibration import (
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
)
from mse_runtime.errors import UsageError
from mse_runtime.metrics import (
    classification_metrics,
    confusion_matrix,
    mosei_metrics,
    pearson,
    per_class,
    r_squared,
    regression_metrics,
    simsv2_metrics,
    weighted_f1,
)

sklearn_metrics = pytest.importorskip("sklearn.metrics")

pairs = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.integers(0, 6), min_size=n, max_size=n) for _ in range(2)),
    )
)
tenths = st.integers(2, 60).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(-35, 35), min_size=n, max_size=n) for _ in "pt"))
)


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_classification_equals_sklearn(pair: tuple[list[int], list[int]]) -> None:
    truth, predicted = pair
    reference = sklearn_metrics.f1_score(truth, predicted, average="weighted")
    assert weighted_f1(truth, predicted) == pytest.approx(reference, abs=1e-12)
    found = classification_metrics(predicted, truth)
    assert found["acc"] == round(sklearn_metrics.accuracy_score(truth, predicted), 4)
    assert found["weight_F1"] == pytest.approx(reference, abs=5.1e-5)
    table = sklearn_metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(7), zero_division=0
    )
    for i, row in enumerate(per_class(truth, predicted, [str(i) for i in range(7)])):
        assert (row.precision, row.recall, row.f1) == pytest.approx([table[j][i] for j in range(3)])
        assert row.support == table[3][i]
    matrix = confusion_matrix(truth, predicted, 7)[:7, :7]
    assert (matrix == sklearn_metrics.confusion_matrix(truth, predicted, labels=range(7))).all()


@given(tenths)
@settings(max_examples=60, deadline=None)
def test_regression_equals_sklearn(pair: tuple[list[int], list[int]]) -> None:
    p, t = (np.asarray(side, np.float32) / np.float32(10) for side in pair)
    found = mosei_metrics(p, t)
    assert found["MAE"] == pytest.approx(sklearn_metrics.mean_absolute_error(t, p), abs=6e-5)
    assert found["Has0_F1_score"] == pytest.approx(
        sklearn_metrics.f1_score(t >= 0, p >= 0, average="weighted"), abs=5.1e-5
    )
    keep = t != 0
    if keep.any():
        assert found["Non0_acc_2"] == pytest.approx(
            sklearn_metrics.accuracy_score(t[keep] > 0, p[keep] > 0), abs=5.1e-5
        )
        assert found["Non0_F1_score"] == pytest.approx(
            sklearn_metrics.f1_score(t[keep] > 0, p[keep] > 0, average="weighted"), abs=5.1e-5
        )
    assert r_squared(t, p) == pytest.approx(
        sklearn_metrics.r2_score(t.astype(float), p.astype(float)), abs=1e-9
    )
    if np.ptp(t) and np.ptp(p):
        assert pearson(p, t) == pytest.approx(np.corrcoef(p, t)[0, 1], abs=1e-9)


def test_mosei_by_hand() -> None:
    truth = [0.0, -1.2, 2.5, 3.0, -0.4]
    predicted = [0.2, 1.0, 1.5, 3.6, -0.5]
    found = mosei_metrics(predicted, truth)
    assert found["Has0_acc_2"] == 0.8  # only the second differs in sign
    assert found["Non0_acc_2"] == 0.75  # the zero is left out
    # Half to even: 2.5 -> 2 and 1.5 -> 2 agree, -0.5 -> -0 agrees with -0.4 -> -0; 3.6 is clipped.
    assert found["Mult_acc_7"] == 0.8
    assert found["Mult_acc_5"] == 0.8
    assert found["MAE"] == pytest.approx((0.2 + 2.2 + 1.0 + 0.6 + 0.1) / 5, abs=5e-5)  # unclipped


def test_simsv2_by_hand() -> None:
    truth = [-1.0, -0.7, -0.1, 0.0, 0.1, 0.4, 0.8]
    predicted = [-1.4, -0.65, -0.1, 0.05, 0.15, 0.7, 1.5]
    found = simsv2_metrics(predicted, truth)
    # Right-closed: 0.0 falls in the negative half, 0.05 does not.
    assert found["Mult_acc_2"] == pytest.approx(6 / 7, abs=5e-5)
    assert found["Mult_acc_2_weak"] == 0.75  # of -0.1, 0.0, 0.1, 0.4
    assert found["Mult_acc_3"] == pytest.approx(6 / 7, abs=5e-5)  # 0.1 is neutral, 0.15 is not
    assert found["Mult_acc_5"] == pytest.approx(5 / 7, abs=5e-5)  # -0.7 and -0.65 part too
    clipped = [0, 0.05, 0, 0.05, 0.05, 0.3, 0.2]
    assert found["MAE"] == pytest.approx(sum(clipped) / 7, abs=5e-5)


def test_a_missing_denominator_is_nan_not_a_crash() -> None:
    found = mosei_metrics([0.5, -0.5], [0.0, 0.0])
    assert math.isnan(found["Non0_acc_2"])
    assert math.isnan(found["Non0_F1_score"])
    assert math.isnan(found["Corr"])
    assert math.isnan(simsv2_metrics([0.5], [1.0])["Mult_acc_2_weak"])


def test_the_scale_chooses_the_metrics() -> None:
    assert "R_squre" in regression_metrics([0.1, 0.2], [0.1, 0.3], -1, 1)
    assert "Mult_acc_7" in regression_metrics([0.1, 0.2], [0.1, 0.3], -3, 3)


def test_numbers_that_are_no_class_count_as_wrong() -> None:
    found = classification_metrics([3.0, 89.0, 2.0], [3, 3, 2])
    assert found["acc"] == pytest.approx(2 / 3, abs=5e-5)
    assert confusion_matrix([3, 3, 2], [3.0, 89.0, 2.5], 7)[3, 7] == 1
    assert confusion_matrix([3, 3, 2], [3.0, 89.0, 2.5], 7)[2, 7] == 1


def test_unequal_lengths_are_named() -> None:
    with pytest.raises(UsageError, match="3 and 2 values"):
        classification_metrics([1, 2, 3], [1, 2])


def test_temperature_is_recovered() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5)) * 2
    chances = probabilities(logits)
    truth = np.array([rng.choice(5, p=row) for row in chances])
    assert fit_temperature(logits, truth) == pytest.approx(1.0, abs=0.06)
    assert fit_temperature(logits * 3, truth) == pytest.approx(3.0, abs=0.2)
    before = expected_calibration_error(probabilities(logits * 3), truth)
    after = expected_calibration_error(probabilities(logits * 3, 3.0), truth)
    assert before > 0.15 > 0.05 > after


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_no_temperature_beats_the_fitted_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, truth = rng.normal(size=(40, 3)) * 3, rng.integers(0, 3, 40)
    best = negative_log_likelihood(logits, truth, fit_temperature(logits, truth))
    for temperature in (0.05, 0.3, 1.0, 2.5, 8.0, 20.0):
        assert best <= negative_log_likelihood(logits, truth, temperature) + 1e-9


def test_calibration_error_by_hand() -> None:
    table = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]
    assert expected_calibration_error(table, [0, 1, 0, 0]) == pytest.approx(0.4)
    assert math.isnan(expected_calibration_error(np.empty((0, 2)), []))
    with pytest.raises(UsageError, match="validation split"):
        fit_temperature(np.empty((0, 2)), [])
