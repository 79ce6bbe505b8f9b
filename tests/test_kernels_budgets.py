"""Error budgets: each kernel against float64, on every instruction set.

ULPs are of float32 at the true value. Sums are measured against the sum of the absolute products,
which is what rounding errors grow with.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_cases import random_case, random_weights

import mse_kernels
from mse_kernels import _cpu, reference

if _cpu.reason() is not None:  # pragma: no cover
    pytest.skip(str(_cpu.reason()), allow_module_level=True)

ISAS = _cpu.isas()
EPS = 2.0**-24  # half an ULP, relative


def activate(isa: str, what: int, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    code = _cpu.library().mse_activate(isa.encode(), what, x.ctypes.data, y.ctypes.data, x.size)
    assert code == 0
    return y.astype(np.float64)


def points(low: float, high: float) -> np.ndarray:
    even = np.linspace(low, high, 40001)
    small = np.geomspace(1e-30, 1.0, 5001)
    return np.concatenate([even, small, -small]).astype(np.float32)


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    return float((np.abs(got - want) / np.spacing(np.abs(want).astype(np.float32))).max())


@pytest.mark.parametrize("isa", ISAS)
def test_sigmoid_within_3_ulp(isa: str) -> None:
    x = points(-80, 80)
    got = activate(isa, 0, x)
    assert ulps(got, 1.0 / (1.0 + np.exp(-x.astype(np.float64)))) <= 3.0
    ends = activate(isa, 0, np.array([-1e30, 1e30, 0.0], np.float32))
    assert ends[0] < 1e-37
    assert ends[1] == 1.0
    assert ends[2] == 0.5


@pytest.mark.parametrize("isa", ISAS)
def test_tanh_within_3_ulp(isa: str) -> None:
    """Relative precision holds down to the smallest arguments: 1 - 2 sigmoid would lose it."""
    x = points(-20, 20)
    assert ulps(activate(isa, 1, x), np.tanh(x.astype(np.float64))) <= 3.0
    ends = activate(isa, 1, np.array([-1e30, 1e30, 0.0], np.float32))
    np.testing.assert_array_equal(ends, [-1.0, 1.0, 0.0])


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_within_4_ulp_of_its_argument(isa: str) -> None:
    """gelu(x) <= |x|, so the error is measured in ULPs of x; the far tail is below one of them."""
    x = points(-12, 12)
    exact = x.astype(np.float64)
    want = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in exact])
    got = activate(isa, 2, x)
    assert (np.abs(got - want) / np.spacing(np.abs(x)).astype(np.float64)).max() <= 4.0
    for_large = activate(isa, 2, np.array([1e4, -1e4, 1e18], np.float32))
    np.testing.assert_allclose(for_large, [1e4, 0.0, 1e18], rtol=1e-7, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 300, 130), (26, 1000, 64), (3, 1, 1)])
def test_linear(isa: str, storage: int, shape: tuple[int, int, int]) -> None:
    """sqrt-like growth in practice; the budget is (3 + 0.5 sqrt(K)) roundings of sum |w x|."""
    rows, depth, columns = shape
    rng = np.random.default_rng(0)
    w = rng.standard_normal((columns, depth), dtype=np.float32)
    b, x = (
        rng.standard_normal(columns, dtype=np.float32),
        rng.standard_normal((rows, depth), dtype=np.float32),
    )
    y = np.empty((rows, columns), np.float32)
    code = _cpu.library().mse_linear(
        *(isa.encode(), storage, w.ctypes.data, b.ctypes.data, columns, depth),
        *(x.ctypes.data, rows, y.ctypes.data),
    )
    assert code == 0
    kept = w.astype(np.float64)
    if storage == 1:
        kept = w.astype(np.float16).astype(np.float64)
    if storage == 2:
        bits = w.view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        kept = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    exact = x.astype(np.float64)
    scale = np.abs(exact) @ np.abs(kept).T + np.abs(b)
    budget = (3 + 0.5 * math.sqrt(depth)) * EPS * scale
    assert (np.abs(y - (exact @ kept.T + b)) <= budget).all()


@pytest.mark.parametrize("isa", ISAS)
def test_half_storage_of_every_bit_pattern(isa: str) -> None:
    """Rounding to float16 and back equals NumPy's, subnormals and ties included."""
    rng = np.random.default_rng(1)
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (every[:-1] + every[1:]) / 2  # ties
    other = (rng.standard_normal(3000) * 10.0 ** rng.integers(-8, 4, 3000)).astype(np.float32)
    values = np.concatenate([every, middle, other, -other])
    one, zero, y = np.ones(1, np.float32), np.zeros(len(values), np.float32), np.empty_like(values)
    code = _cpu.library().mse_linear(
        *(isa.encode(), 1, values.ctypes.data, zero.ctypes.data, len(values), 1),
        *(one.ctypes.data, 1, y.ctypes.data),
    )
    assert code == 0
    np.testing.assert_array_equal(y, values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 5), (50, 4096), (78, 129), (0, 40)])
def test_mean_rows(isa: str, shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    out = np.full(shape[1], np.nan, np.float32)
    code = _cpu.library().mse_mean_rows(isa.encode(), rows.ctypes.data, *shape, out.ctypes.data)
    assert code == 0
    n = max(shape[0], 1)
    want = rows.astype(np.float64).sum(0) / n
    budget = (2 + 0.5 * n) * EPS * np.abs(rows).sum(0) / n
    assert (np.abs(out - want) <= budget + 1e-45).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dims", "budget"), [((64, 177), 2e-7), ((1024, 2048), 4e-7)])
def test_input_projection(isa: str, dims: tuple[int, int], budget: float) -> None:
    """Features of any scale, added up over a wide input; relative to max |pseudo|."""
    rng = np.random.default_rng(5)
    case = random_case(5, 3, (33, 50, 2), random_weights(5, *dims, (64, 48)), lengths="full")
    for rows in (case.audio, case.video):
        rows *= (10.0 ** rng.uniform(-6, 1, rows.shape)).astype(np.float32)
    want = reference.forward(*case, dtype=np.float64)["pseudo"]
    with mse_kernels.open("cpu", case.weights, isa=isa) as kernel:
        got = kernel(*case.inputs)
    assert np.abs(got - want).max() <= budget * np.abs(want).max()


@pytest.mark.parametrize("isa", ISAS)
def test_long_recurrence(isa: str) -> None:
    """2000 steps of a saturating and of a nearly linear LSTM; relative to max |pseudo|."""
    for gain in (0.05, 1.0, 4.0):
        weights = random_weights(3, 25, 9, (64, 16))
        for name in list(weights):
            if ".rnn." in name:
                weights[name] = weights[name] * np.float32(gain)
        case = random_case(4, 2, (2000, 30, 3), weights, lengths="full")
        want = reference.forward(*case, dtype=np.float64)["pseudo"]
        with mse_kernels.open("cpu", weights, isa=isa) as kernel:
            got = kernel(*case.inputs)
        assert np.abs(got - want).max() <= 4e-6 * np.abs(want).max(), gain


@pytest.mark.parametrize(("storage", "budget"), [("f32", 3e-6), ("f16", 2e-3), ("bf16", 1.5e-2)])
def test_storage(storage: str, budget: float) -> None:
    worst = 0.0
    for seed in range(4):
        case = random_case(seed, 4, (40, 12, 8), random_weights(seed, 40, 30, (64, 32), 512))
        want = reference.forward(*case, dtype=np.float64)["pseudo"]
        with mse_kernels.open("cpu", case.weights, storage=storage) as kernel:
            got = kernel(*case.inputs)
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    assert budget / 100 <= worst <= budget
