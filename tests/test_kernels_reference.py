"""The NumPy reference against the published implementation's own numbers, and its edge cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import Case, golden_cases, load_golden, random_case

from mse_kernels import reference

NAMES = golden_cases()


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, test_data: Callable[[str], Path]) -> None:
    case, expected = load_golden(test_data("golden/adapter"), name)
    got = reference.forward(*case)
    views = {
        "multi_scale_every_4th": got["multi_scale"][:, ::4],
        "pseudo_every_16th": got["pseudo"][:, :, ::16],
    }
    compared = 0
    for key, want in expected.items():
        value = views.get(key, got.get(key))
        if value is None:
            continue
        assert np.abs(value - want).max() <= 1e-5 * np.abs(want).max(), key
        compared += 1
    assert compared == 10


def test_float32_is_near_float64() -> None:
    case = random_case(seed=3)
    single = reference.forward(*case)["pseudo"]
    double = reference.forward(*case, dtype=np.float64)["pseudo"]
    assert single.dtype == np.float32
    assert double.dtype == np.float64
    assert np.abs(single - double).max() <= 1e-5 * np.abs(double).max()


def test_padding_is_never_read() -> None:
    case = random_case(seed=4)
    want = reference.forward(*case)["pseudo"]
    dirty = Case(*[np.array(v) if isinstance(v, np.ndarray) else v for v in case])
    for rows, lengths in (
        (dirty.audio, dirty.audio_len),
        (dirty.video, dirty.video_len),
        (dirty.text, dirty.text_len),
    ):
        for b, n in enumerate(lengths):
            rows[b, n:] = np.nan
    np.testing.assert_array_equal(reference.forward(*dirty)["pseudo"], want)


def test_length_zero_is_the_linear_bias() -> None:
    case = random_case(seed=5)
    none = case._replace(
        audio_len=np.zeros_like(case.audio_len), text_len=np.zeros_like(case.text_len)
    )
    got = reference.forward(*none)
    bias = case.weights["audio_LSTM.linear.bias"]
    np.testing.assert_array_equal(got["audio_h"], np.broadcast_to(bias, got["audio_h"].shape))
    bias = case.weights["text_guide_mixer.text_mlp.bias"]
    np.testing.assert_array_equal(
        got["text_knowledge"], np.broadcast_to(bias, got["text_knowledge"].shape)
    )


def test_gelu_is_the_erf_form() -> None:
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    want = [-0.00404969409, -0.15865525393, 0.0, 0.34573123063, 1.95449973610]
    np.testing.assert_allclose(reference.gelu(x), want, atol=1e-10)
