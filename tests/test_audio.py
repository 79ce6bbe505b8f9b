"""lld13: known signals, shapes, robustness, and parity with openSMILE where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import tone
from numpy.typing import NDArray

from mse_runtime.errors import UsageError
from mse_runtime.features import egemaps
from mse_runtime.features.audio import lld13, llds
from mse_runtime.features.extract import describe_sound
from mse_runtime.features.spec import get_spec

SPEC = get_spec("lld13/1")
SPEECH = [
    "sadtalker_WDA_AlexandriaOcasioCortez_000.mp4",
    "mexca_test_video_audio_5_seconds.mp4",
    "vretalk_2.mp4",
    "vretalk_4.mp4",
    "synth_en.mp4",
    "synth_sad.mp4",
    "synth_zh.mp4",
]
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "happy.mp4"


def column(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    found: NDArray[np.float32] = values[:, SPEC.index(name)]
    return found


def speech(path: Path) -> NDArray[np.int16]:
    from mse_runtime.media import SoundReader, plan_window, probe

    clip = probe(path)
    wave = SoundReader(clip, plan_window(clip, None, None, None)[0]).read()
    assert wave is not None
    return wave.samples


@pytest.mark.parametrize("hertz", [60.0, 100.0, 220.0, 330.0, 480.0])
def test_pitch_of_a_tone(hertz: float) -> None:
    values = llds(tone(1.0, 16_000, hertz))[8:-8]
    semitones = 12 * np.log2(hertz / 27.5)
    assert column(values, "voiced").min() == 1
    assert np.abs(column(values, "F0semitone") - semitones).max() < 0.1
    # A tone without noise reaches what the window's own autocorrelation leaves at its period.
    window = np.hanning(960)
    lag = round(16_000 / hertz)
    bound = window[lag:] @ window[:-lag] / (window @ window)
    expected = 10 * np.log10(bound / (1 - bound))
    assert np.abs(column(values, "HNR") - expected).max() < (1.0 if hertz <= 220 else 3.0)


def test_a_glide_is_followed() -> None:
    seconds = np.arange(32_000) / 16_000
    hertz = 120 * 2 ** (seconds / 2)
    phase = 2 * np.pi * np.cumsum(hertz) / 16_000
    wave = sum(np.sin(k * phase) / k for k in range(1, 8)) * 6000
    values = llds(wave.astype(np.int16))[8:-8]
    centres = (np.arange(len(values)) + 9) * 160
    expected = 12 * np.log2(hertz[centres] / 27.5)
    assert np.abs(column(values, "F0semitone") - expected).max() < 0.2


def test_noise_and_silence_have_no_voice() -> None:
    noise = np.random.default_rng(0).normal(0, 3000, 16_000).astype(np.int16)
    assert column(llds(noise), "voiced").mean() < 0.02
    quiet = llds(np.zeros(16_000, np.int16))
    assert column(quiet, "voiced").max() == 0
    assert column(quiet, "F0semitone").max() == 0
    assert np.isfinite(quiet).all()
    assert np.ptp(quiet, axis=0).max() < 1e-6


def test_twice_as_loud_moves_only_what_should_move() -> None:
    wave = tone(1.0, 16_000, amplitude=0.1)
    soft, loud = llds(wave), llds(wave * 4)
    middle = slice(5, -5)
    # Cubic-root compression of power: 4 times the amplitude, 16^(1/3) times the loudness.
    ratio = column(loud, "Loudness")[middle] / column(soft, "Loudness")[middle]
    assert ratio == pytest.approx(16 ** (1 / 3), rel=0.01)
    for name in ("alphaRatio", "hammarbergIndex", "F0semitone", "HNR", "mfcc1", "mfcc2"):
        assert column(loud, name)[middle] == pytest.approx(
            column(soft, name)[middle], abs=0.05, rel=0.02
        )


def test_balance_of_the_spectrum() -> None:
    rng = np.random.default_rng(1)
    white = rng.normal(0, 2000, 16_000)
    dark = np.convolve(white, np.ones(12) / 12, "same")
    bright = np.diff(white, prepend=0)
    ratios = [column(llds(w.astype(np.int16)), "alphaRatio").mean() for w in (dark, white, bright)]
    # Ascending brightness; a white spectrum holds 4 kHz over 1 kHz of equal density: 6 dB.
    assert ratios[0] < ratios[1] < ratios[2]
    assert ratios[1] == pytest.approx(6.0, abs=0.5)


def test_flux_is_zero_for_a_steady_sound_and_not_for_a_change() -> None:
    # 200 Hz: every hop of 10 ms holds two periods, so all frames are alike.
    steady = llds(tone(1.0, 16_000, 200.0))
    assert column(steady, "spectralFlux")[5:-5].max() < 0.02
    halves = np.concatenate([tone(0.5, 16_000, 200.0), tone(0.5, 16_000, 400.0)])
    flux = column(llds(halves), "spectralFlux")
    assert abs(int(flux.argmax()) - 49) <= 2


def test_pooled_rows_are_means_and_pitch_of_the_voiced_frames() -> None:
    wave = np.concatenate([tone(0.52, 16_000, 150.0), np.zeros(8_000, np.int16)])
    frames = llds(wave)
    track = lld13(wave, start=2.0)
    assert track.values.shape == (-(-len(frames) // 5), 13)
    assert track.valid.all()
    assert column(track.values, "Loudness")[3] == pytest.approx(
        column(frames, "Loudness")[15:20].mean()
    )
    voiced = column(track.values, "voiced")
    assert set(np.round(voiced * 5, 3)) <= {0, 1, 2, 3, 4, 5}
    pitch = column(track.values, "F0semitone")
    assert np.ptp(pitch[voiced > 0]) < 0.5
    assert pitch[voiced == 0].max() == 0
    # The first pool's five frames are centred on 10 to 50 ms.
    assert track.times[0] == pytest.approx(2.03)
    assert np.diff(track.times)[:-1] == pytest.approx(0.05)


@pytest.mark.parametrize("samples", [0, 1, 319, 320, 479, 480, 2_000, 160_000])
def test_number_of_frames(samples: int) -> None:
    values = llds(np.zeros(samples, np.int16))
    assert values.shape == (max(0, 1 + (samples - 320) // 160), 13)
    assert values.dtype == np.float32
    assert len(lld13(np.zeros(samples, np.int16))) == -(-len(values) // 5)


def test_blocks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    from mse_runtime.features import audio, pitch

    wave = tone(1.5, 16_000, 170.0) + np.random.default_rng(3).integers(-900, 900, 24_000)
    whole = llds(wave.astype(np.int16))
    monkeypatch.setattr(audio, "_BLOCK", 7)
    monkeypatch.setattr(pitch, "_BLOCK", 7)
    assert np.allclose(llds(wave.astype(np.int16)), whole, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(0, 4000),
    kind=st.sampled_from(["extreme", "sparse", "constant", "tiny", "nan"]),
)
def test_everything_is_finite(seed: int, count: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    wave: NDArray[np.int16] | NDArray[np.float32]
    if kind == "extreme":
        wave = rng.choice(np.array([-32768, 32767], np.int16), count)
    elif kind == "sparse":
        wave = np.where(rng.random(count) > 0.99, 30_000, 0).astype(np.int16)
    elif kind == "constant":
        wave = np.full(count, int(rng.integers(-32768, 32767)), np.int16)
    elif kind == "tiny":
        wave = rng.integers(-1, 2, count).astype(np.int16)
    else:
        wave = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.1, -5], np.float32), count)
    values = llds(wave)  # type: ignore[arg-type]
    assert np.isfinite(values).all()
    assert np.abs(values).max(initial=0) < 1000


def test_the_example_speaks() -> None:
    if not EXAMPLE.exists():
        pytest.skip("no examples/happy.mp4")
    values = llds(speech(EXAMPLE))
    voiced = column(values, "voiced") > 0
    assert 0.3 < voiced.mean() < 0.9
    pitch = 27.5 * 2 ** (column(values, "F0semitone")[voiced] / 12)
    assert 60 < np.median(pitch) < 300


def test_openSMILE_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egemaps.importlib.util, "find_spec", lambda name: None)
    assert not egemaps.is_installed()
    with pytest.raises(UsageError, match="pip install --no-deps opensmile"):
        describe_sound(np.zeros(16_000, np.int16), 0.0, "egemaps25/1")


# -- beside openSMILE --------------------------------------------------------------------------

needs_opensmile = pytest.mark.skipif(
    not egemaps.is_installed(), reason="openSMILE is not installed (extra `egemaps`)"
)


@needs_opensmile
def test_egemaps_columns_are_the_spec(caplog: pytest.LogCaptureFixture) -> None:
    names = [name.rsplit("_sma3", 1)[0] for name in egemaps.egemaps_names()]
    assert tuple(names) == get_spec("egemaps25/1").names
    egemaps.egemaps_llds(tone(0.5, 16_000))
    assert sum("non-commercial" in r.getMessage() for r in caplog.records) <= 1


@needs_opensmile
@pytest.mark.parametrize("samples", [0, 100, 959, 960, 16_000])
def test_egemaps_of_short_and_silent_sound_is_finite(samples: int) -> None:
    track = describe_sound(np.zeros(samples, np.int16), 1.0, "egemaps25/1")
    assert track.values.shape[1] == 25
    assert len(track) > 0
    assert np.isfinite(track.values).all()
    assert track.values.min() >= -201


@needs_opensmile
def test_parity_with_opensmile(test_data: Callable[[str], Path]) -> None:
    """r of each column over the speech clips; pitch frames there start where ours are centred,
    20 ms earlier, so columns from the 60 ms frames are compared two frames apart."""
    ours, theirs = [], []
    for name in SPEECH:
        wave = speech(test_data("clips") / name)
        mine, other = llds(wave), egemaps.egemaps_llds(wave)
        n = min(len(other), len(mine) - 2)
        row = mine[:n].copy()
        row[:, 10:] = mine[2 : n + 2, 10:]
        ours.append(row)
        theirs.append(other[:n])
    a, b = np.concatenate(ours), np.concatenate(theirs)

    def r(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
        return float(np.corrcoef(x, y)[0, 1])

    spectral = {name: r(a[:, i], b[:, i]) for i, name in enumerate(SPEC.names[:10])}
    voiced, reference = a[:, 11] > 0, b[:, 10] > 0
    both = voiced & reference
    found = {
        **spectral,
        "F0semitone": r(a[both, 10], b[both, 10]),
        "HNR": r(a[both, 12], b[both, 13]),
        "voicing": float((voiced == reference).mean()),
    }
    print({name: round(value, 4) for name, value in found.items()})
    assert min(v for k, v in found.items() if k not in ("HNR", "voicing", "slope500-1500")) >= 0.98
    assert found["slope500-1500"] >= 0.9
    assert found["HNR"] >= 0.9
    assert found["voicing"] >= 0.9
    # The same units too, not only the same shape.
    for i in range(10):
        slope = np.polyfit(a[:, i], b[:, i], 1)[0]
        assert slope == pytest.approx(1.0, abs=0.02), SPEC.names[i]
