"""468 face landmarks and two irises of one face (Kartynnik et al. 2019, Ablavatski et al. 2020).

The three networks are MediaPipe's, converted to ONNX (see `data/face/NOTICE`); the regions they
look at follow MediaPipe's face mesh graph: a detection once, then the last frame's landmarks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mse_runtime import background
from mse_runtime.features.detector import FaceDetector
from mse_runtime.features.geometry import Floats, Picture, Region
from mse_runtime.features.sessions import Session

__all__ = ["FaceModels", "FaceNetworks", "MeshObservation"]

MODEL_FOLDER = Path(__file__).resolve().parent.parent / "data" / "face"
MESH_SIZE, IRIS_SIZE = 192, 64
MIN_FLAG = 0.5  # below this the mesh network says that its crop holds no face
ROI_SCALE, EYE_SCALE = 1.5, 2.3
MIN_SIDE, MAX_FRAMES = 4.0, 4.0  # px, long sides of the frame: outside, no face to speak of
RIGHT_EYE, LEFT_EYE = (33, 133), (362, 263)  # corners, from the picture's left to its right


@dataclass(frozen=True)
class MeshObservation:
    """A face in one frame; pixels of that frame.

    points: float32 [468, 3] (x right, y down, z away from the camera, same scale);
    iris: float32 [10, 2], five points of the person's right eye (centre first), then the left;
    score: probability that the crop held a face, 0..1.
    """

    points: Floats
    iris: Floats
    score: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The landmarks' bounding box x0, y0, x1, y1."""
        low, high = self.points[:, :2].min(0), self.points[:, :2].max(0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    def next_region(self) -> Region:
        """Where to look for this face in the next frame."""
        x0, y0, x1, y1 = self.box
        across = self.points[LEFT_EYE[1], :2] - self.points[RIGHT_EYE[0], :2]
        angle = math.atan2(float(across[1]), float(across[0]))
        return Region((x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) * ROI_SCALE, angle)


class FaceNetworks:
    """The three loaded networks."""

    def __init__(self, *, threads: int = 1) -> None:
        self.detector = FaceDetector(_open("face_detection_short_range", threads))
        self._mesh = _open("face_landmark", threads)
        self._iris = _open("iris_landmark", threads)
        self.mesh_runs = 0

    def observe(self, picture: Picture, region: Region) -> MeshObservation | None:
        """The face inside `region` of `picture`, or None when the network sees none."""
        if not MIN_SIDE <= region.side <= MAX_FRAMES * max(picture.size):
            return None
        self.mesh_runs += 1
        landmarks, flag = self._mesh(_unit(picture.crop(region, MESH_SIZE)[None]))
        score = 1 / (1 + math.exp(-min(max(float(flag.ravel()[0]), -80.0), 80.0)))
        if score < MIN_FLAG:
            return None
        points = region.to_picture(landmarks.reshape(468, 3), MESH_SIZE)
        return MeshObservation(points, self._irises(picture, points), score)

    def _irises(self, picture: Picture, points: Floats) -> Floats:
        right, left = _eye_region(points, RIGHT_EYE), _eye_region(points, LEFT_EYE)
        # the network knows one side only: the other eye is shown to it mirrored
        crops = np.stack(
            [picture.crop(right, IRIS_SIZE), picture.crop(left, IRIS_SIZE, mirror=True)],
        )
        iris = self._iris(_unit(crops))[0].reshape(2, 5, 3)[..., :2].copy()
        iris[1, :, 0] = IRIS_SIZE - iris[1, :, 0]
        return np.concatenate(
            [right.to_picture(iris[0], IRIS_SIZE), left.to_picture(iris[1], IRIS_SIZE)]
        )


class FaceModels:
    """The networks, loading in a thread of their own while the clip is being opened."""

    def __init__(self, *, threads: int = 1) -> None:
        self._future = background.start(lambda: FaceNetworks(threads=threads), "mse-face-load")

    def get(self) -> FaceNetworks:
        """Wait for the networks; raises what went wrong while loading."""
        return self._future.result()


def _open(name: str, threads: int) -> Session:
    return Session(MODEL_FOLDER / f"{name}.onnx", threads=threads, keep=True)


def _unit(pixels: NDArray[np.uint8]) -> Floats:
    scaled: Floats = np.multiply(pixels, np.float32(1 / 255), dtype=np.float32)
    return scaled


def _eye_region(points: Floats, corners: tuple[int, int]) -> Region:
    first, second = points[corners[0], :2], points[corners[1], :2]
    centre, across = (first + second) / 2, second - first
    side = float(np.abs(across).max()) * EYE_SCALE
    return Region(
        float(centre[0]), float(centre[1]), side, math.atan2(float(across[1]), float(across[0]))
    )
