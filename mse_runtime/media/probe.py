"""What a file holds, and which part of it is read.

Times are seconds on the clip's clock: 0 is the container's first timestamp, so sound and picture
that start at different moments keep their distance.
"""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import av
import av.error
from av.stream import Disposition

from mse_runtime.errors import MediaError, UsageError
from mse_runtime.records import dataclass

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream

__all__ = ["AudioInfo", "ClipInfo", "VideoInfo", "Window", "open_clip", "plan_window", "probe"]

MAX_PIXELS = 8192 * 4320
"""Largest picture that is decoded (8K DCI); a decoder keeps several of them at 1.5 to 3 bytes."""
_SIZELESS = f"the picture has no size, or one over {MAX_PIXELS / 1e6:.0f} million pixels (8K)"
MAX_RATE = 768_000
MIN_RATE = 1_000

_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dv,eac3,flac,flv,gif,h264,h263,hevc,ivf,"
    "matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,m4v,mxf,nut,obu,ogg,rm,"
    "tta,vob,voc,w64,wav,wv,yuv4mpegpipe"
)
_IMAGES = (
    "image2,image2pipe,apng,bmp_pipe,dds_pipe,dpx_pipe,exr_pipe,gem_pipe,hdr_pipe,ico,j2k_pipe,"
    "jpeg_pipe,jpegls_pipe,jpegxl_pipe,pam_pipe,pbm_pipe,pcx_pipe,pgm_pipe,pgx_pipe,png_pipe,"
    "ppm_pipe,psd_pipe,qoi_pipe,sgi_pipe,sunrast_pipe,svg_pipe,tiff_pipe,webp_pipe,xbm_pipe,"
    "xpm_pipe"
)
_STILL = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails


@dataclass(frozen=True)
class AudioInfo:
    """The sound track that is read: the first that can be decoded."""

    index: int
    codec: str
    rate: int
    channels: int
    end: float | None
    """Seconds on the clip's clock at which the header says it ends."""


@dataclass(frozen=True)
class VideoInfo:
    """The moving picture that is read: the first that is neither cover art nor a thumbnail."""

    index: int
    codec: str
    width: int
    height: int
    rate: float
    """Average frames a second as declared; 0 if unknown. Never used to place frames."""
    pixel_aspect: float
    """Width of a pixel over its height."""
    end: float | None
    """Seconds on the clip's clock at which the header says it ends."""


@dataclass(frozen=True)
class ClipInfo:
    """What the container declares; nothing here was decoded."""

    path: Path
    format: str
    origin: float
    """Container timestamp, in seconds, that is 0 on the clip's clock."""
    duration: float | None
    """Declared seconds; None where the container doesn't say."""
    audio: AudioInfo | None
    video: VideoInfo | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Window:
    """The part of a clip that is read, in seconds on its clock: start <= t < end."""

    start: float
    end: float
    """Infinite where the clip's length is unknown and nothing limits it."""
    capped: bool
    """Whether `end` comes from the limit on length rather than from the user or the clip."""


def probe(path: str | Path) -> ClipInfo:
    """Open a clip, read its header, close it again.

    Raises:
        MediaError: no such file, not a regular file, not a clip, a still image, a picture larger
            than `MAX_PIXELS`, or neither sound nor moving picture in it.
    """
    with open_clip(path) as container:
        start = container.start_time
        origin = start / av.time_base if start is not None and abs(start) < 2**62 else 0.0
        sounds = (_audio_info(stream, origin) for stream in container.streams.audio)
        pictures = (_video_info(stream, origin) for stream in container.streams.video)
        audio = next(filter(None, sounds), None)
        video = next(filter(None, pictures), None)
        name = container.format.name
        if _is_image(name) or (video is None and audio is None and _has_stills(container)):
            raise MediaError(
                f"{path} is a still image: there is no voice and no movement to read. "
                "Give a video or sound file."
            )
        # A decoder that met a picture over its limit reports no size at all.
        sizeless = video is None and any(map(_is_sizeless, container.streams.video))
        if sizeless and audio is None:
            raise MediaError(f"{path}: {_SIZELESS}. Scale the clip down first.")
        if video is None and audio is None:
            raise MediaError(
                f"{path} ({name}) holds neither sound nor a moving picture that can be decoded. "
                "Give another file."
            )
        if video is not None and video.width * video.height > MAX_PIXELS:
            raise MediaError(
                f"{path} has pictures of {video.width}x{video.height}, over the limit of "
                f"{MAX_PIXELS / 1e6:.0f} million pixels (8K): decoding them takes too much memory. "
                "Scale the clip down first, for example to a height of 720."
            )
        length = container.duration
        duration = length / av.time_base if length is not None and length > 0 else None
        said = (f"{_SIZELESS}: the face is masked",) if sizeless else ()
        return ClipInfo(Path(path), name, origin, duration, audio, video, said)


def plan_window(
    info: ClipInfo, start: float | None, end: float | None, max_seconds: float | None
) -> tuple[Window, tuple[str, ...]]:
    """The part to read, and a warning where the limit cuts something off.

    Raises:
        UsageError: start or end out of order, or a start beyond the clip's end.
    """
    begin = 0.0 if start is None else float(start)
    known = math.inf if info.duration is None else info.duration
    stop = known if end is None else float(end)
    if not (math.isfinite(begin) and begin >= 0) or math.isnan(stop):
        raise UsageError(f"start {start} and end {end} must be seconds from 0 on")
    if begin >= known:
        raise UsageError(
            f"start {begin:g} s lies beyond the end of {info.path.name} ({known:.1f} s). "
            "Give a smaller --start."
        )
    if stop <= begin:
        raise UsageError(f"end {stop:g} s is not after start {begin:g} s. Swap them.")
    if max_seconds is not None and not max_seconds > 0:
        raise UsageError(f"the limit on length must be above 0 s, not {max_seconds:g}")
    limit = math.inf if max_seconds is None else begin + max_seconds
    if min(stop, known) <= limit:
        # An unknown length stays bounded by the limit; the readers tell whether more came.
        return Window(begin, min(stop, limit), False), ()
    capped = Window(begin, limit, True)
    if math.isinf(min(stop, known)):
        return capped, ()
    left = min(stop, known) - limit
    return capped, (cut_warning(capped, left),)


def cut_warning(window: Window, left: float | None = None) -> str:
    """What is said when the limit on length cuts the clip."""
    rest = "the rest is" if left is None else f"{left:.1f} s more are"
    return (
        f"only {window.end - window.start:g} s from {window.start:g} s on were read, {rest} left "
        "out: one utterance is expected (--max-seconds, or --start and --end)"
    )


def open_clip(path: str | Path) -> InputContainer:
    """Open a regular file for demuxing; playlists and other files' addresses are not followed.

    Raises:
        MediaError: see `probe`.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MediaError(f"cannot open {path}: {reason}. Check the path.") from error
    if stat.S_ISDIR(mode):
        raise MediaError(f"{path} is a folder. Name one clip in it.")
    if not stat.S_ISREG(mode):
        # A pipe has no end to seek from, and opening one blocks until somebody writes.
        raise MediaError(
            f"{path} is a pipe or device; clips are read from regular files. "
            "Save it to a file first."
        )
    try:
        # The whitelists keep playlists (HLS, concat, SDP) from naming other files or hosts.
        return av.open(
            str(Path(path).absolute()),
            mode="r",
            metadata_errors="ignore",
            container_options={
                "format_whitelist": f"{_FORMATS},{_IMAGES}",
                "protocol_whitelist": "file",
            },
            options={"max_pixels": str(MAX_PIXELS)},
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{path} is not a clip that can be read ({_reason(error)}): it is empty, damaged, cut "
            "off before its index, or of another kind. Try to play or convert it with ffmpeg."
        ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _is_image(format_name: str) -> bool:
    return format_name.endswith("_pipe") or format_name in {"image2", "ico"}


def _has_stills(container: InputContainer) -> bool:
    return any(stream.disposition & _STILL for stream in container.streams.video)


def _is_sizeless(stream: VideoStream) -> bool:
    context = stream.codec_context
    return context is not None and not stream.disposition & _STILL and not context.width


def _audio_info(stream: AudioStream, origin: float) -> AudioInfo | None:
    # A stream whose codec this FFmpeg doesn't know has no context.
    context = stream.codec_context
    if context is None or not MIN_RATE <= context.sample_rate <= MAX_RATE:
        return None
    channels = context.layout.nb_channels
    return AudioInfo(
        stream.index, context.name, context.sample_rate, channels, _end(stream, origin)
    )


def _video_info(stream: VideoStream, origin: float) -> VideoInfo | None:
    context = stream.codec_context
    if context is None or stream.disposition & _STILL or context.width * context.height == 0:
        return None
    return VideoInfo(
        index=stream.index,
        codec=context.name,
        width=context.width,
        height=context.height,
        rate=float(stream.average_rate or 0),
        pixel_aspect=float(context.sample_aspect_ratio or 1) or 1.0,
        end=_end(stream, origin),
    )


def _end(stream: Stream, origin: float) -> float | None:
    if not stream.duration or stream.time_base is None or stream.duration < 0:
        return None
    return float((stream.duration + (stream.start_time or 0)) * stream.time_base) - origin
