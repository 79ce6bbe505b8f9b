"""The CPU library: golden parity on every instruction set, threads, batches, storage, bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, builds_tiles, golden_cases, load_golden, random_case, random_weights

import mse_kernels
from mse_kernels import _cpu, reference

if _cpu.reason() is not None:  # pragma: no cover
    pytest.skip(str(_cpu.reason()), allow_module_level=True)

ISAS = _cpu.isas()


def run(case: Case, threads: int = 1, storage: str = "f32", isa: str | None = None) -> np.ndarray:
    with mse_kernels.open("cpu", case.weights, threads, storage, isa) as kernel:
        return kernel(*case.inputs)


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", golden_cases())
def test_golden(name: str, test_data: Callable[[str], Path]) -> None:
    case, expected = load_golden(test_data("golden/adapter"), name)
    want = expected["pseudo_every_16th"]
    for isa in ISAS:
        got = run(case, isa=isa)
        assert error(got[:, :, ::16], want) <= 1e-5, isa
        np.testing.assert_array_equal(run(case, threads=2, isa=isa), got)


def test_every_instruction_set_of_this_processor_is_there() -> None:
    assert ISAS[-1] == "scalar"
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        text = flags.read_text()
        assert ("avx512" in ISAS) == all(f" avx512{x}" in text for x in ("f", "bw", "dq", "vl"))
        tiles = all(f" {x}" in text for x in ("amx_tile", "amx_bf16", "avx512bw"))
        assert ("amx" in ISAS) == (tiles and builds_tiles())
        assert ("avx2" in ISAS) == (" avx2" in text and " fma" in text and " f16c" in text)


def test_instruction_set_is_chosen_and_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(1)
    with mse_kernels.open("cpu", weights) as kernel:
        assert kernel.isa == ISAS[0]
    monkeypatch.setenv("MSE_KERNELS_ISA", "scalar")
    with mse_kernels.open("cpu", weights) as kernel:
        assert kernel.isa == "scalar"
    monkeypatch.setenv("MSE_KERNELS_ISA", "mmx")
    with pytest.raises(mse_kernels.UnavailableError, match="'mmx': this machine runs"):
        mse_kernels.open("cpu", weights)


@settings(max_examples=25, deadline=None)
@given(
    dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    hidden=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    width=st.integers(32, 300),
    n_pseudo=st.integers(1, 6),
    batch=st.integers(0, 9),
    steps=st.tuples(st.integers(0, 90), st.integers(0, 20), st.integers(0, 9)),
    seed=st.integers(0, 2**32 - 1),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
)
def test_any_shape(
    dims: tuple[int, int],
    hidden: tuple[int, int],
    width: int,
    n_pseudo: int,
    batch: int,
    steps: tuple[int, int, int],
    seed: int,
    isa: str,
    threads: int,
) -> None:
    weights = random_weights(seed, *dims, hidden, width, n_pseudo)
    case = random_case(seed, batch, steps, weights)
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(0, t + 1, batch) for t in steps]
    case = case._replace(audio_len=lengths[0], video_len=lengths[1], text_len=lengths[2])
    for rows, n in zip(case.inputs[::2], case.inputs[1::2], strict=True):
        for b in range(batch):
            rows[b, n[b] :] = np.nan  # padding is never read
    got = run(case, threads, isa=isa)
    assert got.shape == (batch, n_pseudo, width)
    if batch:
        want = reference.forward(*case, dtype=np.float64)["pseudo"]
        assert error(got, want) <= 5e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", ["f32", "f16", "bf16"])
def test_same_bits_for_any_threads_and_batch(isa: str, storage: str) -> None:
    """70 samples are more than one block; each alone gives what it gives among the others."""
    weights = random_weights(7, 13, 150)  # inputs for vectors and for tiles
    case = random_case(7, 70, (75, 40, 5), weights)
    got = run(case, 1, storage, isa)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(run(case, threads, storage, isa), got)
    with mse_kernels.open("cpu", case.weights, 2, storage, isa) as kernel:
        for b in (0, 13, 69):
            alone = kernel(*(v[b : b + 1] for v in case.inputs))
            np.testing.assert_array_equal(alone[0], got[b])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_text_that_recurrences_take_along(isa: str, storage: str) -> None:
    """One sample on one thread: the text in slices, of which steps fetch none, some or all."""
    weights = random_weights(3, 13, 70, (64, 33), 1500)
    case = random_case(3, 8, (300, 90, 60), weights)
    case.audio_len[:] = (300, 0, 3, 60, 150, 0, 300, 25)
    case.video_len[:] = (90, 0, 2, 1, 0, 90, 33, 64)
    case.text_len[:] = (60, 60, 60, 21, 22, 60, 0, 1)
    together = run(case, 2, storage, isa)
    with mse_kernels.open("cpu", case.weights, 1, storage, isa) as kernel:
        for b in range(8):
            alone = kernel(*(v[b : b + 1] for v in case.inputs))
            np.testing.assert_array_equal(alone[0], together[b])
        case.text[0, 59, 7] = np.inf
        with pytest.raises(mse_kernels.InputError, match=re.escape("text[0, 59, 7] is not finite")):
            kernel(*(v[:1] for v in case.inputs))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux only")
def test_workers_stay_free_to_move() -> None:
    """A worker that leaves a shared processor isn't bound to another one, nor beyond its limits."""
    tasks = Path("/proc/self/task")

    def wait_until_asleep(threads: set[str]) -> None:
        end = time.monotonic() + 20
        for thread in threads:
            while (tasks / thread / "stat").read_text().rpartition(")")[2].split()[0] != "S":
                assert time.monotonic() < end
                time.sleep(0.001)

    case = random_case(13, 6, (90, 9, 5))
    allowed = os.sched_getaffinity(0)
    before = {t.name for t in tasks.iterdir()}
    with mse_kernels.open("cpu", case.weights, 3) as kernel:
        workers = {t.name for t in tasks.iterdir()} - before
        assert len(workers) == 2
        want = kernel(*case.inputs)
        for limit in (allowed, {min(allowed)}, allowed):
            wait_until_asleep(workers)
            for thread in workers:
                os.sched_setaffinity(int(thread), limit)
            for _ in range(20):
                np.testing.assert_array_equal(kernel(*case.inputs), want)
            wait_until_asleep(workers)
            assert all(os.sched_getaffinity(int(t)) == limit for t in workers)


def test_length_zero_is_the_linear_bias() -> None:
    case = random_case(8)
    zeros = np.zeros(3, np.int64)
    none = case._replace(audio_len=zeros, video_len=zeros, text_len=zeros)
    want = reference.forward(*none)["pseudo"]
    assert error(run(none), want) <= 1e-6


def test_views_are_copied_and_integers_of_any_kind_taken() -> None:
    case = random_case(9)
    want = run(case)
    wide = np.repeat(case.audio, 2, axis=1)[:, ::2]
    raw = np.zeros(case.video.nbytes + 1, np.uint8)[1:]
    odd = raw.view(np.float32).reshape(case.video.shape)
    odd[...] = case.video
    assert not wide.flags.c_contiguous
    assert not odd.flags.aligned
    changed = case._replace(
        audio=wide,
        video=odd,
        text=np.asfortranarray(case.text),
        audio_len=case.audio_len.astype(np.int32),
        text_len=list(case.text_len),
    )
    np.testing.assert_array_equal(run(changed), want)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("audio", lambda a: a.astype(np.float64), r"audio is float64; pass a float32 array"),
        ("audio", lambda a: a.tolist(), r"audio is list"),
        ("audio", lambda a: a.astype(">f4"), r"audio is >f4"),
        ("video", lambda a: a[..., :-1], r"video has shape \(3, 9, 34\), expected \[B, T, 35\]"),
        ("text", lambda a: a[0], r"text has shape \(7, 128\)"),
        ("text", lambda a: a[:2], r"text has 2 samples, audio has 3"),
        ("audio_len", lambda a: a.astype(np.float32), r"audio_len is float32 \(3,\)"),
        ("audio_len", lambda a: a[:2], r"audio_len is int64 \(2,\); pass integers of shape \(3,\)"),
        ("audio_len", lambda a: [1, -1, 2], r"audio_len\[1\] is -1, outside 0\.\.21"),
        ("video_len", lambda a: [1, 9, 10], r"video_len\[2\] is 10, outside 0\.\.9"),
        ("text_len", lambda a: [8, 1, 1], r"text_len\[0\] is 8, outside 0\.\.7"),
    ],
)
def test_bad_arguments(name: str, change: Callable[[Any], Any], message: str) -> None:
    case = random_case(10)
    bad = case._replace(**{name: change(getattr(case, name))})
    with pytest.raises(mse_kernels.InputError, match=message):
        run(bad)


LOW_NAN = np.array([0x7F800001], np.uint32).view(np.float32)[0]  # its upper half is infinity's


@pytest.mark.parametrize("value", [np.nan, LOW_NAN, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["audio", "video", "text"])
@pytest.mark.parametrize("isa", ISAS)
def test_values_that_are_not_finite(name: str, value: float, isa: str) -> None:
    case = random_case(11, weights=random_weights(11, 13, 70), lengths="full")
    getattr(case, name)[1, 5, 3] = value
    with (
        mse_kernels.open("cpu", case.weights, 2, isa=isa) as kernel,
        pytest.raises(mse_kernels.InputError, match=rf"{name}\[1, 5, 3\] is not finite"),
    ):
        kernel(*case.inputs)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("audio_LSTM.linear.bias", lambda a: None, "lack 'audio_LSTM.linear.bias'"),
        ("audio_LSTM.rnn.weight_hh_l0", lambda a: a[:-1], r"shape \(127, 32\), expected \(128, 32"),
        ("text_guide_mixer.text_mlp.weight", lambda a: a * np.nan, "holds a NaN"),
        ("mutli_scale_fusion.scale1.0.weight", lambda a: a.astype(int), "holds int64"),
        ("mutli_scale_fusion.projector.weight", lambda a: np.ones((4, 2)), r"expected \(any, 1\)"),
    ],
)
def test_bad_weights(name: str, change: Callable[[Any], Any], message: str) -> None:
    weights: dict[str, Any] = dict(random_weights(1))
    if (value := change(weights[name])) is None:
        del weights[name]
    else:
        weights[name] = value
    with pytest.raises(mse_kernels.WeightsError, match=message):
        mse_kernels.open("cpu", weights)


def test_dimensions_beyond_the_limits() -> None:
    with pytest.raises(mse_kernels.WeightsError, match="hidden width 513 is beyond"):
        mse_kernels.open("cpu", random_weights(1, hidden=(513, 8)))
    weights = random_weights(1)
    weights["text_guide_mixer.text_mlp.bias"][0] = 1e6
    with pytest.raises(mse_kernels.WeightsError, match="beyond float16; use storage bf16"):
        mse_kernels.open("cpu", weights, storage="f16")
    with pytest.raises(mse_kernels.WeightsError, match="storage 'int8' is unknown"):
        mse_kernels.open("cpu", weights, storage="int8")
    with pytest.raises(mse_kernels.KernelError, match=r"threads is 0, expected 1\.\.64"):
        mse_kernels.open("cpu", weights, threads=0)


def test_a_closed_adapter_says_so() -> None:
    kernel = mse_kernels.open("cpu", random_weights(1))
    kernel.close()
    kernel.close()
    with pytest.raises(mse_kernels.KernelError, match="closed"):
        kernel(*random_case(1).inputs)


def test_import_loads_nothing_and_never_fails() -> None:
    code = (
        "import sys, os; os.environ['MSE_KERNELS_LIBRARY'] = '/nowhere/lib.so'\n"
        "import mse_kernels\n"
        "assert 'numpy' not in sys.modules and 'ctypes' not in sys.modules\n"
        "assert 'not built' in mse_kernels.available()['cpu']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_call_from_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    case = random_case(12, 5, (60, 9, 5))
    with mse_kernels.open("cpu", case.weights, 2) as kernel, ThreadPoolExecutor(4) as pool:
        want = kernel(*case.inputs)
        for got in pool.map(lambda _: kernel(*case.inputs), range(20)):
            np.testing.assert_array_equal(got, want)
