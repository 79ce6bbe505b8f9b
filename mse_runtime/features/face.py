"""Face features of a clip, frame by frame: `FaceExtractor`.

The networks load in a thread of their own from the moment the extractor is made, so that opening
the clip and loading them overlap. Nothing depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import UsageError
from mse_runtime.features.action_units import action_units
from mse_runtime.features.geometry import Floats, Picture
from mse_runtime.features.landmarks import IBUG68, FaceFrame, face_frame, gaze
from mse_runtime.features.mesh import FaceModels
from mse_runtime.features.openface import openface177
from mse_runtime.features.spec import FeatureTrack, get_spec
from mse_runtime.features.tracks import FaceTracker, Seen, Track
from mse_runtime.records import dataclass

__all__ = ["FaceExtractor", "FaceResult", "face167", "result_of"]

SPECS = ("face167/1", "openface177/1")
RARELY = 0.5  # below this share of frames with the face, say so
SERIOUS = 0.25  # another face with at least this share of the winner's score is worth naming


@dataclass(frozen=True)
class FaceResult:
    """Features of the chosen face.

    track: one row for each frame added; rows without the face are zero and not valid.
    info: frames, the chosen face, a summary of every face seen, runs of the networks.
    mesh: for each frame ([468, 3], [10, 2]) px or None, where the extractor was asked to keep it.
    """

    track: FeatureTrack
    warnings: tuple[str, ...]
    info: dict[str, Any]
    mesh: list[tuple[Floats, Floats] | None] | None


class FaceExtractor:
    """Give it frames in order of time with `add`, then call `finish` once."""

    def __init__(
        self, spec_id: str = "face167/1", *, threads: int = 1, keep_mesh: bool = False
    ) -> None:
        """Start loading the networks.

        Raises BundleError for an unknown spec id, UsageError for one that is not computed here.
        """
        self._spec = get_spec(spec_id)
        if spec_id not in SPECS:
            raise UsageError(
                f"{spec_id} cannot be computed from a clip (only {', '.join(SPECS)} can): "
                "give the data set's own features with --features FILE.npz."
            )
        self._models = FaceModels(threads=threads)
        self._keep_mesh = keep_mesh
        self._tracker: FaceTracker | None = None
        self._times: list[float] = []

    def add(self, frame_rgb: NDArray[np.uint8], time: float) -> None:
        """Look at one frame (uint8 [H, W, 3] RGB, or [H, W, 4] RGBX, which saves a copy).

        time: seconds on the clip's clock. The frame is not kept.
        """
        self._follow().add(Picture(frame_rgb), time)
        self._times.append(time)

    def finish(self) -> FaceResult:
        """Choose the face the clip is about and compute its features."""
        tracker = self._follow()
        track, _ = tracker.choose()
        frames = len(self._times)
        values = np.zeros((frames, self._spec.dim), np.float32)
        valid = np.zeros(frames, np.bool_)
        seen = track.seen if track is not None else []
        if seen:
            rows = [each.frame for each in seen]
            values[rows] = _columns(self._spec.id, seen)
            valid[rows] = True
        features = FeatureTrack(self._spec.id, values, valid, np.array(self._times, np.float64))
        return result_of(features, tracker, self._keep_mesh)

    def _follow(self) -> FaceTracker:
        if self._tracker is None:
            self._tracker = FaceTracker(self._models.get())
        return self._tracker


def result_of(features: FeatureTrack, tracker: FaceTracker, keep_mesh: bool) -> FaceResult:
    """Features of the chosen face together with what there is to say about the choice."""
    track, summaries = tracker.choose()
    frames = len(features)
    info: dict[str, Any] = {
        "frames": frames,
        "valid": int(features.valid.sum()),
        "chosen": None if track is None else track.number,
        "faces": summaries,
        **tracker.runs(),
    }
    return FaceResult(
        track=features,
        warnings=tuple(_warnings(frames, summaries)),
        info=info,
        mesh=_meshes(frames, track) if keep_mesh else None,
    )


def face167(points: Floats, frame: FaceFrame, iris: Floats, sizes: Floats) -> Floats:
    """The first 164 columns of `face167/1` [T, 164]; box size, score and validity follow them.

    points [T, 468, 3] and iris [T, 10, 2] in px, sizes [T, 2]: width and height of each frame.
    """
    named = frame.points[:, IBUG68]
    long_side = sizes.max(1, keepdims=True)
    place = (frame.centre - sizes / 2) / (long_side / 2)
    parts = [
        named[..., 0],
        named[..., 1],
        place,
        frame.scale[:, None] / long_side,
        frame.angles,
        action_units(frame.points),
        gaze(points, iris, frame),
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _columns(spec_id: str, seen: list[Seen]) -> Floats:
    points = np.stack([each.mesh.points for each in seen])
    sizes = np.array([each.size for each in seen], np.float32)
    frame = face_frame(points)
    if spec_id == "openface177/1":
        return openface177(points, frame, sizes)
    iris = np.stack([each.mesh.iris for each in seen])
    boxes = np.array([each.share for each in seen], np.float32)
    tail = np.ones((len(seen), 4), np.float32)
    tail[:, :2] = boxes[:, 2:] - boxes[:, :2]
    tail[:, 2] = [each.mesh.score for each in seen]
    return np.concatenate([face167(points, frame, iris, sizes), tail], axis=1)


def _meshes(frames: int, track: Track | None) -> list[tuple[Floats, Floats] | None]:
    meshes: list[tuple[Floats, Floats] | None] = [None] * frames
    for each in track.seen if track is not None else []:
        meshes[each.frame] = (each.mesh.points, each.mesh.iris)
    return meshes


def _warnings(frames: int, summaries: list[dict[str, Any]]) -> list[str]:
    if not frames:
        return []
    if not summaries:
        return [f"no face in {frames} frames: the face counts as missing."]
    first, *others = summaries
    said = []
    rivals = [face for face in others if face["score"] >= SERIOUS * first["score"]]
    if rivals:
        x, y = first["centre"]
        said.append(
            f"{1 + len(rivals)} faces: took the one around {x:.0%} from the left and {y:.0%} from "
            f"the top, seen in {first['frames']} of {frames} frames (largest, most central, "
            "steadiest)."
        )
    if first["coverage"] < RARELY:
        said.append(f"the face is visible in only {first['frames']} of {frames} frames.")
    return said
