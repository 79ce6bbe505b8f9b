"""Packets of one stream within a window: seeking, damage and early ends handled in one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import av
import av.error
from av.stream import Discard

from mse_runtime.media.probe import ClipInfo, Window

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream

__all__ = ["Damage", "packets", "seconds"]

_TOLERATED = 500
_INTERLEAVE = 10.0
"""Seconds by which one stream may run ahead of another in the file."""


class Damage:
    """Counts what could not be read, to be said once at the end."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.packets = 0
        """Packets the decoder refused."""
        self.frames = 0
        """Frames the decoder marks as patched up."""
        self.cut = ""
        """Why reading stopped before the end, if it did."""

    def warnings(self) -> list[str]:
        found = []
        if self.packets or self.frames:
            found.append(
                f"{self.what} is damaged in {self.packets + self.frames} places: "
                "features there are unreliable"
            )
        if self.cut:
            found.append(f"{self.what} breaks off early ({self.cut}): what came before is used")
        return found


def packets(
    container: InputContainer, stream: Stream, info: ClipInfo, window: Window, damage: Damage
) -> Iterator[Packet[Stream]]:
    """The stream's packets that may matter to the window, in file order, then the flushing one.

    Starts at a point from which `window.start` can be decoded; goes on past the end until the
    caller stops asking or the file has clearly passed it.
    """
    for other in container.streams:
        if other.index != stream.index:
            # Not read from disk where the format allows; key frames still tell the time.
            other.discard = Discard.nonkey
    if window.start > 0:
        _seek(container, info, window.start)
    stop = window.end + _INTERLEAVE
    reader = container.demux()
    while True:
        try:
            packet = next(reader, None)
        except (av.error.FFmpegError, OSError) as error:
            damage.cut = str(getattr(error, "strerror", None) or error)
            return
        except IndexError:
            # PyAV's answer to a stream that appears part-way: damage can look like one.
            damage.packets += 1
            if damage.packets > _TOLERATED:
                damage.cut = "unknown streams appear"
                return
            reader = container.demux()
            continue
        if packet is None:
            return
        # Not `stream_index`: in the flushing packets of all streams at the end it is 0.
        if packet.stream.index != stream.index:
            when = packet.dts
            if when is not None and seconds(when, packet, info) > stop:
                return
            continue
        yield packet


def seconds(stamp: int, packet: Packet[Stream], info: ClipInfo) -> float:
    """A packet's timestamp on the clip's clock."""
    return float(stamp * packet.time_base) - info.origin


def _seek(container: InputContainer, info: ClipInfo, start: float) -> None:
    # A little early: decoders need a packet or two to come into step.
    target = max(0.0, start - 0.2) + info.origin
    try:
        container.seek(int(target * av.time_base), backward=True)
    except (av.error.FFmpegError, OSError):
        # Formats without an index: read on from the beginning; the window still holds.
        return
