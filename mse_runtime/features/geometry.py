"""Rotated square regions of a picture, and the crop that a network sees of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Region", "box_iou", "open_frame"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Region:
    """A square of a picture: centre and side in pixels, rotation in radians (clockwise on screen).

    Pixel coordinates are continuous: the centre of the first pixel is (0.5, 0.5).
    """

    x: float
    y: float
    side: float
    angle: float = 0.0

    def _axes(self) -> tuple[float, float]:
        return math.cos(self.angle), math.sin(self.angle)

    def crop(self, image: Image.Image, size: int, *, mirror: bool = False) -> NDArray[np.uint8]:
        """The region resampled to `size` x `size` pixels (bilinear, black outside): [size,size,3].

        `mirror` flips it left to right.
        """
        from PIL.Image import Resampling, Transform

        cos, sin = self._axes()
        step = self.side / size
        half = self.side / 2
        a, b, d, e = cos * step, -sin * step, sin * step, cos * step
        c = self.x - cos * half + sin * half
        f = self.y - sin * half - cos * half
        if mirror:  # walk each row from its right end
            c, f, a, d = c + a * size, f + d * size, -a, -d
        out = image.transform(
            (size, size), Transform.AFFINE, (a, b, c, d, e, f), resample=Resampling.BILINEAR
        )
        return np.asarray(out)[..., :3]

    def to_picture(self, points: Floats, size: int) -> Floats:
        """Crop pixels [..., 2 or 3] of a `size` x `size` crop -> picture pixels, same shape.

        A third coordinate (depth) is only scaled.
        """
        cos, sin = self._axes()
        scale = self.side / size
        u = (points[..., 0] - size / 2) * scale
        v = (points[..., 1] - size / 2) * scale
        out = np.empty(points.shape, np.float32)
        out[..., 0] = self.x + cos * u - sin * v
        out[..., 1] = self.y + sin * u + cos * v
        if points.shape[-1] == 3:
            out[..., 2] = points[..., 2] * scale
        return out


def open_frame(frame: NDArray[np.uint8]) -> Image.Image:
    """A Pillow picture over `frame` (uint8 [H, W, 3] RGB or [H, W, 4] RGBX); RGBX is not copied.

    Raises UsageError for another shape or type.
    """
    from PIL import Image

    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] not in (3, 4) or not frame.size:
        raise UsageError(
            f"a frame must be uint8 [height, width, 3 or 4], not {frame.dtype} {frame.shape}."
        )
    height, width, channels = frame.shape
    if channels == 3:
        return Image.fromarray(np.ascontiguousarray(frame))
    data: Any = np.ascontiguousarray(frame)
    return Image.frombuffer("RGBX", (width, height), data, "raw", "RGBX", 0, 1)


def box_iou(boxes: Floats, box: Floats) -> Floats:
    """Intersection over union of `boxes` [n, 4] (x0, y0, x1, y1) with `box` [4] -> [n]."""
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, 2:], box[2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=1)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return np.asarray(overlap / np.maximum(area - overlap, 1e-9), np.float32)
