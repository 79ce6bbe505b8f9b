"""A held-out generator of faces: a photograph, warped by the same action units.

The drawing taught the adapter; this shows what it reads in pictures it never saw the like of. The
photograph is matplotlib's sample of a public-domain portrait of the United States Navy. Expression,
proportions and a little sway move the points of its face mesh, and the picture between them
follows piece by piece; an opened mouth is painted dark inside, as a photograph has none.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mse_export.training.tiny.drawing import Pose, random_look, rotation
from mse_export.training.tiny.head import (
    LOWER_INNER,
    UPPER_INNER,
    Floats,
    identity_shape,
    topology,
)
from mse_runtime.errors import MSEError

__all__ = ["Person", "Portrait", "portrait"]

_FILE = "grace_hopper.jpg"
#: Pixels of the grid on which the warp is computed; between them it is interpolated.
_STEP = 4
#: Head sway, as a share of what drawn heads do: the picture's edge cannot follow more.
_SWAY = 0.4
_BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Portrait:
    """A photograph of one face, square, with its mesh."""

    pixels: NDArray[np.uint8]
    """[size, size, 3]."""
    shape: Floats
    """Mesh in the face frame [468, 3]."""
    turn: Floats
    """Rotation [3, 3], face frame to camera."""
    centre: Floats
    """Origin of the face frame, px."""
    unit: float
    """Pixels of an inter-ocular distance."""


@functools.cache
def portrait(size: int = 320) -> Portrait:
    """The photograph cut to a square around the face and measured by the runtime's mesh."""
    from matplotlib.cbook import get_sample_data

    with Image.open(get_sample_data(_FILE, asfileobj=False)) as picture:
        whole = picture.convert("RGB")
    found = _mesh(np.asarray(whole))
    middle, wide = found[:, :2].mean(0), float(np.ptp(found[:, 0]))
    half = min(wide * 1.15, *middle, *(np.array(whole.size) - middle))
    box = (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half)
    pixels = np.asarray(whole.resize((size, size), Image.Resampling.LANCZOS, box=box))
    return _measured(pixels)


def _mesh(pixels: NDArray[np.uint8]) -> Floats:
    from mse_runtime.features.face import FaceExtractor

    extractor = FaceExtractor(threads=1, keep_mesh=True)
    extractor.add(np.ascontiguousarray(pixels), 0.0)
    meshes = extractor.finish().mesh
    if not meshes or meshes[0] is None:
        raise MSEError(f"no face found in {_FILE}")
    return np.asarray(meshes[0][0], np.float64)


def _measured(pixels: NDArray[np.uint8]) -> Portrait:
    from mse_runtime.features.landmarks import face_frame

    frame = face_frame(_mesh(pixels)[None].astype(np.float32))
    return Portrait(
        pixels=pixels,
        shape=frame.points[0].astype(np.float64),
        turn=frame.rotation[0].astype(np.float64),
        centre=frame.centre[0].astype(np.float64),
        unit=float(frame.scale[0]),
    )


class Person:
    """Somebody made from the photograph: other proportions, perhaps mirrored, another light."""

    def __init__(self, seed: int, size: int = 320) -> None:
        rng = np.random.default_rng([seed, 7])
        found = portrait(size)
        if rng.random() < 0.5:
            found = _flipped(size)
        self._photo = found
        self._change = identity_shape(rng) - topology().base
        look = random_look(rng)
        self._gain = (look.gain * (1 + rng.normal(0, 0.05, 3))).astype(np.float32)
        self._noise = np.float32(look.noise)
        edge = np.linspace(0, size - 1, 7)
        self._frame = np.array(
            [(x, y) for x in edge for y in edge if 0 in (x, y) or size - 1 in (x, y)]
        )
        self._from = np.concatenate([self._flat(found.shape, np.eye(3)), self._frame])

    def _flat(self, shape: Floats, sway: Floats) -> Floats:
        photo = self._photo
        return np.asarray((shape @ (photo.turn @ sway).T)[:, :2] * photo.unit + photo.centre)

    def __call__(
        self, units: Mapping[int, float], pose: Pose, rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """One frame, uint8 [size, size, 3]; of `pose` only the angles count."""
        shape = self._photo.shape + self._change
        for unit, strength in units.items():
            shape = shape + strength * topology().units[unit]
        sway = rotation(Pose(pose.pitch * _SWAY, pose.yaw * _SWAY, pose.roll * _SWAY))
        to = self._flat(shape, sway)
        pixels = _warped(self._photo.pixels, self._from, np.concatenate([to, self._frame]))
        pixels = _mouth(pixels, to, self._photo.unit)
        out = pixels * self._gain + rng.standard_normal(pixels.shape, np.float32) * self._noise
        return np.asarray(np.clip(out, 0, 255), np.uint8)


@functools.cache
def _flipped(size: int) -> Portrait:
    return _measured(np.ascontiguousarray(portrait(size).pixels[:, ::-1]))


def _warped(pixels: NDArray[np.uint8], source: Floats, target: Floats) -> NDArray[np.uint8]:
    """The picture with its points moved from `source` to `target` [n, 2], linear in between."""
    from matplotlib.tri import LinearTriInterpolator, Triangulation

    size = len(pixels)
    # Coincident points (closed lips) are no triangulation: part them by less than is seen.
    part = np.random.default_rng(0).normal(0, 0.02, target.shape)
    part[-1] = part[0] = 0
    mesh = Triangulation(*(target + part).T)
    line = np.minimum(np.arange(0, size + _STEP, _STEP), size - 1).astype(float)
    x, y = np.meshgrid(line, line)
    finder = mesh.get_trifinder()
    # Sample k of the grid lies on pixel k * step; Pillow measures from the corners of cells.
    low = 0.5 - 0.5 / _STEP
    box = (low, low, low + size / _STEP, low + size / _STEP)
    where = []
    for axis, own in ((0, x), (1, y)):
        value = LinearTriInterpolator(mesh, source[:, axis], trifinder=finder)(x, y)
        coarse = np.where(np.ma.getmaskarray(value), own, np.ma.getdata(value)).astype(np.float32)
        grown = np.asarray(Image.fromarray(coarse).resize((size, size), _BILINEAR, box=box))
        where.append(grown)
    return _sampled(pixels, where[0], where[1])


def _sampled(pixels: NDArray[np.uint8], x: Floats, y: Floats) -> NDArray[np.uint8]:
    """Bilinear look-up, [size, size, 3]."""
    last = len(pixels) - 1
    x, y = np.clip(x, 0, last - 1e-3), np.clip(y, 0, last - 1e-3)
    left, top = x.astype(int), y.astype(int)
    right, low = (x - left)[..., None], (y - top)[..., None]  # float32: half the time
    upper = pixels[top, left] * (1 - right) + pixels[top, left + 1] * right
    lower = pixels[top + 1, left] * (1 - right) + pixels[top + 1, left + 1] * right
    return np.asarray(upper * (1 - low) + lower * low, np.uint8)


def _mouth(pixels: NDArray[np.uint8], to: Floats, unit: float) -> NDArray[np.uint8]:
    gap = float(np.linalg.norm(to[13] - to[14])) / unit
    if gap < 0.04:
        return pixels
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)

    def fill(points: Floats, colour: tuple[int, int, int]) -> None:
        pen.polygon([(float(x), float(y)) for x, y in points], fill=colour)

    upper, lower = to[UPPER_INNER], to[LOWER_INNER]
    fill(np.concatenate([upper, lower[::-1]]), (45, 16, 18))
    teeth = upper[1:-1] + (lower - upper)[1:-1] * min(0.45, 0.05 / gap)
    fill(np.concatenate([upper[1:-1], teeth[::-1]]), (215, 205, 195))
    return np.asarray(picture)
