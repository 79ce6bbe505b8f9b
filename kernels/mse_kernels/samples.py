"""Numbers that look random, without numpy.random, whose import would take longer than all of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["between", "whole"]


def whole(shape: tuple[int, ...], low: int, high: int, seed: int = 0) -> NDArray[np.int64]:
    """Whole numbers from `low` to below `high` (at most 2^31 of them), the same each time."""
    count = int(np.prod(shape))
    mixed = np.arange(seed << 32, (seed << 32) + count, dtype=np.uint64)
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9):
        mixed = mixed * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return (low + (mixed >> np.uint64(32)).astype(np.int64) % (high - low)).reshape(shape)


def between(shape: tuple[int, ...], low: float, high: float, seed: int = 0) -> NDArray[np.float64]:
    """Real numbers from `low` to below `high`, the same each time."""
    return low + (high - low) * whole(shape, 0, 1 << 24, seed) / (1 << 24)
