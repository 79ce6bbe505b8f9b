"""Synthetic speech with emotional prosody: espeak-ng, then tilt, breath, tremor, room and noise.

espeak-ng (GPL-3) is a program that must be on the PATH when the bundle is made; its output carries
no licence, and nothing of it is shipped. Everything after it is NumPy.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import wave
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import UsageError

__all__ = ["HELD_OUT_VOICES", "RATE", "TRAINING_VOICES", "Speaker", "random_speaker", "speak"]

RATE = 16000
_SOURCE_RATE = 22050
#: espeak-ng's variants; whispering, croaking and the robots are left out.
TRAINING_VOICES = ("m1", "m2", "m3", "m4", "m6", "f1", "f2", "f3", "michael", "linda")
HELD_OUT_VOICES = ("m5", "m7", "f4", "f5")
_ACCENTS = ("en-us", "en-us", "en-gb", "en-gb-x-rp")

Audio = NDArray[np.float32]


@dataclass(frozen=True)
class _Prosody:
    """A manner of speaking at full intensity, as differences from the speaker's own."""

    pitch: float = 0.0
    """espeak-ng's pitch, -50..+49."""
    span: float = 100.0
    """Pitch range, per cent."""
    rate: float = 1.0
    gain: float = 0.0
    """dB."""
    tilt: float = 0.0
    """dB above 1 kHz."""
    breath: float = 0.0
    tremolo: float = 0.0
    jitter: float = 0.0


#: By index into `lexicon.EMOTIONS`.
_MANNERS = {
    0: _Prosody(),
    4: _Prosody(14, 170, 1.10, 3, 1.5, 0.0, 0.03, 0.0),
    6: _Prosody(6, 160, 1.15, 6, 4.5, 0.0, 0.0, 0.004),
    3: _Prosody(-10, 45, 0.78, -5, -4.5, 0.10, 0.02, 0.0),
    2: _Prosody(22, 70, 1.18, -2, -0.75, 0.08, 0.12, 0.008),
}


@dataclass(frozen=True)
class Speaker:
    """A voice: espeak-ng's variant and what makes it this person's."""

    voice: str
    pitch: float
    span: float
    rate: float
    shift: float
    """Semitones by which pitch and formants are moved together."""
    gain: float
    tilt: float
    breath: float


def random_speaker(rng: np.random.Generator, voices: tuple[str, ...]) -> Speaker:
    """A speaker with one of espeak-ng's variants."""
    return Speaker(
        voice=f"{_ACCENTS[rng.integers(len(_ACCENTS))]}+{voices[rng.integers(len(voices))]}",
        pitch=float(np.clip(rng.normal(50, 6), 30, 65)),
        span=float(rng.uniform(80, 120)),
        rate=float(rng.uniform(155, 190)),
        shift=float(rng.normal(0, 0.8)),
        gain=float(rng.normal(0, 2)),
        tilt=float(rng.normal(0, 0.8)),
        breath=float(max(0.0, rng.normal(0, 0.02))),
    )


def _espeak(text: str, voice: str, pitch: float, span: float, rate: float) -> Audio:
    """Speech, float32 at 22.05 kHz. Raises UsageError where espeak-ng is not installed."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise UsageError(
            "mse-train tiny needs the program espeak-ng to make its actors' voices: "
            "apt-get install espeak-ng (the bundle itself never needs it)."
        )
    markup = f'<speak><prosody range="{round(span)}%">{escape(text)}</prosody></speak>'
    options = ["-m", "-v", voice, "-p", str(round(pitch)), "-s", str(round(rate)), "--stdout"]
    done = subprocess.run([program, *options, markup], capture_output=True, check=True)
    with wave.open(io.BytesIO(done.stdout)) as file:
        # The header of a stream says nothing true about its length.
        raw = file.readframes(1 << 24)
    return np.asarray(np.frombuffer(raw, np.int16) / np.float32(32768), np.float32)


def _resample(x: Audio, rate: float) -> Audio:
    """From `rate` to 16 kHz, band limited (the whole clip's spectrum at once)."""
    count = max(round(len(x) * RATE / rate), 1)
    spectrum = np.fft.rfft(x)
    bins = count // 2 + 1
    out = np.zeros(bins, np.complex128)
    kept = min(bins, len(spectrum))
    out[:kept] = spectrum[:kept]
    return np.asarray(np.fft.irfft(out, count) * (count / len(x)), np.float32)


def _warp(x: Audio, depth: float, rng: np.random.Generator) -> Audio:
    """Pitch tremor around 6 Hz and slow random jitter, by warping time."""
    n = len(x)
    seconds = np.arange(n) / RATE
    knots = np.arange(0, n / RATE + 0.02, 0.008)
    wander = np.interp(seconds, knots, rng.normal(0, 1, len(knots)))
    tremor = 2 * np.sin(2 * np.pi * rng.uniform(5, 7) * seconds + rng.uniform(0, 6))
    place = np.cumsum(1 + depth * (tremor + wander))
    return np.asarray(np.interp(place * ((n - 1) / place[-1]), np.arange(n), x), np.float32)


def _tilted(x: Audio, decibel: float) -> Audio:
    """A smooth shelf around 1 kHz."""
    spectrum = np.fft.rfft(x)
    frequency = np.fft.rfftfreq(len(x), 1 / RATE)
    share = 1 / (1 + (1000 / np.maximum(frequency, 1)) ** 2)
    return np.asarray(np.fft.irfft(spectrum * 10 ** (decibel * share / 20), len(x)), np.float32)


def _breathy(x: Audio, amount: float, rng: np.random.Generator) -> Audio:
    """Add noise that follows the voice's envelope."""
    window = np.ones(200) / 200
    envelope = np.sqrt(np.convolve(x.astype(np.float64) ** 2, window, "same") + 1e-9)
    noise = np.diff(rng.normal(0, 0.7, len(x) + 1))
    return (x + amount * envelope * noise).astype(np.float32)


def _in_room(x: Audio, rng: np.random.Generator) -> Audio:
    """Add a short diffuse reverberation."""
    length = int(0.18 * RATE)
    decay = np.exp(-np.arange(length) / RATE / rng.uniform(0.03, 0.07))
    response = rng.normal(0, 1, length) * decay
    response /= np.sqrt((response**2).sum())
    size = len(x) + length
    wet = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(response, size), size)[: len(x)]
    return (x + rng.uniform(0.1, 0.4) * wet).astype(np.float32)


def speak(
    text: str,
    speaker: Speaker,
    emotion: int,
    intensity: float,
    rng: np.random.Generator,
    *,
    clean: bool = False,
) -> NDArray[np.int16]:
    """Speech, int16 [n] mono at 16 kHz, of `text` with an emotion's manner (0..1).

    `clean` leaves out room, noise and the recording's level.
    """
    manner, k = _MANNERS[emotion], intensity
    span = speaker.span * (1 + (manner.span / 100 - 1) * k) * (1 + rng.normal(0, 0.06))
    rate = speaker.rate * (1 + (manner.rate - 1) * k) * (1 + rng.normal(0, 0.03))
    pitch = speaker.pitch + manner.pitch * k + rng.normal(0, 2)
    x = _espeak(
        text, speaker.voice, float(np.clip(pitch, 0, 99)), float(np.clip(span, 10, 300)), rate
    )
    x = _resample(x, _SOURCE_RATE * 2 ** (speaker.shift / 12))
    if manner.jitter * k > 0 and len(x) > RATE // 4:
        x = _warp(x, manner.jitter * k, rng)
    x = _tilted(x, manner.tilt * k * 1.5 + speaker.tilt + rng.normal(0, 0.3))
    breath = manner.breath * k + speaker.breath
    if breath > 0:
        x = _breathy(x, breath, rng)
    if manner.tremolo * k > 0:
        beat = 2 * np.pi * rng.uniform(5, 8) * np.arange(len(x)) / RATE
        x = x * (1 + manner.tremolo * k * np.sin(beat)).astype(np.float32)
    level = manner.gain * k + speaker.gain + (0.0 if clean else float(rng.normal(0, 2)))
    x = x * np.float32(10 ** (level / 20) * 0.5)
    if not clean:
        if rng.random() < 0.5:
            x = _in_room(x, rng)
        # Brownish noise under the speech.
        noise = np.cumsum(rng.normal(0, 1, len(x)))
        noise -= np.convolve(noise, np.ones(400) / 400, "same")
        power = np.sqrt(float((x.astype(np.float64) ** 2).mean()) + 1e-12)
        x = x + noise / (noise.std() + 1e-9) * power * 10 ** (-rng.uniform(15, 40) / 20)
    return np.asarray(np.clip(np.round(x * 32767), -32768, 32767), np.int16)
