"""Several faces over a clip: follow each, then choose the one the clip is about.

A face is followed by its own landmarks; the detector looks at the whole picture only when nothing
is being followed, when a face was just lost, and twice a second for newcomers.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import numpy as np

from mse_runtime.features.geometry import Floats, Picture, Region, box_iou
from mse_runtime.features.mesh import FaceNetworks, MeshObservation
from mse_runtime.records import dataclass

__all__ = ["FaceTracker", "Seen", "Track"]

MAX_FACES = 4
LOOK_EVERY = 0.5  # s of clip time between two looks for newcomers
SAME_FACE_IOU = 0.3
RESUME_GAP = 2.0  # s; later than that a face nearby counts as somebody else
RESUME_REACH = 1.5  # in sides of the lost face's box
RESUME_RESIZE = 2.0

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Seen:
    """One face in one frame, with that frame's number and size (width, height) in pixels."""

    frame: int
    time: float
    size: tuple[int, int]
    mesh: MeshObservation

    @property
    def share(self) -> Box:
        """The box as shares of the frame's width and height, comparable across resolutions."""
        x0, y0, x1, y1 = self.mesh.box
        w, h = self.size
        return x0 / w, y0 / h, x1 / w, y1 / h


@dataclass
class Track:
    """One face over the clip; `region` is where to look next, None while it is lost."""

    number: int
    region: Region | None = None
    seen: list[Seen] = field(default_factory=list)

    def summary(self, frames: int) -> dict[str, Any]:
        """Size, place and steadiness over a clip of `frames` frames, and the product of them.

        size: square root of the box's share of the frame; central: 1 in the middle, 0 in a
        corner; coverage: share of the clip's frames that show this face.
        """
        boxes = np.array([seen.share for seen in self.seen])
        size = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        central = np.clip(1 - np.hypot(*(centres - 0.5).T) / math.hypot(0.5, 0.5), 0, 1)
        coverage = len(self.seen) / max(frames, 1)
        return {
            "face": self.number,
            "frames": len(self.seen),
            "coverage": round(coverage, 4),
            "size": round(float(size.mean()), 4),
            "central": round(float(central.mean()), 4),
            "score": round(float(coverage * np.mean(size * central)), 5),
            "centre": [round(float(v), 4) for v in centres.mean(0)],
            "first": round(self.seen[0].time, 3),
            "last": round(self.seen[-1].time, 3),
        }


class FaceTracker:
    """Follows up to MAX_FACES faces through the frames it is given, in order."""

    def __init__(self, networks: FaceNetworks) -> None:
        self._networks = networks
        self._next_look = -math.inf
        self._size: tuple[int, int] | None = None
        self.tracks: list[Track] = []
        self.frames = 0

    def add(self, picture: Picture, time: float) -> list[Seen]:
        """The faces of one frame, for the tracks that see one."""
        if picture.size != self._size:  # regions are pixels of another resolution: look again
            for track in self.tracks:
                track.region = None
            self._size = picture.size
        found: dict[int, Seen] = {}
        lost = False
        for track in self.tracks:
            if track.region is None:
                continue
            mesh = self._networks.observe(picture, track.region)
            seen = None if mesh is None else Seen(self.frames, time, picture.size, mesh)
            if seen is None or self._taken(seen.share, found):  # gone, or slid onto another face
                track.region = None
                lost = True
            else:
                found[track.number] = seen
        if not found or lost or time >= self._next_look:
            self._look(picture, time, found)
            self._next_look = time + LOOK_EVERY
        for track in self.tracks:
            if track.number in found:
                seen = found[track.number]
                track.seen.append(seen)
                track.region = seen.mesh.next_region()
        self.frames += 1
        return list(found.values())

    def _look(self, picture: Picture, time: float, found: dict[int, Seen]) -> None:
        """Detect faces of the whole picture and add those that are not being followed."""
        width, height = picture.size
        for detection in self._networks.detector(picture, MAX_FACES):
            x0, y0, x1, y1 = detection.box
            share = (x0 / width, y0 / height, x1 / width, y1 / height)
            if len(found) >= MAX_FACES:
                return
            if self._taken(share, found):
                continue
            mesh = self._networks.observe(picture, detection.region)
            if mesh is None:
                continue
            seen = Seen(self.frames, time, picture.size, mesh)
            if not self._taken(seen.share, found):
                found[self._owner(seen, found).number] = seen

    @staticmethod
    def _taken(share: Box, found: dict[int, Seen]) -> bool:
        if not found:
            return False
        boxes = np.array([seen.share for seen in found.values()], np.float32)
        return bool((box_iou(boxes, np.array(share, np.float32)) > SAME_FACE_IOU).any())

    def _owner(self, seen: Seen, found: dict[int, Seen]) -> Track:
        """The lost track that this face most likely continues, or a new one."""
        here = _centre_and_side(seen)
        best, best_distance = None, RESUME_REACH
        for track in self.tracks:
            if track.number in found or seen.time - track.seen[-1].time > RESUME_GAP:
                continue
            there = _centre_and_side(track.seen[-1])
            ratio = here[1] / there[1]
            distance = float(np.hypot(*(here[0] - there[0]))) / there[1]
            if 1 / RESUME_RESIZE < ratio < RESUME_RESIZE and distance < best_distance:
                best, best_distance = track, distance
        if best is None:
            best = Track(len(self.tracks))
            self.tracks.append(best)
        return best

    def runs(self) -> dict[str, int]:
        """How often each network ran."""
        networks = self._networks
        return {"detector_runs": networks.detector.runs, "mesh_runs": networks.mesh_runs}

    def choose(self) -> tuple[Track | None, list[dict[str, Any]]]:
        """The track with the best score (see Track.summary) and all summaries, best first."""
        summaries = [track.summary(self.frames) for track in self.tracks]
        summaries.sort(key=lambda summary: (-summary["score"], summary["face"]))
        return (self.tracks[summaries[0]["face"]] if summaries else None), summaries


def _centre_and_side(seen: Seen) -> tuple[Floats, float]:
    """Centre and side of a box in shares of the frame's width (so that distances are isotropic)."""
    x0, y0, x1, y1 = seen.share
    aspect = seen.size[1] / seen.size[0]
    centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2 * aspect], np.float32)
    return centre, max(x1 - x0, (y1 - y0) * aspect)
