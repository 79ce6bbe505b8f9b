"""Random tensors directly in a quantised type.

Blocks are random bits with their scale fields set, so a 7B model costs no more than writing its
quantised bytes. The scale is measured, not derived: a sample block is dequantised once per type
and the fields are chosen so that the weights have the wanted standard deviation and no offset.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as T
from gguf.quants import dequantize
from numpy.typing import NDArray

__all__ = ["random_blocks"]

CHUNK = 1 << 25  # bytes generated at once


@dataclass(frozen=True)
class _Layout:
    """Where a block keeps its fp16 scale, and its fp16 offset as a multiple of the scale."""

    scale_at: int
    offset_at: int | None = None
    offset_ratio: float = 0.0


# The offset ratio is minus the mean level (Q4_1, Q5_1), or the mean level that is subtracted.
_LAYOUTS = {
    T.Q4_0: _Layout(0),
    T.Q4_1: _Layout(0, 2, -7.5),
    T.Q5_0: _Layout(0),
    T.Q5_1: _Layout(0, 2, -15.5),
    T.Q8_0: _Layout(0),
    T.Q2_K: _Layout(80, 82, 1.5),
    T.Q3_K: _Layout(108),
    T.Q4_K: _Layout(0, 2, 7.5),
    T.Q5_K: _Layout(0, 2, 15.5),
    T.Q6_K: _Layout(208),
    T.IQ4_NL: _Layout(0),
    T.IQ4_XS: _Layout(0),
}


def _unit_deviation(kind: T, layout: _Layout) -> float:
    """Standard deviation of the weights when the scale field is 2^-7."""
    blocks = _bits(np.random.default_rng(0), 512, kind)
    _set_scale(blocks, layout, 2.0**-7)
    return float(dequantize(blocks, kind).std())


def _bits(rng: np.random.Generator, count: int, kind: T) -> NDArray[np.uint8]:
    size = int(GGML_QUANT_SIZES[kind][1])
    words = rng.integers(0, 1 << 64, size=-(-count * size // 8), dtype=np.uint64, endpoint=False)
    return words.view(np.uint8)[: count * size].reshape(count, size)


def _set_scale(blocks: NDArray[np.uint8], layout: _Layout, scale: float) -> None:
    fields = [(layout.scale_at, scale)]
    if layout.offset_at is not None:
        fields.append((layout.offset_at, scale * layout.offset_ratio))
    for at, value in fields:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)


def random_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], kind: T, deviation: float
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor of random weights, in chunks.

    deviation: standard deviation of the weights; their mean is 0 (Q4_0 and Q5_0, whose levels are
    not symmetric, are off by a tenth of the deviation).
    """
    count = math.prod(shape)
    if kind in (T.F32, T.F16, T.BF16):
        yield from _floats(rng, count, kind, deviation)
        return
    layout = _LAYOUTS[kind]
    scale = 2.0**-7 * deviation / _unit_deviation(kind, layout)
    block, size = GGML_QUANT_SIZES[kind]
    left = count // block
    while left:
        step = min(left, CHUNK // size)
        blocks = _bits(rng, step, kind)
        _set_scale(blocks, layout, scale)
        yield blocks.reshape(-1)
        left -= step


def _floats(
    rng: np.random.Generator, count: int, kind: T, deviation: float
) -> Iterator[NDArray[np.uint8]]:
    """Uniform values; their range is sqrt(3) deviations."""
    reach = np.float32(math.sqrt(3.0) * deviation)
    left = count
    while left:
        step = min(left, CHUNK // 4)
        values = (rng.random(step, dtype=np.float32) * 2 - 1) * reach
        if kind == T.F16:
            yield values.astype(np.float16).view(np.uint8)
        elif kind == T.BF16:
            yield (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            yield values.view(np.uint8)
        left -= step
