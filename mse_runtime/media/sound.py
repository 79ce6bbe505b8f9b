"""The sound of a clip as 16 kHz mono int16, placed by its timestamps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import av.error
import numpy as np
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from mse_runtime.media.packets import Damage, packets
from mse_runtime.media.probe import MAX_RATE, MIN_RATE, ClipInfo, Window, cut_warning, open_clip
from mse_runtime.records import dataclass

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame

__all__ = ["RATE", "SoundReader", "Waveform"]

RATE = 16_000
_SLACK = 0.05
"""Seconds a timestamp may be off before it counts as a gap or an overlap."""
_TOLERATED = 200
"""Refused packets after which the rest is given up."""
_LONGEST_GAP = 600.0
"""Seconds of silence that a broken timestamp may at most make up."""


@dataclass(frozen=True)
class Waveform:
    """Mono sound."""

    samples: NDArray[np.int16]
    """[n] at 16 kHz; gaps in the file are silence."""
    start: float
    """Seconds on the clip's clock of the first sample: later than the window where the sound is."""
    warnings: tuple[str, ...]

    @property
    def end(self) -> float:
        return self.start + len(self.samples) / RATE


class SoundReader:
    """Reads one window of a clip's sound.

    Resampled to int16 rather than float: FFmpeg normalises the downmix only for integers, so
    stereo would otherwise come out a factor of sqrt 2 louder than the same sound in mono.
    """

    def __init__(self, info: ClipInfo, window: Window) -> None:
        self._info = info
        self._window = window
        self._pieces: list[NDArray[np.int16]] = []
        self._begin: int | None = None
        """Where the kept samples begin and end, in samples on the clip's clock."""
        self._end = 0
        self._cursor = 0
        """Where the resampler's next sample belongs."""
        self._expected = 0.0
        """Timestamp that would follow without a gap."""
        self._resampler: AudioResampler | None = None
        self._kind: tuple[int, str, str] | None = None
        self._damage = Damage("the sound")
        self._more = False

    def read(self) -> Waveform | None:
        """Decode the window; None for a clip without sound, no samples for a window without.

        Raises:
            MediaError: the file vanished or changed since it was probed.
        """
        audio = self._info.audio
        if audio is None:
            return None
        with open_clip(self._info.path) as container:
            stream = container.streams[audio.index]
            for packet in packets(container, stream, self._info, self._window, self._damage):
                try:
                    frames = cast("list[AudioFrame]", packet.decode())
                    full = not all(self._take(frame) for frame in frames)
                except (av.error.FFmpegError, OSError):
                    self._resampler = None  # a frame can contradict itself after decoding, too
                    self._damage.packets += 1
                    if self._damage.packets > _TOLERATED:
                        self._damage.cut = "too much of it is damaged"
                        break
                    continue
                if full:
                    break
            self._flush()
        warnings = self._damage.warnings()
        if self._more and self._window.capped and self._info.duration is None:
            warnings.append(cut_warning(self._window))
        samples = np.concatenate([np.zeros(0, np.int16), *self._pieces])
        start = self._window.start if self._begin is None else self._begin / RATE
        return Waveform(samples, start, tuple(warnings))

    def _take(self, frame: AudioFrame) -> bool:
        """Resample and place one frame; False once the window is full."""
        if not MIN_RATE <= frame.sample_rate <= MAX_RATE:
            self._damage.frames += 1
            return True
        when = self._expected if frame.time is None else frame.time - self._info.origin
        if when >= self._window.end:
            self._more = True
            return False
        kind = (frame.sample_rate, frame.layout.name, frame.format.name)
        if self._resampler is None or kind != self._kind or abs(when - self._expected) > _SLACK:
            self._flush()
            if self._begin is not None and when - self._end / RATE > _LONGEST_GAP:
                self._damage.cut = f"a jump of {when - self._end / RATE:.0f} s"
                return False
            self._cursor = round(when * RATE)
            self._resampler = AudioResampler("s16", "mono", RATE)
            self._kind = kind
            self._expected = when
        self._expected += frame.samples / frame.sample_rate
        # Stamps that step back by a little would be refused by the resampler's own clock.
        frame.pts = None
        self._keep(self._resampler.resample(frame))
        return True

    def _flush(self) -> None:
        if self._resampler is not None:
            self._keep(self._resampler.resample(None))
            self._resampler = None

    def _keep(self, frames: list[AudioFrame]) -> None:
        """Append what lies in the window and wasn't heard yet; fill a gap with silence."""
        for frame in frames:
            samples = np.frombuffer(memoryview(frame.planes[0]), np.int16, count=frame.samples)
            first, self._cursor = self._cursor, self._cursor + len(samples)
            low = self._end if self._begin is not None else math.ceil(self._window.start * RATE)
            high = self._cursor
            if math.isfinite(self._window.end):
                high = min(high, math.ceil(self._window.end * RATE))
            if high <= max(low, first):
                continue
            if self._begin is None:
                self._begin = self._end = max(low, first)
            if first > self._end:
                self._pieces.append(np.zeros(first - self._end, np.int16))
            self._pieces.append(samples[max(self._end, first) - first : high - first].copy())
            self._end = high
