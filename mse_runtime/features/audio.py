"""Thirteen acoustic low-level descriptors of speech in vectorised numpy (`lld13/1`).

Definitions: Eyben et al. 2016 (GeMAPS), Hermansky 1990 (equal loudness, cubic-root compression),
Davis & Mermelstein 1980 (MFCC), Boersma 1993 (window-compensated autocorrelation, HNR).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.features import pitch
from mse_runtime.features.spec import FeatureTrack

__all__ = ["FRAME", "HOP", "POOL", "RATE", "lld13", "llds"]

RATE = 16_000
"""Samples a second."""
HOP = 160
"""Samples between frames: 10 ms."""
FRAME = 320
"""Samples in a frame: 20 ms."""
POOL = 5
"""Frames in a row of `lld13/1`: 50 ms."""

_NFFT = 512
_BANDS = 26
_QUEFRENCIES = 4
_LIFTER = 22
_BLOCK = 1000
"""Frames worked on at once: memory stays flat however long the clip is."""
_POWER_FLOOR = 1e-14
"""Keeps logarithms of digital silence finite; a 16-bit sample's last bit lies far above it."""
_LOUDNESS_SCALE = 0.056
"""Brings the sum over bands to the unit of the reference implementation (openSMILE)."""
_MEL_FLOOR = 1e-8
_BLAS_SERIAL = 200_000
"""Multiplications up to which OpenBLAS (2^18) stays on the calling thread."""
_F0, _VOICED, _HNR = 10, 11, 12

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]


def lld13(samples: NDArray[np.int16], start: float = 0.0) -> FeatureTrack:
    """The track `lld13/1`: descriptors pooled to 20 Hz.

    Args:
        samples: int16 [n] mono at 16 kHz.
        start: seconds on the clip's clock of the first sample.

    Returns:
        values [ceil(frames / 5), 13], all rows valid and finite; times are the pools' centres.
        Pitch and HNR are averaged over a pool's voiced frames (0 without any), the rest over all.
    """
    frames = llds(samples)
    n = len(frames)
    edges = np.arange(0, n, POOL)
    counts = np.diff(np.append(edges, n)).astype(np.float32)
    total = np.add.reduceat(frames, edges, axis=0) if n else np.zeros((0, 13), np.float32)
    values: Array = (total / counts[:, None]).astype(np.float32)
    # Unvoiced frames hold 0 in these two, so their sum is the sum over the voiced ones.
    voiced = np.maximum(total[:, _VOICED], 1.0)
    values[:, _F0] = total[:, _F0] / voiced
    values[:, _HNR] = total[:, _HNR] / voiced
    # Frame i is centred on (i + 1) hops; a pool on the mean of its frames' centres.
    times = start + (edges + (counts - 1) / 2 + 1) * (HOP / RATE)
    return FeatureTrack("lld13/1", values, np.ones(len(values), np.bool_), times.astype(np.float64))


def llds(samples: NDArray[np.int16]) -> Array:
    """The descriptors at 100 Hz, before pooling.

    Args:
        samples: int16 [n] mono at 16 kHz (or floats in -1..1); under 20 ms gives no frame.

    Returns:
        float32 [1 + (n - 320) // 160, 13], finite, in the order of `lld13/1`; frame i covers
        the 20 ms from i * 10 ms (pitch: 60 ms around the same centre). Smoothed over 3 frames,
        pitch and HNR within voiced stretches only.
    """
    x = _unit(samples)
    count = 1 + (len(x) - FRAME) // HOP if len(x) >= FRAME else 0
    if count == 0:
        return np.zeros((0, 13), np.float32)
    spectral = np.empty((count, 10), np.float32)
    last: Array | None = None
    for first in range(0, count, _BLOCK):
        until = min(first + _BLOCK, count)
        frames = _frames(x[first * HOP : (until - 1) * HOP + FRAME])
        magnitude = np.abs(np.fft.rfft(frames * _tables()["window"], _NFFT))
        spectral[first:until] = _spectral(magnitude, last)
        last = magnitude[-1]
    f0, voiced, hnr = pitch.track(x, count)
    out = np.empty((count, 13), np.float32)
    out[:, :10] = _smooth(spectral)
    out[:, _F0] = _smooth_voiced(f0, voiced)
    out[:, _VOICED] = voiced
    out[:, _HNR] = _smooth_voiced(hnr, voiced)
    return out


def _unit(samples: NDArray[Any]) -> Array:
    if samples.dtype == np.int16:
        return samples.astype(np.float32) * np.float32(1 / 32768)
    # Floats may hold NaN or overshoot; neither may travel on.
    return np.nan_to_num(samples.astype(np.float32), posinf=1.0, neginf=-1.0).clip(-1.0, 1.0)


def _frames(x: Array) -> Array:
    return np.lib.stride_tricks.sliding_window_view(x, FRAME)[::HOP]


def _spectral(magnitude: Array, before: Array | None) -> Array:
    """Ten descriptors from magnitude spectra [n, 257]; `before` is the previous frame's."""
    t = _tables()
    power = magnitude * magnitude
    mel = _product(power, t["mel"])
    db = 10 * np.log10(power + np.float32(_POWER_FLOOR))
    out = np.empty((len(power), 10), np.float32)
    out[:, 0] = np.cbrt(mel * t["loudness"]).sum(1) * np.float32(_LOUDNESS_SCALE)
    low, high = _product(power, t["alpha"]).T
    out[:, 1] = 10 * np.log10((high + _POWER_FLOOR) / (low + _POWER_FLOOR))
    out[:, 2] = db[:, _band(0, 2000)].max(1) - db[:, _band(2000, 5000)].max(1)
    out[:, 3:5] = _product(db, t["slopes"])
    voice = magnitude[:, _band(0, 5000)]
    first = voice[:1] if before is None else before[None, : voice.shape[1]]
    change = np.diff(voice, axis=0, prepend=first)
    out[:, 5] = np.sqrt(np.mean(change * change, axis=1))
    out[:, 6:10] = _product(np.log(np.maximum(mel, np.float32(_MEL_FLOOR))), t["cepstrum"])
    return out


def _product(rows: Array, matrix: Array) -> Array:
    """rows @ matrix, a few rows at a time.

    A larger product would wake the BLAS library's threads, which then spin for some 30 ms each
    time: on two cores they take them from the decoder and the face (measured: 0.2 s of 0.8 s CPU).
    """
    out = np.empty((len(rows), matrix.shape[1]), np.float32)
    step = max(1, _BLAS_SERIAL // matrix.size)
    for i in range(0, len(rows), step):
        np.matmul(rows[i : i + step], matrix, out=out[i : i + step])
    return out


def _band(low: float, high: float) -> slice:
    """Bins of the spectrum between two frequencies in Hz, both included."""
    step = RATE / _NFFT
    return slice(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)


@lru_cache(maxsize=1)
def _tables() -> dict[str, Array]:
    bins = np.arange(_NFFT // 2 + 1, dtype=np.float64) * (RATE / _NFFT)
    weights, centres = _mel_filters(bins)
    # Hermansky 1990: the ear's sensitivity at 40 phon, with the fall above 5 kHz; w = 2 pi f.
    w2 = (2 * np.pi * centres) ** 2
    ear = (w2 + 56.8e6) * w2**2
    ear /= (w2 + 6.3e6) ** 2 * (w2 + 0.38e9) * (w2**3 + 9.58e26)
    alpha = np.zeros((2, len(bins)))
    # 50 Hz lies within the bin of 31.25 Hz (16-47 Hz reach into it), so that bin counts.
    alpha[0, _band(31, 1000)] = 1
    alpha[1, _band(1000, 5000)] = 1
    n = np.arange(1, _QUEFRENCIES + 1)
    dct = np.cos(np.pi * np.outer(np.arange(_BANDS) + 0.5, n) / _BANDS) * np.sqrt(2 / _BANDS)
    lifter = 1 + _LIFTER / 2 * np.sin(np.pi * n / _LIFTER)
    tables = {
        "window": np.hamming(FRAME),
        "mel": weights.T,
        "loudness": ear / ear.max(),
        "alpha": alpha.T,
        "slopes": np.stack([_slope(bins, 0, 500), _slope(bins, 500, 1500)], axis=1),
        "cepstrum": dct * lifter,
    }
    return {name: np.ascontiguousarray(t, np.float32) for name, t in tables.items()}


def _mel_filters(bins: Doubles) -> tuple[Doubles, Doubles]:
    """Triangular filters [26, bins] evenly spaced on the mel scale, and their centres in Hz."""

    low, high = 1127.0 * np.log1p(np.array([20.0, 8000.0]) / 700.0)
    edges = np.linspace(low, high, _BANDS + 2)
    at = 1127.0 * np.log1p(bins / 700.0)[None]
    rise = (at - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - at) / np.diff(edges)[1:, None]
    return np.clip(np.minimum(rise, fall), 0, None), 700.0 * np.expm1(edges[1:-1] / 1127.0)


def _slope(bins: Doubles, low: float, high: float) -> Doubles:
    """Weights whose product with a dB spectrum is the slope of its regression line in dB/Hz.

    The normal equations count the band's width in bins (16 and 32), not its bins (17 and 33). An
    exact line differs by a share of the level; the reference implementation has this count, and
    published features with it: r = 0.9999 with it, 0.75 and 0.86 without.
    """
    band = _band(low, high)
    x = bins[band]
    n = (high - low) / (RATE / _NFFT)
    weights = np.zeros_like(bins)
    weights[band] = (n * x - x.sum()) / (n * (x @ x) - x.sum() ** 2)
    return weights


def _smooth(values: Array) -> Array:
    """Mean over 3 frames, the ends repeated."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    mean: Array = (padded[:-2] + padded[1:-1] + padded[2:]) / np.float32(3)
    return mean


def _smooth_voiced(values: Array, voiced: NDArray[np.bool_]) -> Array:
    """Mean over the voiced ones of 3 frames; 0 in unvoiced frames."""
    mask = np.pad(voiced, 1).astype(np.float32)
    held = np.pad(np.where(voiced, values, 0), 1).astype(np.float32)
    total = held[:-2] + held[1:-1] + held[2:]
    weight = mask[:-2] + mask[1:-1] + mask[2:]
    return np.where(voiced, total / np.maximum(weight, 1), 0).astype(np.float32)
