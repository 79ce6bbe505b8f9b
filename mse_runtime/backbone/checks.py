"""What llama.cpp would abort the process for, refused in Python first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mse_runtime.backbone.batch import Inputs
from mse_runtime.errors import BackboneError

__all__ = ["inputs", "passes", "token_ids", "whole_numbers"]


def whole_numbers(values: npt.ArrayLike, what: str) -> npt.NDArray[np.int64]:
    """A one-dimensional integer array [n]; an empty list will do."""
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise BackboneError(f"{what} must be a list of whole numbers: {error}.") from error
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise BackboneError(
            f"{what} must be a list of whole numbers, not {found.dtype} of the shape {found.shape}."
        )
    return found.astype(np.int64)


def token_ids(ids: npt.ArrayLike, n_vocab: int) -> npt.NDArray[np.int32]:
    """Token ids int32 [n], each in 0 .. n_vocab - 1."""
    found = whole_numbers(ids, "Token ids")
    if found.size and (found.min() < 0 or found.max() >= n_vocab):
        raise BackboneError(
            f"Token ids must lie in 0 .. {n_vocab - 1}, got {found.min()} .. {found.max()}. "
            "Tokenise with the same model."
        )
    return found.astype(np.int32)


def inputs(values: npt.ArrayLike, n_vocab: int, n_embd: int) -> Inputs:
    """Token ids int32 [n] or embedding rows float32 [n, n_embd], at least one, all finite."""
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise BackboneError(f"A batch must be ids [n] or rows [n, {n_embd}]: {error}.") from error
    if not found.size:
        raise BackboneError("An empty batch has no logits: give at least one id or row.")
    if found.ndim == 1 and np.issubdtype(found.dtype, np.integer):
        return token_ids(found, n_vocab)
    if found.ndim != 2 or found.shape[1] != n_embd or not np.issubdtype(found.dtype, np.floating):
        raise BackboneError(
            f"A batch must be whole-number ids [n] or rows of floats [n, {n_embd}], not "
            f"{found.dtype} of the shape {found.shape}."
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused below
        rows = np.ascontiguousarray(found, np.float32)
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise BackboneError(
            f"Embedding row {bad} holds NaN or infinity, which would spoil the whole sequence. "
            "Check the adapter's output and the features it was given."
        )
    return rows


def passes(
    wanted: npt.NDArray[np.bool_], n_batch: int, n_outputs: int
) -> Iterator[tuple[int, int]]:
    """Cut a run of entries where either the batch or its outputs would be too many."""
    start = outputs = 0
    for at, output in enumerate(wanted.tolist()):
        if at - start == n_batch or (output and outputs == n_outputs):
            yield start, at
            start, outputs = at, 0
        outputs += output
    yield start, len(wanted)
