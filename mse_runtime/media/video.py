"""Frames of a clip, sampled on a regular grid by their timestamps.

At each grid time the frame that a player would show is taken: frame counts and frame rates in
headers are not trusted, and a variable rate needs no special care.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, cast

import av.error
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from mse_runtime.errors import MediaError, UsageError
from mse_runtime.media.packets import Damage, packets, seconds
from mse_runtime.media.probe import MAX_PIXELS, ClipInfo, Window, cut_warning, open_clip
from mse_runtime.records import dataclass

if TYPE_CHECKING:
    from av.packet import Packet
    from av.stream import Stream
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame

__all__ = ["LONG_SIDE", "FrameReader", "Sample"]

LONG_SIDE = 640
"""Pixels of the longer side that frames are scaled down to, in the same pass as the colours."""
_EPSILON = 1e-3
"""Seconds: timestamps are rounded to the container's clock."""
_TOLERATED = 500
_REORDER = 20
"""Packets read ahead; codecs reorder frames by 16 places at most."""
_SHORTEST = 0.04
"""Seconds a last frame of unknown length is taken to be shown."""
_LONGEST = 60.0
"""Seconds a frame is taken to be shown at most: a broken timestamp must not mean a million rows."""
_BIG = 1280 * 720
"""Pictures from this size on are worth a second decoding thread."""


@dataclass(frozen=True)
class Sample:
    """One sampled frame."""

    image: NDArray[np.uint8]
    """[H, W, 4]: red, green, blue, unused; upright, square pixels, long side <= 640. A view of
    the decoder's memory that keeps it alive."""
    time: float
    """Grid time in seconds on the clip's clock."""


class FrameReader:
    """Iterates over one window's frames at `fps`; afterwards `warnings` and `stats` are filled.

    What comes out doesn't depend on `threads`.
    """

    def __init__(self, info: ClipInfo, window: Window, fps: float, *, threads: int = 1) -> None:
        if not 0 < fps <= 120:
            raise UsageError(f"{fps:g} frames a second can't be sampled. Give --fps 1 to 30.")
        self._info = info
        self._window = window
        self._step = 1.0 / fps
        self._threads = threads
        self._damage = Damage("the picture")
        self._scale = VideoReformatter()
        self._index = math.ceil((window.start - _EPSILON) * fps)
        self._held: tuple[VideoFrame, float, float] | None = None
        """The newest frame, its time and how long it is shown."""
        self.warnings: list[str] = []
        self.stats: dict[str, Any] = {"packets": 0, "decoded": 0, "sampled": 0, "end": None}

    def __iter__(self) -> Iterator[Sample]:
        video = self._info.video
        if video is None:
            return
        with open_clip(self._info.path) as container:
            stream = container.streams[video.index]
            context = cast("VideoCodecContext", stream.codec_context)
            if video.width * video.height >= _BIG and self._threads > 1:
                context.thread_count = min(self._threads, 4)
                context.thread_type = "FRAME"
            else:
                context.thread_count = 1
            yield from self._samples(
                packets(container, stream, self._info, self._window, self._damage), context
            )
            self._held = None
        self.warnings += self._damage.warnings()

    def _samples(
        self, source: Iterator[Packet[Stream]], context: VideoCodecContext
    ) -> Iterator[Sample]:
        for packet, wanted in self._marked(source):
            self.stats["packets"] += packet.size > 0
            # Lets the decoder leave out what nothing refers to and nobody sees.
            context.skip_frame = "DEFAULT" if wanted else "NONREF"
            try:
                frames = cast("list[VideoFrame]", packet.decode())
            except (av.error.FFmpegError, OSError):
                self._damage.packets += 1
                if self._damage.packets > _TOLERATED:
                    self._damage.cut = "too much of it is damaged"
                    break
                continue
            self._damage.frames += packet.is_corrupt
            for frame in frames:
                when = self._when(frame)
                yield from self._shown_before(min(when, self._window.end))
                if when >= self._window.end:
                    if self._window.capped and self._info.duration is None:
                        self.warnings.append(cut_warning(self._window))
                    return
                self._hold(frame, when)
        if self._held is not None:
            _, when, shown = self._held
            yield from self._shown_before(min(when + shown, self._window.end))

    def _hold(self, frame: VideoFrame, when: float) -> None:
        self.stats["decoded"] += 1
        self._damage.frames += frame.is_corrupt
        base = frame.time_base
        shown = float(frame.duration * base) if frame.duration and base else 0.0
        if self._held is not None and not shown:
            shown = when - self._held[1]
        self._held = frame, when, min(max(shown, _SHORTEST), 10.0)
        self.stats["end"] = when + self._held[2]

    def _shown_before(self, until: float) -> Iterator[Sample]:
        """The held frame at each grid time from its own on and before `until`."""
        if self._held is None:
            return
        frame, when, _ = self._held
        until = min(until, when + _LONGEST)
        self._index = max(self._index, math.ceil((when - _EPSILON) / self._step))
        image: NDArray[np.uint8] | None = None
        while self._index * self._step < until - _EPSILON:
            if image is None:
                image = self._picture(frame)
            self.stats["sampled"] += 1
            yield Sample(image, self._index * self._step)
            self._index += 1

    def _when(self, frame: VideoFrame) -> float:
        if frame.pts is not None:
            return frame.time - self._info.origin
        # Raw streams have no timestamps: count on from the last one.
        return 0.0 if self._held is None else self._held[1] + self._held[2]

    def _marked(self, source: Iterator[Packet[Stream]]) -> Iterator[tuple[Packet[Stream], bool]]:
        """Packets, and whether a grid time shows what they hold.

        A frame is shown until the next one's time. Packets come in the order of decoding, so a few
        are read ahead to find it; their declared durations are wrong where the rate varies.
        """
        ahead: deque[Packet[Stream]] = deque()
        stamps: list[int] = []
        for packet in chain(source, repeat(None, _REORDER)):
            if packet is not None:
                ahead.append(packet)
                if packet.pts is not None:
                    insort(stamps, packet.pts)
            if ahead and (packet is None or len(ahead) > _REORDER):
                oldest = ahead.popleft()
                yield oldest, self._is_shown(oldest, stamps)
                del stamps[: max(0, len(stamps) - 4 * _REORDER)]

    def _is_shown(self, packet: Packet[Stream], stamps: list[int]) -> bool:
        if packet.pts is None:
            return True
        later = bisect_right(stamps, packet.pts)
        if later == len(stamps):
            return True
        begin = seconds(packet.pts, packet, self._info) - 2 * _EPSILON
        end = seconds(stamps[later], packet, self._info) + 2 * _EPSILON
        first = math.ceil(max(begin, self._window.start) / self._step) * self._step
        return first < end

    def _picture(self, frame: VideoFrame) -> NDArray[np.uint8]:
        width, height = frame.width, frame.height
        if width * height > MAX_PIXELS:
            raise MediaError(f"{self._info.path} grows to {width}x{height} pixels part-way.")
        video = self._info.video
        aspect = 1.0 if video is None else video.pixel_aspect
        shown_width = width * min(max(aspect, 0.25), 4.0)
        scale = min(1.0, LONG_SIDE / max(shown_width, height))
        try:
            out = self._scale.reformat(
                frame,
                width=max(1, round(shown_width * scale)),
                height=max(1, round(height * scale)),
                format="rgb0",
                interpolation=Interpolation.BILINEAR,
            )
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{self._info.path}: its {frame.format.name} pictures of {width}x{height} cannot "
                f"be converted ({error}). Convert the clip with ffmpeg first."
            ) from error
        plane = out.planes[0]
        image: NDArray[np.uint8] = np.ndarray(
            (out.height, out.width, 4),
            np.uint8,
            buffer=memoryview(plane),
            strides=(plane.line_size, 4, 1),
        )
        turns = round(frame.rotation / 90) % 4
        # Phones store how far to turn counter-clockwise; the pixels lie as the sensor does.
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
