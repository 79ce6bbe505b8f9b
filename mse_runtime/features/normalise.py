"""From raw features to the adapter's input: the bundle's statistics, clamp, mask, cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import BundleError, MediaError
from mse_runtime.features.spec import FeatureTrack

if TYPE_CHECKING:
    from mse_runtime.bundle import FeatureInput

__all__ = ["prepare"]

_SMALLEST_STD = 1e-6
"""A column that never moved in training tells nothing; it must not explode here."""


def prepare(track: FeatureTrack | None, expected: FeatureInput) -> tuple[NDArray[np.float32], int]:
    """A modality as the adapter wants it.

    Args:
        track: raw features, or None where the modality is missing.
        expected: the bundle's entry for the modality.

    Returns:
        values float32 [T, d], T <= max_steps, z-scored with the bundle's statistics (where it has
        any), clamped to +-clip (where it has one), rows that are not valid all zero; and the
        length T. A missing modality, or one without a valid row, is zeros [1, d] and length 0.

    Raises:
        BundleError: other features than the adapter was trained on.
        MediaError: NaN or infinities where the bundle refuses them.
    """
    if track is None:
        return _missing(expected.dim)
    if (track.spec and track.spec != expected.spec) or track.dim != expected.dim:
        raise BundleError(
            f"the bundle expects {expected.spec} with {expected.dim} columns, but the features are "
            f"{track.spec or 'of an unnamed kind'} with {track.dim}. They must be made by the same "
            "extractor: take the matching feature file, or extract again from the clip."
        )
    values = track.values[: expected.max_steps].astype(np.float32)
    valid = track.valid[: expected.max_steps]
    if not valid.any():
        return _missing(expected.dim)
    finite = np.isfinite(values)
    if expected.nonfinite == "refuse" and not finite[valid].all():
        row = int(np.flatnonzero(valid & ~finite.all(1))[0])
        raise MediaError(
            f"the {expected.spec} features hold NaN or infinities (first in row {row}), which this "
            "bundle refuses. Repair the feature file or extract again."
        )
    if expected.mean is not None:
        values -= np.asarray(expected.mean, np.float32)
    if expected.std is not None:
        values /= np.maximum(np.asarray(expected.std, np.float32), _SMALLEST_STD)
    if expected.clip is not None:
        np.clip(values, -expected.clip, expected.clip, out=values)
    # After the statistics, so that what could not be measured counts as average.
    values[~finite] = 0.0
    values[~valid] = 0.0
    return values, len(values)


def _missing(dim: int) -> tuple[NDArray[np.float32], int]:
    return np.zeros((1, dim), np.float32), 0
