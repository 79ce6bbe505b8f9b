"""One batch of inputs, checked before any kernel sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mse_kernels.errors import InputError

__all__ = ["NAMES", "Batch", "check", "not_finite", "refuse_lengths"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
NAMES = ("audio", "video", "text")


class Batch(NamedTuple):
    """Aligned C-order arrays: rows [B, T, d] float32 and lengths [B] int64, three times."""

    audio: F32
    audio_len: I64
    video: F32
    video_len: I64
    text: F32
    text_len: I64

    def part(self, first: int, last: int) -> Batch:
        """Samples `first` to `last` - 1."""
        own = slice(first, last)
        audio, video, text = self.audio[own], self.video[own], self.text[own]
        return Batch(
            audio, self.audio_len[own], video, self.video_len[own], text, self.text_len[own]
        )


_F32, _I64 = np.dtype(np.float32), np.dtype(np.int64)


def _plain(value: np.ndarray[Any, Any]) -> bool:
    # Before `np.require`, which takes microseconds to find out that nothing is to be done.
    flags = value.flags
    return flags.c_contiguous and flags.aligned


def _rows(name: str, value: Any, dim: int) -> F32:
    if not isinstance(value, np.ndarray) or value.dtype != _F32:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{name} is {kind}; pass a float32 array [B, T, {dim}]")
    if value.ndim != 3 or value.shape[2] != dim:
        raise InputError(f"{name} has shape {value.shape}, expected [B, T, {dim}]")
    return value if _plain(value) else np.require(value, np.float32, ["C", "A"])


def _lengths(name: str, value: Any, batch: int) -> I64:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.shape != (batch,):
        raise InputError(
            f"{name}_len is {array.dtype} {array.shape}; pass integers of shape ({batch},)"
        )
    if array.dtype == _I64 and _plain(array):
        return array
    return np.require(array, np.int64, ["C", "A"])


def check(dims: tuple[int, int, int], args: tuple[Any, ...]) -> Batch:
    """Types and shapes; views that are strided or misaligned are copied once, wrong types refused.

    dims: feature widths of audio, video and text. Lengths are compared with T by the kernels'
    entry points (`refuse_lengths`), values while they are read (`not_finite`).
    """
    out: list[Any] = []
    batch = -1
    for i, name in enumerate(NAMES):
        rows = _rows(name, args[2 * i], dims[i])
        if batch < 0:
            batch = rows.shape[0]
        elif rows.shape[0] != batch:
            raise InputError(f"{name} has {rows.shape[0]} samples, audio has {batch}")
        out += [rows, _lengths(name, args[2 * i + 1], batch)]
    return Batch(*out)


def refuse_lengths(batch: Batch) -> None:
    """Raise InputError for the first length that is negative or longer than its input."""
    for i, name in enumerate(NAMES):
        steps, lengths = batch[2 * i].shape[1], batch[2 * i + 1]
        wrong = np.flatnonzero((lengths < 0) | (lengths > steps))
        if wrong.size:
            b = int(wrong[0])
            raise InputError(
                f"{name}_len[{b}] is {int(lengths[b])}, outside 0..{steps}, the rows of {name}"
            )


def not_finite(name: str, sample: int, step: int, column: int) -> InputError:
    """The error for a NaN or infinity in a frame that counts."""
    at = f"[{sample}, {step}, {column}]" if step >= 0 else f"[{sample}]"
    return InputError(
        f"{name}{at} is not finite (or its mean overflows); clean the features as the bundle says "
        "(`nonfinite`), or pass a shorter length"
    )
