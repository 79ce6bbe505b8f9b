"""Geometric stand-ins for facial action units (Ekman & Friesen 1978), in OpenFace's order.

Each is a distance on the face in its own frame, less that distance on the neutral face, signed so
that more means more of the action. They are proxies: texture (wrinkles, bulges), which the coding
system relies on, is not looked at, and a person's own resting face is not known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mse_runtime.features.geometry import Floats
from mse_runtime.features.landmarks import neutral_mesh
from mse_runtime.records import dataclass

__all__ = ["ACTION_UNITS", "ActionUnit", "action_units"]

Measure = Callable[[Floats], Floats]
Pair = tuple[int, int]


def _below(*pairs: Pair) -> Measure:
    """Mean of how far the second point of each pair lies below the first."""
    first, second = np.array(pairs).T

    def measure(points: Floats) -> Floats:
        return np.asarray((points[:, second, 1] - points[:, first, 1]).mean(1))

    return measure


def _apart(a: int, b: int) -> Measure:
    def measure(points: Floats) -> Floats:
        return np.asarray(np.linalg.norm(points[:, b] - points[:, a], axis=1))

    return measure


def _sum(*terms: tuple[float, Measure]) -> Measure:
    def measure(points: Floats) -> Floats:
        return np.asarray(sum(weight * part(points) for weight, part in terms))

    return measure


_inner_brow = _below((107, 133), (336, 362))
_outer_brow = _below((63, 33), (293, 263))
_upper_lids = _below((159, 33), (159, 133), (386, 263), (386, 362))
_lower_lids = _below((33, 145), (133, 145), (263, 374), (362, 374))
_opening = _below((159, 145), (386, 374))
_cheeks = _below((145, 117), (374, 346))
_brow_gap = _apart(55, 285)
_mouth_width = _apart(61, 291)
_corners = _below((2, 61), (2, 291))  # the lip corners below the nose
_lips = _below((0, 13), (14, 17))  # thickness of both lips
_gap = _below((13, 14))


@dataclass(frozen=True)
class ActionUnit:
    """One action unit's proxy; `gain` maps inter-ocular distances to the 0..5 of intensities."""

    code: str
    action: str
    measure: Measure
    gain: float


ACTION_UNITS = (
    ActionUnit("AU01", "inner brow raiser", _inner_brow, 25),
    ActionUnit("AU02", "outer brow raiser", _outer_brow, 25),
    ActionUnit("AU04", "brow lowerer", _sum((-1, _inner_brow), (-1, _brow_gap)), 25),
    ActionUnit("AU05", "upper lid raiser", _upper_lids, 60),
    ActionUnit("AU06", "cheek raiser", _sum((-1, _cheeks)), 30),
    ActionUnit("AU07", "lid tightener", _sum((-1, _lower_lids)), 60),
    ActionUnit("AU09", "nose wrinkler", _sum((-1, _below((133, 98), (362, 327)))), 30),
    ActionUnit("AU10", "upper lip raiser", _sum((-1, _below((2, 0)))), 40),
    ActionUnit("AU12", "lip corner puller", _sum((0.5, _mouth_width), (-1, _corners)), 25),
    ActionUnit("AU14", "dimpler", _sum((0.5, _mouth_width), (-1, _lips)), 25),
    ActionUnit("AU15", "lip corner depressor", _below((13, 61), (13, 291)), 40),
    ActionUnit("AU17", "chin raiser", _sum((-1, _below((17, 152)))), 25),
    ActionUnit("AU20", "lip stretcher", _mouth_width, 20),
    ActionUnit("AU23", "lip tightener", _sum((-1, _lips)), 30),
    ActionUnit("AU25", "lips part", _gap, 20),
    ActionUnit("AU26", "jaw drop", _below((2, 152)), 15),
    ActionUnit("AU45", "blink", _sum((-1, _opening)), 40),
)


def action_units(points: Floats) -> Floats:
    """Proxies [T, 17] of `points` [T, 468, 3] (FaceFrame.points), in inter-ocular distances."""
    neutral = neutral_mesh()[None]
    columns = [unit.measure(points) - unit.measure(neutral) for unit in ACTION_UNITS]
    return np.stack(columns, axis=1).astype(np.float32)
