"""The layout of OpenFace 2's columns (Baltrusaitis et al. 2018), filled from the face mesh.

pose_Tx..Rz, x_0..x_67, y_0..y_67, 17 AU intensities, 18 AU presences: what SIMS-v2's published
features hold. The layout is the same, the values are not OpenFace's: the spec `openface177/1`
says of every column how near it comes, and the action units are proxies. Do not feed them to an
adapter trained on OpenFace's own output.
"""

from __future__ import annotations

import numpy as np

from mse_runtime.features.action_units import ACTION_UNITS, action_units
from mse_runtime.features.geometry import Floats
from mse_runtime.features.landmarks import IBUG68, FaceFrame

__all__ = ["openface177"]

# Mean breadth between the outer eye corners of adults, mm (Farkas 1994 gives 84-92).
OUTER_EYES_MM = 88.0
# OpenFace's guess where the camera is unknown: 500 px at 640x480, the mean of both directions.
FOCAL_AT = (500.0, 640.0, 480.0)
PRESENT = 1.0  # intensity from which an action counts as present
LIP_SUCK = ("AU28", 0.03)  # lips thinner than this (inter-ocular distances) and closed


def openface177(points: Floats, frame: FaceFrame, sizes: Floats) -> Floats:
    """Columns [T, 177] in OpenFace's order.

    points: float32 [T, 468, 3], px; sizes: [T, 2], width and height of each frame in px.
    Translations in mm, rotations in rad, x and y in px of the analysed frame, intensities 0..5,
    presences 0 or 1.
    """
    pixels, full_width, full_height = FOCAL_AT
    focal = pixels * (sizes[:, 0] / full_width + sizes[:, 1] / full_height) / 2
    depth = focal * OUTER_EYES_MM / np.maximum(frame.scale, 1e-6)
    place = (frame.centre - sizes / 2) * (depth / focal)[:, None]
    intensity = np.clip(
        action_units(frame.points) * np.array([unit.gain for unit in ACTION_UNITS]), 0, 5
    )
    presence = (intensity >= PRESENT).astype(np.float32)
    own = frame.points[..., 1]
    lips = (own[:, 13] - own[:, 0] + own[:, 17] - own[:, 14]) / 2
    suck = (lips < LIP_SUCK[1]) & (own[:, 14] - own[:, 13] < LIP_SUCK[1])
    presence = np.insert(presence, 16, suck, axis=1)  # AU28 has no intensity; it sits before AU45
    named = points[:, IBUG68]
    return np.concatenate(
        [place, depth[:, None], frame.angles, named[..., 0], named[..., 1], intensity, presence],
        axis=1,
    ).astype(np.float32)
