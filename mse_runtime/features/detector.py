"""BlazeFace, short range: faces of a whole picture (Bazarevsky et al. 2019, arXiv 1907.05047)."""

from __future__ import annotations

import math

import numpy as np

from mse_runtime.features.geometry import Floats, Picture, Region, box_iou
from mse_runtime.features.sessions import Session
from mse_runtime.records import dataclass

__all__ = ["Detection", "FaceDetector"]

SIZE = 128  # the network's input side, pixels
MIN_SCORE = 0.5
MERGE_IOU = 0.3
ROI_SCALE = 1.5  # the mesh wants the face with some room around it


@dataclass(frozen=True)
class Detection:
    """One face: box (x0, y0, x1, y1) in pixels, score 0..1, the region for the mesh network."""

    box: tuple[float, float, float, float]
    score: float
    region: Region


def _anchors() -> Floats:
    """Anchor centres [896, 2], shares of the input: a 16x16 grid twice, an 8x8 grid six times."""
    grids = []
    for cells, repeats in ((16, 2), (8, 6)):
        row, column = np.mgrid[0:cells, 0:cells]
        centres = np.stack([column + 0.5, row + 0.5], -1).reshape(-1, 2) / cells
        grids.append(np.repeat(centres, repeats, axis=0))
    return np.concatenate(grids).astype(np.float32)


class FaceDetector:
    """Finds the faces of one picture; keeps no state between pictures."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._anchors = _anchors()
        self.runs = 0

    def __call__(self, picture: Picture, limit: int) -> list[Detection]:
        """At most `limit` faces of `picture`, best score first."""
        self.runs += 1
        width, height = picture.size
        view = Region(width / 2, height / 2, max(width, height))  # letterbox, like the training
        pixels = picture.crop(view, SIZE, outside="black").astype(np.float32)
        offsets, logits = self._session(pixels[None] / np.float32(127.5) - np.float32(1))
        scores = 1 / (1 + np.exp(-np.clip(logits[0, :, 0], -80, 80)))
        keep = np.flatnonzero(scores > MIN_SCORE)
        # size and 7 points (centre, 6 key points: right eye first, left eye) in units of the input
        raw = offsets[0, keep].reshape(-1, 8, 2) / SIZE
        points = raw + self._anchors[keep][:, None]
        points[:, 1] = raw[:, 1]
        return [
            self._detection(merged, score, view)
            for merged, score in _merge(points, scores[keep])[:limit]
        ]

    @staticmethod
    def _detection(points: Floats, score: float, view: Region) -> Detection:
        placed = view.to_picture(points * SIZE, SIZE)
        (x, y), eyes = placed[0], placed[2:4]
        w, h = points[1] * view.side
        angle = math.atan2(float(eyes[1, 1] - eyes[0, 1]), float(eyes[1, 0] - eyes[0, 0]))
        return Detection(
            box=(float(x - w / 2), float(y - h / 2), float(x + w / 2), float(y + h / 2)),
            score=score,
            region=Region(float(x), float(y), float(max(w, h)) * ROI_SCALE, angle),
        )


def _merge(points: Floats, scores: Floats) -> list[tuple[Floats, float]]:
    """Weighted non-maximum suppression: boxes over the same face are averaged by their scores."""
    boxes = np.concatenate([points[:, 0] - points[:, 1] / 2, points[:, 0] + points[:, 1] / 2], 1)
    left = np.argsort(-scores, kind="stable")
    merged: list[tuple[Floats, float]] = []
    while left.size:
        same = box_iou(boxes[left], boxes[left[0]]) > MERGE_IOU
        same[0] = True
        group = left[same]
        weights = scores[group] / scores[group].sum()
        mean = np.tensordot(weights, points[group], axes=1).astype(np.float32)
        merged.append((mean, float(scores[left[0]])))
        left = left[~same]
    return merged
