"""Pitch, voicing and harmonics-to-noise ratio from the autocorrelation.

Boersma 1993, "Accurate short-term analysis of the fundamental frequency and the
harmonics-to-noise ratio of a sampled sound": candidates are peaks of the autocorrelation freed of
the window's own, and a Viterbi search joins them into a smooth contour. Voicing and HNR are read
from the plain autocorrelation at the chosen lag, as in Eyben et al. 2016.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["track"]

RATE = 16_000
HOP = 160
CENTRE = 160
"""Sample on which frame 0 is centred: the middle of its 20 ms."""
WINDOW = 960
"""60 ms: three periods of the lowest pitch."""

_NFFT = 1280
"""At least window + longest lag, so that nothing wraps around; 2^8 * 5."""
_LOWEST, _HIGHEST = 55.0, 500.0
_LAGS = round(RATE / _LOWEST) + 2
_CANDIDATES = 6
# The four below were searched over seven speech clips against openSMILE (tests/test_audio.py).
_OCTAVE_COST = 0.05
"""Preference for the shorter of two equally good lags, per octave."""
_JUMP_COST = 0.3
"""Cost of one octave between neighbouring frames."""
_VOICED_PEAK = 0.55
_SILENCE = 0.03
"""Frames under this share of the clip's loudest frame are unvoiced, whatever their shape."""
_BLOCK = 250
"""Frames transformed at once: about 3 MB."""

Array = NDArray[np.float32]


def track(x: Array, count: int) -> tuple[Array, NDArray[np.bool_], Array]:
    """Pitch of `count` frames, each 60 ms around sample 160 + i * 160.

    Args:
        x: float32 [n], 16 kHz, -1..1, n >= 320.
        count: frames, at least 1.

    Returns:
        F0 in semitones over 27.5 Hz, voiced, HNR in dB; all [count], 0 where unvoiced.
    """
    lags, scores, refined, heights, power = _candidates(x, count)
    best = np.arange(count), _path(scores, np.log2(lags.astype(np.float32)))
    lag, height = refined[best], heights[best]
    voiced = (height > _VOICED_PEAK) & (power > power.max() * _SILENCE**2)
    f0 = 12 * np.log2(np.where(voiced, RATE / lag, 27.5) / 27.5)
    ratio = np.clip(height, 1e-4, 1 - 1e-4)
    hnr = np.where(voiced, 10 * np.log10(ratio / (1 - ratio)), 0)
    return f0.astype(np.float32), voiced, hnr.astype(np.float32)


def _candidates(x: Array, count: int) -> tuple[NDArray[np.int64], Array, Array, Array, Array]:
    """Whole lags, scores, refined lags and plain heights [count, k] of the best peaks; power."""
    lags = np.empty((count, _CANDIDATES), np.int64)
    scores, refined, heights = (np.empty((count, _CANDIDATES), np.float32) for _ in range(3))
    power = np.empty(count, np.float32)
    half = WINDOW // 2
    padded = np.concatenate([np.zeros(half, np.float32), x, np.zeros(half + HOP, np.float32)])
    own = _window()[1]
    for begin in range(0, count, _BLOCK):
        rows = slice(begin, min(begin + _BLOCK, count))
        length = (rows.stop - begin - 1) * HOP + WINDOW
        piece = padded[CENTRE + begin * HOP :][:length]
        frames = np.lib.stride_tricks.sliding_window_view(piece, WINDOW)[::HOP]
        corr, power[rows] = _autocorrelation(frames)
        lags[rows], scores[rows], refined[rows], peak = _peaks(corr)
        heights[rows] = peak * own[lags[rows]]
    return lags, scores, refined, heights, power


def _autocorrelation(frames: Array) -> tuple[Array, Array]:
    """Autocorrelation freed of the window's own (Boersma 1993, eq. 9) [n, lags], and the power."""
    window, own = _window()
    shaped = (frames - frames.mean(1, keepdims=True)) * window
    spectrum = np.fft.rfft(shaped, _NFFT)
    plain = np.fft.irfft(spectrum.real**2 + spectrum.imag**2, _NFFT)[:, : len(own)]
    energy = plain[:, 0].astype(np.float32)
    corr = plain / np.maximum(energy, 1e-12)[:, None] / own
    return corr.astype(np.float32, copy=False), energy * np.float32(1 / WINDOW)


def _peaks(corr: Array) -> tuple[NDArray[np.int64], Array, Array, Array]:
    """Per frame the best-scored local maxima: lags, scores, parabola-refined lags, heights."""
    first, last = round(RATE / _HIGHEST), round(RATE / _LOWEST)
    octaves = np.log2(np.arange(first, last + 1) / first)
    cost = (_OCTAVE_COST * octaves[1:-1]).astype(np.float32)
    view = corr[:, first : last + 1]
    inner = view[:, 1:-1]
    is_peak = (inner > view[:, :-2]) & (inner >= view[:, 2:])
    score = np.where(is_peak, inner - cost, np.float32(-1))
    best = np.argpartition(-score, _CANDIDATES, axis=1)[:, :_CANDIDATES]
    lags = best + first + 1
    at = np.arange(len(corr))[:, None]
    left, middle, right = corr[at, lags - 1], corr[at, lags], corr[at, lags + 1]
    bend = np.minimum(left - 2 * middle + right, -1e-9)
    shift = np.clip(0.5 * (left - right) / bend, -0.5, 0.5)
    return lags, np.take_along_axis(score, best, 1), lags + shift, middle


def _path(scores: Array, octaves: Array) -> NDArray[np.int64]:
    """The candidate of each frame on the path of highest score less the cost of its jumps."""
    count, width = scores.shape
    jumps = np.float32(_JUMP_COST) * np.abs(octaves[1:, :, None] - octaves[:-1, None, :])
    back = np.empty((count, width), np.int64)
    lanes = np.arange(width)
    total = -scores[0]
    for t in range(1, count):
        options = jumps[t - 1] + total
        back[t] = came = options.argmin(1)
        total = options[lanes, came] - scores[t]
    path = np.empty(count, np.int64)
    lane = int(total.argmin())
    for t in range(count - 1, -1, -1):
        path[t] = lane
        lane = back[t, lane]
    return path


@lru_cache(maxsize=1)
def _window() -> tuple[Array, Array]:
    """Hann window of 60 ms and its normalised autocorrelation over the lags in use."""
    window = np.hanning(WINDOW)
    own = np.fft.irfft(np.abs(np.fft.rfft(window, _NFFT)) ** 2, _NFFT)[:_LAGS]
    return window.astype(np.float32), (own / own[0]).astype(np.float32)
