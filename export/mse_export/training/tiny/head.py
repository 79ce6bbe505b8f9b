"""The drawn head's shape: a neutral mesh, FACS action units as displacements, identities.

Coordinates are the runtime's face frame: inter-ocular distances, x to the picture's right, y down,
z away from the camera. The mesh is `mse_runtime`'s own neutral face (468 points, symmetric), so
point numbers are the mesh network's. Displacements were set by eye against the extractor: what it
reads back is attenuated, and some units (5, 6, 7, 17, 23, 25) hardly come through.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mse_runtime.features.landmarks import neutral_mesh

__all__ = ["EXPRESSIONS", "Head", "Topology", "deform", "identity_shape", "topology"]

Floats = NDArray[np.float64]

UPPER_OUTER = [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291]
LOWER_OUTER = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291]
UPPER_INNER = [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308]
LOWER_INNER = [78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308]
_LOWER_LIP = [
    *LOWER_OUTER[1:-1], *LOWER_INNER[1:-1],
    77, 90, 180, 85, 16, 315, 404, 320, 307, 96, 89, 179, 86, 15, 316, 403, 319, 325,
]  # fmt: skip
_UPPER_LIP = [
    *UPPER_OUTER[1:-1], *UPPER_INNER[1:-1],
    184, 74, 73, 72, 11, 302, 303, 304, 408, 183, 42, 41, 38, 12, 268, 271, 272, 407,
]  # fmt: skip
#: The eye on the picture's left; the other one is its mirror image.
LID_UPPER = [246, 161, 160, 159, 158, 157, 173]
LID_LOWER = [7, 163, 144, 145, 153, 154, 155]
_FOLD_UPPER = [247, 30, 29, 27, 28, 56, 190]
_FOLD_LOWER = [25, 110, 24, 23, 22, 26, 112]
EYE = [33, *LID_UPPER, 133, *LID_LOWER[::-1]]
BROW_UPPER = [70, 63, 105, 66, 107]
BROW_LOWER = [46, 53, 52, 65, 55]
_LID_WEIGHT = np.array([0.35, 0.7, 0.95, 1.0, 0.95, 0.7, 0.35])

#: Action units (FACS numbers) of each emotion at full intensity, by `lexicon.EMOTIONS`; 45 is
#: lid closure. After Ekman and Friesen's prototypes.
EXPRESSIONS: tuple[Mapping[int, float], ...] = (
    {},
    {1: 1.0, 2: 1.0, 5: 1.0, 25: 0.6, 26: 0.8},
    {1: 1.0, 2: 0.6, 4: 0.5, 5: 1.0, 20: 0.9, 25: 0.6, 26: 0.25},
    {1: 0.9, 4: 0.5, 15: 1.0, 17: 0.4, 7: 0.2},
    {6: 0.8, 12: 1.0, 25: 0.5},
    {9: 1.0, 10: 0.5, 15: 0.6, 16: 0.5, 4: 0.3, 7: 0.4},
    {4: 1.0, 5: 0.5, 7: 0.8, 23: 1.0},
)


@dataclass(frozen=True)
class Topology:
    """What does not depend on the identity."""

    base: Floats
    """Neutral mesh [468, 3]."""
    mirror: NDArray[np.intp]
    """Index of each point's mirror image."""
    triangles: NDArray[np.intp]
    """Surface [n, 3], a Delaunay triangulation of the front view."""
    units: dict[int, Floats]
    """Displacement [468, 3] of each action unit at intensity 1."""
    brow: Floats
    """Weight [468] of the brow region."""
    mouth_y: float
    eye_y: float


class Head:
    """Builds displacement fields on the mesh."""

    def __init__(self, base: Floats, mirror: NDArray[np.intp]) -> None:
        self.base, self.mirror = base, mirror
        self.side = np.clip(0.5 - base[:, 0] / 0.12, 0, 1)
        self.mouth_y = float(base[13, 1] + base[14, 1]) / 2
        self.eye_y = float(base[33, 1] + base[133, 1]) / 2
        y = base[:, 1]
        low = np.where(y > self.mouth_y, np.clip((y - self.mouth_y) / 0.12, 0, 1), 0.0)
        low[_LOWER_LIP] = 1
        low[_UPPER_LIP] = 0
        low[[61, 291, 78, 308, 62, 292, 76, 306]] = 0.42
        self.jaw = low * np.clip(1.25 - np.abs(base[:, 0]) / 0.55, 0, 1)
        self.brow = np.clip((self.eye_y - 0.02 - y) / 0.08, 0, 1)
        self.cheek = (y > self.eye_y) * (1 - self.jaw)
        self.chin = (self.jaw > 0.6).astype(float)
        self.upper = np.zeros(468)
        self.upper[_UPPER_LIP] = 1

    def both(self, field: Floats) -> Floats:
        """A field of one side, plus its mirror image."""
        return field + field[self.mirror] * [-1, 1, 1]

    def pull(
        self, centres: list[int], out: float, up: float, width: float, mask: Floats | None = None
    ) -> Floats:
        """Move what lies around `centres` outwards and up, on both sides."""
        away = self.base[:, None, :2] - self.base[None, centres, :2]
        weight = np.exp(-(np.linalg.norm(away, axis=2).min(1) ** 2) / (2 * width**2)) * self.side
        if mask is not None:
            weight = weight * mask
        field = np.zeros((468, 3))
        field[:, 0], field[:, 1] = -out * weight, -up * weight
        return self.both(field)

    def lid(self, points: list[int], up: float) -> Floats:
        """Move one of the lid's lines."""
        field = np.zeros((468, 3))
        field[points, 1] = -up * _LID_WEIGHT
        return self.both(field)

    def units(self) -> dict[int, Floats]:
        """Every action unit's displacement."""
        y = self.base[:, 1]
        inner = np.clip((self.eye_y - y) / 0.06, 0, 1)
        below_eye = ((y > self.eye_y + 0.04) & (y < self.mouth_y - 0.05)).astype(float)
        lips = np.array([*_LOWER_LIP, *_UPPER_LIP])
        tight = np.zeros((468, 3))
        tight[lips, 1] = -(y[lips] - self.mouth_y) * 0.4
        part = np.zeros((468, 3))
        part[_UPPER_LIP, 1], part[_LOWER_LIP, 1] = -0.02, 0.04
        part *= np.exp(-((self.base[:, 0] / 0.17) ** 2))[:, None]
        drop = np.zeros((468, 3))
        drop[:, 1] = 0.2 * self.jaw
        up, lid = self.pull, self.lid
        return {
            1: up([107, 55, 66, 65], 0, 0.075, 0.11, self.brow),
            2: up([70, 63, 46, 53, 105], 0, 0.08, 0.11, self.brow),
            4: up([107, 55, 65, 66], -0.045, -0.055, 0.10, inner)
            + up([105, 63, 52], -0.01, -0.03, 0.09, self.brow),
            5: lid(LID_UPPER, 0.032) + lid(_FOLD_UPPER, 0.016),
            6: lid(LID_LOWER, 0.022)
            + lid(_FOLD_LOWER, 0.025)
            + lid(LID_UPPER, -0.01)
            + up([117, 118, 50], 0.01, 0.04, 0.10, below_eye),
            7: lid(LID_LOWER, 0.02)
            + lid(LID_UPPER, -0.018)
            + lid(_FOLD_UPPER, -0.008)
            + lid(_FOLD_LOWER, 0.012),
            9: up([129, 98, 64, 49], 0.01, 0.04, 0.07, self.cheek)
            + up([37, 0, 267, 39], 0, 0.035, 0.08, self.upper)
            + up([107, 55], -0.02, -0.03, 0.09, self.brow)
            + lid(LID_LOWER, 0.01),
            10: up([37, 0, 39], 0, 0.04, 0.08, self.upper),
            12: up([61], 0.075, 0.075, 0.12) + up([50, 205], 0.01, 0.03, 0.10, self.cheek),
            15: up([61], 0, -0.065, 0.085),
            16: up([84, 17], 0, -0.05, 0.09, self.chin),
            17: up([152, 199], 0, 0.03, 0.15, self.chin) + up([17, 84], 0, 0.02, 0.08, self.chin),
            20: up([61], 0.09, -0.02, 0.11),
            23: tight + up([61], -0.035, 0, 0.10),
            25: part,
            26: drop,
            45: lid(LID_UPPER, -0.07),
        }


@functools.cache
def topology() -> Topology:
    """The neutral head; needs matplotlib for the triangulation."""
    from matplotlib.tri import Triangulation

    base = np.asarray(neutral_mesh(), np.float64).copy()
    flipped = base * [-1, 1, 1]
    mirror = np.array([int(((flipped - p) ** 2).sum(1).argmin()) for p in base])
    # Nearly coincident lips would give slivers: open the mouth a little to triangulate.
    open_mouth = base.copy()
    open_mouth[_LOWER_LIP, 1] += 0.03
    triangles = np.asarray(Triangulation(open_mouth[:, 0], open_mouth[:, 1]).triangles, np.intp)
    head = Head(base, mirror)
    return Topology(base, mirror, triangles, head.units(), head.brow, head.mouth_y, head.eye_y)


def mirrored(points: list[int]) -> list[int]:
    """The same points on the other side of the face."""
    return [int(k) for k in topology().mirror[points]]


def deform(shape: Floats, intensities: Mapping[int, float]) -> Floats:
    """A shape [468, 3] with action units at the given intensities (0..1, sums allowed)."""
    out = shape.copy()
    for unit, strength in intensities.items():
        out += strength * topology().units[unit]
    return out


def identity_shape(rng: np.random.Generator) -> Floats:
    """A person's neutral shape [468, 3]: proportions, mouth, eyes, brows and nose varied."""
    top = topology()
    base = top.base
    shape = base.copy()
    jaw, wide, tall, deep = rng.normal(0, [0.06, 0.04, 0.05, 0.08])
    shape[:, 0] *= 1 + wide + jaw * np.clip((base[:, 1] - top.eye_y) / 0.8, 0, 1)
    shape[:, 1] *= 1 + tall
    shape[:, 2] *= 1 + deep

    def local(points: list[int], scale: float, width: float, axis: int) -> None:
        centre = base[points].mean(0)
        weight = np.exp(-((base[:, :2] - centre[:2]) ** 2).sum(1) / (2 * width**2))
        shape[:, axis] += weight * (base[:, axis] - centre[axis]) * scale

    mouth = [61, 291, 0, 17]
    local(mouth, rng.normal(0, 0.08), 0.22, 0)
    local(mouth, rng.normal(0, 0.15), 0.13, 1)
    opening = rng.normal(0, 0.12)
    for eye in (EYE, mirrored(EYE)):
        local(eye, opening, 0.13, 1)
    shape[:, 1] -= rng.normal(0, 0.022) * top.brow
    apart = rng.normal(0, 0.02) * np.sign(base[:, 0]) * np.exp(-(base[:, 0] ** 2) / 0.1)
    shape[:, 0] += apart * top.brow
    local([1, 4, 2, 98, 327, 168], rng.normal(0, 0.08), 0.14, 0)
    tip = np.exp(-((base[:, :2] - base[2, :2]) ** 2).sum(1) / (2 * 0.12**2))
    shape[:, 1] += rng.normal(0, 0.02) * tip
    # How the mouth's corners rest differs between people, and looks like a mood.
    shape += rng.normal(0, 0.2) * top.units[15]
    return shape
