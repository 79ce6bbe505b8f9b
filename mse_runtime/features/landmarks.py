"""From 468 mesh points to numbers that mean the same in every clip.

Points are put into the face's own frame (centred, turned to the front, divided by the distance
of the outer eye corners), so that expression is apart from where the head is and how it is held.
All functions take a whole clip: arrays start with T frames.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from mse_runtime.features.geometry import Floats
from mse_runtime.records import dataclass

__all__ = ["IBUG68", "OUTER_EYES", "RIGID", "FaceFrame", "face_frame", "gaze", "neutral_mesh"]

NEUTRAL_FILE = Path(__file__).resolve().parent.parent / "data" / "face" / "neutral_mesh.npy"

OUTER_EYES = (33, 263)
EYES = ((33, 133), (362, 263))  # corners of the person's right eye, then the left

# The 68 points of the iBUG scheme among the mesh's 468. The mesh's jaw line is the visible
# silhouette, so points 0..16 are approximate.
_JAW = (127, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 356)
_BROWS = (70, 63, 105, 66, 107, 336, 296, 334, 293, 300)
_NOSE = (168, 197, 5, 4, 75, 97, 2, 326, 305)
_EYES = (33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380)
_OUTER_LIPS = (61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181)
_INNER_LIPS = (78, 82, 13, 312, 308, 317, 14, 87)
IBUG68 = np.array([*_JAW, *_BROWS, *_NOSE, *_EYES, *_OUTER_LIPS, *_INNER_LIPS])

# Points that move with the skull rather than with the face.
_EYE_CORNERS = (33, 133, 362, 263)
_NOSE_BRIDGE = (168, 6, 197, 195, 5, 4)
_FOREHEAD = (10, 151, 9, 8, 109, 338, 67, 297, 21, 251)
_SIDES = (127, 356, 234, 454, 162, 389)  # temples and the roots of the ears
RIGID = np.array([*_EYE_CORNERS, *_NOSE_BRIDGE, *_FOREHEAD, *_SIDES])


@dataclass(frozen=True)
class FaceFrame:
    """Where the head is and the face seen from its own front.

    points: float32 [T, 468, 3], x to the picture's right, y down, z away from the camera, in
    inter-ocular distances (outer eye corners) from the centroid of the rigid points;
    rotation: [T, 3, 3], face frame -> camera; centre: [T, 2] px, of the same centroid;
    scale: [T] px per inter-ocular distance; angles: [T, 3] rad, pitch (positive: looks down),
    yaw (positive: turns to the picture's left), roll (positive: clockwise on screen), of
    R = Rx Ry Rz.
    """

    points: Floats
    rotation: Floats
    centre: Floats
    scale: Floats
    angles: Floats


@lru_cache(maxsize=1)
def neutral_mesh() -> Floats:
    """A mean neutral face, float32 [468, 3] in the units of FaceFrame.points; read-only.

    Made by `python -m mse_export.face_neutral` (its docstring says from what).
    """
    mesh: Floats = np.load(NEUTRAL_FILE, allow_pickle=False)
    mesh.setflags(write=False)
    return mesh


def face_frame(points: Floats, reference: Floats | None = None) -> FaceFrame:
    """Align `points` [T, 468, 3] (px) with the neutral face: orthographic Procrustes.

    The rotation is the least-squares one over the rigid points (Kabsch 1976).
    """
    reference = neutral_mesh() if reference is None else reference
    rigid = points[:, RIGID].astype(np.float64)
    centre = rigid.mean(1, keepdims=True)
    target = reference[RIGID].astype(np.float64)
    target -= target.mean(0)
    u, _, vt = np.linalg.svd(np.swapaxes(rigid - centre, 1, 2) @ target)
    flip = np.ones((len(points), 3))
    flip[:, 2] = np.sign(np.linalg.det(u @ vt))  # a mirror image is no rotation
    rotation = (u * flip[:, None]) @ vt
    own = (points - centre) @ rotation
    scale = np.linalg.norm(own[:, OUTER_EYES[1]] - own[:, OUTER_EYES[0]], axis=1)
    angles = np.stack(
        [
            np.arctan2(-rotation[:, 1, 2], rotation[:, 2, 2]),
            np.arcsin(np.clip(rotation[:, 0, 2], -1, 1)),
            np.arctan2(-rotation[:, 0, 1], rotation[:, 0, 0]),
        ],
        axis=1,
    )
    f32 = np.float32
    return FaceFrame(
        points=(own / np.maximum(scale, 1e-6)[:, None, None]).astype(f32),
        rotation=rotation.astype(f32),
        centre=centre[:, 0, :2].astype(f32),
        scale=scale.astype(f32),
        angles=angles.astype(f32),
    )


def gaze(points: Floats, iris: Floats, frame: FaceFrame) -> Floats:
    """Iris centre in the eye's own frame [T, 4]: right eye x, y, left eye x, y, in eye widths.

    points [T, 468, 3] and iris [T, 10, 2] in pixels. The offset from the middle of the eye's
    corners is turned by the head's rotation within the picture plane (orthographic).
    """
    turn = frame.rotation[:, :2, :2]
    columns = []
    for eye, (first, second) in enumerate(EYES):
        a, b = points[:, first, :2], points[:, second, :2]
        width = np.linalg.norm(b - a, axis=1, keepdims=True)
        offset = (iris[:, 5 * eye] - (a + b) / 2) / np.maximum(width, 1e-6)
        columns.append(np.einsum("tc,tcd->td", offset, turn))
    return np.concatenate(columns, axis=1).astype(np.float32)
