"""Drawing the head with Pillow: shaded triangles, eyes, mouth, hair, glasses, light and noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mse_export.training.tiny.head import (
    BROW_LOWER,
    BROW_UPPER,
    EYE,
    LID_LOWER,
    LID_UPPER,
    LOWER_INNER,
    LOWER_OUTER,
    UPPER_INNER,
    UPPER_OUTER,
    Floats,
    mirrored,
    topology,
)

__all__ = ["Look", "Pose", "draw", "random_look", "rotation"]

_SKIN = np.array(
    [[236, 200, 176], [224, 178, 148], [205, 152, 118], [176, 122, 88], [134, 88, 62], [96, 62, 46]]
)
_HAIR = np.array(
    [[40, 28, 22], [70, 46, 30], [120, 84, 50], [180, 150, 100], [25, 22, 24], [150, 150, 150]]
)
_IRIS = np.array([[70, 45, 30], [60, 90, 120], [70, 95, 60]])
_SUPER = 2  # drawn at twice the size: Pillow's polygons have hard edges


@dataclass(frozen=True)
class Look:
    """Colours and accessories of an actor (RGB 0..255) and the camera's quirks."""

    skin: Floats
    hair: Floats
    iris: Floats
    background: Floats
    floor: Floats
    cloth: Floats
    light: Floats
    ambient: float
    style: int
    glasses: bool
    beard: bool
    brow: float
    gain: float
    noise: float


@dataclass(frozen=True)
class Pose:
    """Where the head is in the picture."""

    pitch: float = 0.0
    yaw: float = 0.0
    roll: float = 0.0
    scale: float = 85.0
    """Pixels per inter-ocular distance."""
    x: float = 0.5
    y: float = 0.4
    """Centre, in parts of the picture."""
    gaze: tuple[float, float] = (0.0, 0.0)


def random_look(rng: np.random.Generator) -> Look:
    """An actor's look."""
    return Look(
        skin=_SKIN[rng.integers(6)] + rng.normal(0, 6, 3),
        hair=_HAIR[rng.integers(6)].astype(float),
        iris=_IRIS[rng.integers(3)].astype(float),
        background=rng.uniform(30, 220, 3),
        floor=rng.uniform(30, 220, 3),
        cloth=rng.uniform(20, 220, 3),
        light=rng.normal([0, -0.5, -1], [0.5, 0.3, 0.1]),
        ambient=float(rng.uniform(0.45, 0.7)),
        style=int(rng.integers(4)),
        glasses=bool(rng.random() < 0.25),
        beard=bool(rng.random() < 0.2),
        brow=float(rng.uniform(0.7, 1.4)),
        gain=float(rng.uniform(0.75, 1.15)),
        noise=float(rng.uniform(1, 6)),
    )


def rotation(pose: Pose) -> Floats:
    """Rotation matrix [3, 3] of a pose."""
    (cx, cy, cz), (sx, sy, sz) = (
        np.cos([pose.pitch, pose.yaw, pose.roll]),
        np.sin([pose.pitch, pose.yaw, pose.roll]),
    )
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


def _rgb(value: Floats) -> tuple[int, int, int]:
    red, green, blue = np.clip(value, 0, 255).astype(int)
    return int(red), int(green), int(blue)


class _Canvas:
    """A picture being drawn; coordinates in its own (doubled) pixels."""

    def __init__(self, size: int, look: Look) -> None:
        ramp = np.linspace(0, 1, size)[:, None, None]
        ground = look.background * (1 - ramp) + look.floor * ramp
        pixels = np.broadcast_to(ground, (size, size, 3)).clip(0, 255).astype(np.uint8)
        self.image = Image.fromarray(np.ascontiguousarray(pixels))
        self.pen = ImageDraw.Draw(self.image)

    def ellipse(self, centre: Floats, half: tuple[float, float], colour: Floats) -> None:
        (x, y), (w, h) = centre, half
        self.pen.ellipse((x - w, y - h, x + w, y + h), fill=_rgb(colour))

    def polygon(self, points: Floats, colour: Floats) -> None:
        self.pen.polygon([(float(x), float(y)) for x, y in points], fill=_rgb(colour))

    def line(self, points: Floats, colour: Floats, width: float) -> None:
        flat = [(float(x), float(y)) for x, y in points]
        self.pen.line(flat, fill=_rgb(colour), width=max(1, round(width)), joint="curve")


def _shade(shape3d: Floats, look: Look) -> Floats:
    """Lambert shading per point, [468]."""
    triangles = topology().triangles
    corner = shape3d[triangles]
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    normal *= -np.sign(normal[:, 2:] + 1e-9)
    points = np.zeros((468, 3))
    for k in range(3):
        np.add.at(points, triangles[:, k], normal)
    points /= np.linalg.norm(points, axis=1, keepdims=True) + 1e-9
    light = look.light / np.linalg.norm(look.light)
    return np.asarray(look.ambient + (1 - look.ambient) * np.clip(points @ light, 0, 1) * 1.25)


def _albedo(look: Look) -> Floats:
    """Skin colour per point [468, 3]: cheeks, eye sockets, beard."""
    top = topology()
    flat = top.base[:, :2]
    colour = np.repeat(look.skin[None], 468, 0)

    def near(point: Floats, spread: float) -> Floats:
        return np.asarray(np.exp(-((flat - point[:2]) ** 2).sum(1) / spread))

    cheeks = near(top.base[50], 0.02) + near(top.base[280], 0.02)
    colour *= 1 - np.outer(cheeks, [0.0, 0.1, 0.08])
    if look.beard:
        weight = np.clip((flat[:, 1] - top.mouth_y + 0.03) / 0.1, 0, 1) * 0.55
        weight[[*UPPER_OUTER, *LOWER_OUTER, *UPPER_INNER, *LOWER_INNER]] = 0
        colour = colour * (1 - weight[:, None]) + look.hair * weight[:, None]
    for eye in (EYE, mirrored(EYE)):
        colour *= 1 - 0.18 * near(top.base[eye].mean(0), 0.012)[:, None]
    return np.asarray(colour)


def draw(
    shape: Floats, look: Look, pose: Pose, size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """One frame, uint8 [size, size, 3], of a shape [468, 3] in the face frame."""
    big, unit = size * _SUPER, pose.scale * _SUPER
    turned = shape @ rotation(pose).T
    depth = 1 / (1 + turned[:, 2] * 0.12)
    centre = np.array([pose.x, pose.y]) * big
    flat = turned[:, :2] * depth[:, None] * unit + centre
    canvas = _Canvas(big, look)
    _body(canvas, flat, look)
    shade = _shade(turned, look)
    _skin(canvas, flat, turned, shade, look, unit)
    level = float(shade.mean())
    _features(canvas, shape, flat, look, unit, level)
    for eye, upper, lower in (
        (EYE, LID_UPPER, LID_LOWER),
        (mirrored(EYE), mirrored(LID_UPPER), mirrored(LID_LOWER)),
    ):
        _eye(canvas, flat, eye, upper, lower, look, pose, level, unit)
    _hair(canvas, flat, look, level, unit)
    small = np.asarray(canvas.image.reduce(_SUPER), np.float32) * look.gain
    small += rng.standard_normal(small.shape, np.float32) * look.noise
    return np.asarray(np.clip(small, 0, 255), np.uint8)


def _body(canvas: _Canvas, flat: Floats, look: Look) -> None:
    top, chin = flat[10], flat[152]
    middle = (flat[234] + flat[454]) / 2
    wide = float(np.linalg.norm(flat[234] - flat[454]))
    up = (top - chin) / np.linalg.norm(top - chin)
    canvas.ellipse(chin - up * wide * 1.05, (wide * 1.25, wide * 0.75), look.cloth)
    canvas.ellipse(chin - up * wide * 0.1, (wide * 0.33, wide * 0.45), look.skin * 0.72)
    if look.style in (1, 3):
        canvas.ellipse(middle - up * wide * 0.1, (wide * 0.68, wide * 0.98), look.hair)
    else:
        canvas.ellipse(middle + up * wide * 0.22, (wide * 0.57, wide * 0.72), look.hair)
    for ear in (234, 454):
        canvas.ellipse(flat[ear] - up * wide * 0.04, (wide * 0.07, wide * 0.14), look.skin * 0.85)
    canvas.ellipse(middle + up * wide * 0.18, (wide * 0.49, wide * 0.6), look.skin * 0.95)


def _skin(
    canvas: _Canvas, flat: Floats, turned: Floats, shade: Floats, look: Look, unit: float
) -> None:
    triangles = topology().triangles
    colour = (_albedo(look) * shade[:, None])[triangles].mean(1)
    colour = np.clip(colour, 0, 255).astype(int)
    order = np.argsort(-turned[triangles][:, :, 2].mean(1))
    corners = flat[triangles].reshape(-1, 6)
    polygon = canvas.pen.polygon
    for k in order:
        polygon(corners[k].tolist(), fill=tuple(colour[k].tolist()))
    # Blur the facets away before anything sharp is drawn on them.
    low = np.maximum(flat.min(0).astype(int) - 8, 0)
    high = np.minimum(flat.max(0).astype(int) + 8, canvas.image.width)
    box = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
    if box[0] < box[2] and box[1] < box[3]:
        patch = canvas.image.crop(box).filter(ImageFilter.BoxBlur(unit * 0.014))
        canvas.image.paste(patch, box[:2])


def _features(
    canvas: _Canvas, shape: Floats, flat: Floats, look: Look, unit: float, level: float
) -> None:
    skin = look.skin * level
    for nostril in (79, 309):
        canvas.ellipse(flat[nostril], (unit * 0.028, unit * 0.016), skin * 0.38)
    canvas.line(flat[[129, 98, 97, 2, 326, 327, 358]], skin * 0.7, 0.012 * unit)
    lift = max(0.0, float(topology().base[61, 1] - shape[61, 1]))
    fold = [129, 203, 206, 216]
    for points in (fold, mirrored(fold)):
        canvas.line(flat[points], skin * (0.92 - min(lift * 2, 0.25)), 0.014 * unit)
    lips = look.skin * [0.85, 0.62, 0.62] + [10, 0, 0]
    inside = flat[[*UPPER_INNER, *LOWER_INNER[::-1]]]
    canvas.polygon(inside, np.array([45.0, 14.0, 16.0]))
    gap = float(np.linalg.norm(flat[13] - flat[14])) / unit
    if gap > 0.03:
        upper, lower = flat[UPPER_INNER][1:-1], flat[LOWER_INNER][1:-1]
        teeth = upper + (lower - upper) * min(0.45, 0.05 / gap)
        colour = np.array([235.0, 230.0, 220.0]) * level
        canvas.polygon(np.concatenate([upper, teeth[::-1]]), colour)
    canvas.polygon(flat[[*UPPER_OUTER, *UPPER_INNER[::-1]]], lips * level * 0.88)
    canvas.polygon(flat[[*LOWER_OUTER, *LOWER_INNER[::-1]]], lips * level * 1.02)
    canvas.line(flat[UPPER_INNER], skin * 0.35, 0.012 * unit)
    if gap > 0.02:
        canvas.line(flat[LOWER_INNER], skin * 0.5, 0.008 * unit)


def _eye(
    canvas: _Canvas,
    flat: Floats,
    eye: list[int],
    upper: list[int],
    lower: list[int],
    look: Look,
    pose: Pose,
    level: float,
    unit: float,
) -> None:
    skin = look.skin * level
    low = np.floor(flat[eye].min(0) - 2).astype(int)
    high = np.ceil(flat[eye].max(0) + 2).astype(int)
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    ball = Image.new("RGB", size, _rgb(np.array([236.0, 232.0, 230.0]) * level))
    mask = Image.new("L", size, 0)
    outline = [(float(x), float(y)) for x, y in flat[eye] - low]
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    first, last = flat[eye[0]], flat[eye[8]]
    width = float(np.linalg.norm(first - last))
    iris = (first + last) / 2 + np.array([pose.gaze[0], pose.gaze[1] - 0.02]) * width - low
    pen = ImageDraw.Draw(ball)
    for radius, colour, shift in (
        (0.225, look.iris * level, 0.0),
        (0.1, np.array([12.0, 10.0, 10.0]), 0.0),
        (0.04, np.array([250.0, 250.0, 250.0]), 0.075),
    ):
        (x, y), r = iris - shift * width, radius * width
        pen.ellipse((x - r, y - r, x + r, y + r), fill=_rgb(colour))
    canvas.image.paste(ball, (int(low[0]), int(low[1])), mask)
    ends = [eye[0]], [eye[8]]
    canvas.line(flat[[*ends[0], *upper, *ends[1]]], look.hair * 0.4, 0.02 * unit)
    canvas.line(flat[[*ends[0], *lower, *ends[1]]], skin * 0.62, 0.009 * unit)


def _hair(canvas: _Canvas, flat: Floats, look: Look, level: float, unit: float) -> None:
    middle = (flat[234] + flat[454]) / 2
    wide = float(np.linalg.norm(flat[234] - flat[454]))
    up = (flat[10] - flat[152]) / np.linalg.norm(flat[10] - flat[152])
    for upper, lower in (
        (BROW_UPPER, BROW_LOWER),
        (mirrored(BROW_UPPER), mirrored(BROW_LOWER)),
    ):
        edge = flat[upper]
        other = edge + (flat[lower] - edge) * min(1.0, 0.85 * look.brow)
        colour = look.hair * 0.8 * level + look.skin * level * 0.08
        canvas.polygon(np.concatenate([edge, other[::-1]]), colour)
    if look.style != 2:
        line = flat[[21, 54, 103, 67, 109, 10, 338, 297, 332, 284, 251]]
        out = line + (line - middle) * 0.28 + up * wide * 0.06
        canvas.polygon(np.concatenate([line, out[::-1]]), look.hair)
    if look.style in (1, 3):
        for side in ([127, 162, 21, 54], [356, 389, 251, 284]):
            line = flat[side]
            out = line + (line - middle) * 0.25
            canvas.polygon(np.concatenate([line, out[::-1]]), look.hair)
    if look.glasses:
        right, left = flat[EYE].mean(0), flat[mirrored(EYE)].mean(0)
        rim = max(1, round(unit * 0.016))
        for x, y in (right, left):
            box = (x - unit * 0.2, y - unit * 0.155, x + unit * 0.2, y + unit * 0.155)
            canvas.pen.ellipse(box, outline=(25, 25, 30), width=rim)
        bridge = np.stack([right + (left - right) * 0.33, right + (left - right) * 0.67])
        canvas.line(bridge, np.array([25.0, 25.0, 30.0]), rim)
