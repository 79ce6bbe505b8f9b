"""Rotated square regions of a picture, and the crop that a network sees of one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import UsageError
from mse_runtime.records import dataclass

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Floats", "Picture", "Region", "box_iou"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Region:
    """A square of a picture: centre and side in px, rotation in rad (clockwise on screen)."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    def affine(self, size: int, *, mirror: bool = False) -> tuple[float, ...]:
        """Pillow's (a, b, c, d, e, f): from a pixel of a `size` x `size` crop to the picture.

        A crop pixel samples the picture at its own corner rather than its centre (hence the half
        pixels): MediaPipe crops that way, its networks were trained on such crops, and landmarks
        agree ten times better with its own.
        """
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        step, half = self.side / size, self.side / 2
        a, b, d, e = cos * step, -sin * step, sin * step, cos * step
        c = self.x - cos * half + sin * half + 0.5 - (a + b) / 2
        f = self.y - sin * half - cos * half + 0.5 - (d + e) / 2
        if mirror:  # walk each row from its right end
            c, f, a, d = c + a * size, f + d * size, -a, -d
        return a, b, c, d, e, f

    def bounds(self) -> tuple[int, int, int, int]:
        """The upright box x0, y0, x1, y1 (integers) that holds every pixel a crop touches."""
        reach = self.side / 2 * (abs(math.cos(self.angle)) + abs(math.sin(self.angle))) + 2
        return (
            math.floor(self.x - reach),
            math.floor(self.y - reach),
            math.ceil(self.x + reach),
            math.ceil(self.y + reach),
        )

    def to_picture(self, points: Floats, size: int) -> Floats:
        """Crop pixels [..., 2 or 3] of a `size` x `size` crop -> picture pixels, same shape.

        A third coordinate (depth) is only scaled.
        """
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        scale = self.side / size
        u = (points[..., 0] - size / 2) * scale
        v = (points[..., 1] - size / 2) * scale
        out = np.empty(points.shape, np.float32)
        out[..., 0] = self.x + cos * u - sin * v
        out[..., 1] = self.y + sin * u + cos * v
        if points.shape[-1] == 3:
            out[..., 2] = points[..., 2] * scale
        return out


class Picture:
    """A frame to cut regions from; RGBX pixels are used where they lie, RGB ones copied once."""

    def __init__(self, frame: NDArray[np.uint8]) -> None:
        """`frame`: uint8 [H, W, 3] RGB or [H, W, 4] RGBX; UsageError for another shape or type."""
        shape = frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or shape[2] not in (3, 4) or not frame.size:
            raise UsageError(
                f"a frame must be uint8 [height, width, 3 or 4], not {frame.dtype} {shape}."
            )
        if shape[2] == 3:
            padded = np.empty((*shape[:2], 4), np.uint8)
            padded[..., :3] = frame
            frame = padded
        self._pixels = np.ascontiguousarray(frame).view(np.uint32)[..., 0]
        self._image = _over(self._pixels)
        self.size: tuple[int, int] = (shape[1], shape[0])
        """Width and height in pixels."""

    def crop(
        self, region: Region, size: int, *, mirror: bool = False, outside: str = "edge"
    ) -> NDArray[np.uint8]:
        """The region resampled to [size, size, 3] (bilinear).

        `mirror` flips it left to right; beyond the frame the picture goes on with its edge, or
        with black where `outside` is "black".
        """
        from PIL.Image import Resampling, Transform

        image = self._image
        if outside == "edge":
            image, region = self._continued(region)
        cut = image.transform(
            (size, size),
            Transform.AFFINE,
            region.affine(size, mirror=mirror),
            resample=Resampling.BILINEAR,
        )
        return np.asarray(cut.convert("RGB"))

    def _continued(self, region: Region) -> tuple[Image.Image, Region]:
        """A picture that covers `region`, edges repeated where the frame ends."""
        width, height = self.size
        x0, y0, x1, y1 = region.bounds()
        if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
            return self._image, region
        # a region wholly outside still repeats the nearest row or column
        left, top = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
        right, bottom = max(min(x1, width), left + 1), max(min(y1, height), top + 1)
        x0, y0, x1, y1 = min(x0, left), min(y0, top), max(x1, right), max(y1, bottom)
        wide = np.empty((y1 - y0, x1 - x0), np.uint32)
        rows = slice(top - y0, bottom - y0)
        wide[rows, left - x0 : right - x0] = self._pixels[top:bottom, left:right]
        wide[rows, : left - x0] = wide[rows, left - x0, None]
        wide[rows, right - x0 :] = wide[rows, right - x0 - 1, None]
        wide[: top - y0] = wide[top - y0]
        wide[bottom - y0 :] = wide[bottom - y0 - 1]
        return _over(wide), Region(region.x - x0, region.y - y0, region.side, region.angle)


def _over(pixels: NDArray[np.uint32]) -> Image.Image:
    """A Pillow picture over RGBX pixels [H, W], not copied."""
    from PIL import Image

    data: Any = pixels
    size = (pixels.shape[1], pixels.shape[0])
    return Image.frombuffer("RGBX", size, data, "raw", "RGBX", 0, 1)


def box_iou(boxes: Floats, box: Floats) -> Floats:
    """Intersection over union of `boxes` [n, 4] (x0, y0, x1, y1) with `box` [4] -> [n]."""
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, 2:], box[2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=1)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return np.asarray(overlap / np.maximum(area - overlap, 1e-9), np.float32)
