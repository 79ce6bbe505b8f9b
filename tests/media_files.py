"""Clips made on the spot for tests: every trap of real files, without a file from anywhere.

Frames carry their number as bright and dark blocks (`frame_number` reads it back from what was
decoded), so tests can tell which frame was taken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "corrupt",
    "frame_number",
    "numbered_frame",
    "rotate_mp4",
    "tone",
    "two_hours",
    "write_clip",
]

SIZE = (256, 160)
BITS = 8


def numbered_frame(number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """A grey frame [H, W, 3] whose upper half shows `number` in binary, lowest bit left."""
    width, height = size
    image = np.full((height, width, 3), 96, np.uint8)
    block = width // BITS
    for bit in range(BITS):
        value = 235 if number >> bit & 1 else 20
        image[: height // 2, bit * block : (bit + 1) * block] = value
    return image


def frame_number(image: NDArray[np.uint8]) -> int:
    """The number that `numbered_frame` painted, read from any decoded and scaled picture."""
    height, width = image.shape[:2]
    block = width / BITS
    row = image[height // 4, :, :3].mean(1)
    return sum(int(row[int((bit + 0.5) * block)] > 128) << bit for bit in range(BITS))


def tone(
    seconds: float, rate: int, hertz: float = 220.0, amplitude: float = 0.25
) -> NDArray[np.int16]:
    """A voice-like sum of five harmonics, int16 [n], peak at `amplitude`."""
    t = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * hertz * k * t) / k for k in range(1, 6))
    return (wave / np.abs(wave).max() * amplitude * 32767).astype(np.int16)


def write_clip(
    path: Path,
    *,
    seconds: float = 2.0,
    fps: int = 25,
    size: tuple[int, int] = SIZE,
    video: str | None = "libx264",
    pix_fmt: str = "yuv420p",
    frame_times: Sequence[float] | None = None,
    video_start: float = 0.0,
    audio: str | None = "aac",
    rate: int = 44_100,
    layout: str = "stereo",
    samples: NDArray[np.int16] | None = None,
    audio_start: float = 0.0,
    options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """A clip of numbered frames and a tone (or `samples`, mono, copied to all channels)."""
    with av.open(str(path), "w", options=options or {}, format=format) as out:
        work: list[tuple[float, Any, Any]] = []
        if video is not None:
            stream = out.add_stream(video, rate=fps)
            stream.width, stream.height = size
            stream.pix_fmt = pix_fmt
            stream.codec_context.gop_size = fps
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            times = frame_times
            if times is None:
                times = [i / fps for i in range(round(seconds * fps))]
            for number, when in enumerate(times):
                frame = av.VideoFrame.from_ndarray(numbered_frame(number, size), "rgb24")
                frame = frame.reformat(format=pix_fmt)
                frame.pts = round((when + video_start) * 1000)
                frame.time_base = Fraction(1, 1000)
                work.append((when + video_start, stream, frame))
        if audio is not None:
            sound = out.add_stream(audio, rate=rate, layout=layout)
            wave = tone(seconds, rate) if samples is None else samples
            work += [
                (when + audio_start, sound, frame)
                for when, frame in _audio_frames(wave, rate, layout, audio_start)
            ]
        for _, stream, frame in sorted(work, key=lambda item: item[0]):
            out.mux(stream.encode(frame))
        for stream in {id(s): s for _, s, _ in work}.values():
            out.mux(stream.encode(None))
    return path


def _audio_frames(
    wave: NDArray[np.int16], rate: int, layout: str, start: float
) -> Iterable[tuple[float, av.AudioFrame]]:
    channels = av.AudioLayout(layout).nb_channels
    for begin in range(0, len(wave), 1024):
        part = np.repeat(wave[begin : begin + 1024], channels)[None]
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), "s16", layout)
        frame.sample_rate = rate
        frame.time_base = Fraction(1, rate)
        frame.pts = begin + round(start * rate)
        yield begin / rate, frame


def rotate_mp4(path: Path, degrees: int) -> None:
    """Set the display matrix of the first track, as phones do: turn by `degrees` clockwise."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    data = bytearray(path.read_bytes())
    # tkhd: size, type, version and flags, then (version 0) 36 bytes before the matrix.
    at = data.index(b"tkhd") + 4 + 4 + 36
    data[at : at + 36] = matrix
    path.write_bytes(data)


def corrupt(path: Path, *, begin: float, end: float, every: int = 97, seed: int = 0) -> None:
    """Overwrite every so many bytes between two shares of the file's length."""
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(seed)
    for at in range(int(len(data) * begin), int(len(data) * end), every):
        data[at] = noise.integers(256)
    path.write_bytes(data)


def two_hours(path: Path, seconds: int = 7200) -> Path:
    """A clip of two hours in a second: one encoded second, muxed again and again.

    25 frames, numbered from 0, and 16 AAC packets of 64 ms make a turn of 1.024 s.
    """
    piece = path.with_name("second" + path.suffix)
    small = {"size": (128, 80), "video": "mpeg4", "rate": 16_000, "layout": "mono"}
    write_clip(piece, seconds=1.0, **small)  # type: ignore[arg-type]
    turn = Fraction(1024, 1000)
    with av.open(str(piece)) as source, av.open(str(path), "w") as out:
        streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
        first = [p for p in source.demux() if p.size and p.dts is not None and p.dts >= 0]
        queues = [[p for p in first if p.stream_index == i][:n] for i, n in ((0, 25), (1, 16))]
        packets = sorted(
            ((p.dts * p.time_base, p.stream_index, bytes(p), p) for q in queues for p in q),
            key=lambda item: item[0],
        )
        for number in range(int(seconds / turn)):
            for _, index, data, packet in packets:
                copy = av.Packet(data)
                shift = int(number * turn / packet.time_base)
                copy.pts, copy.dts = packet.pts + shift, packet.dts + shift
                copy.duration, copy.time_base = packet.duration, packet.time_base
                copy.is_keyframe = packet.is_keyframe
                copy.stream = streams[index]
                out.mux_one(copy)
    return path
