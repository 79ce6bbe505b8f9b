"""One `llama_batch` over numpy memory: no copies, no per-token Python."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mse_runtime.records import dataclass

__all__ = ["Entries", "Inputs", "fillers", "make_batch"]

Inputs = npt.NDArray[np.int32] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entries:
    """What one decode is about: n entries, in order.

    `inputs` int32 [n] (token ids) or float32 [n, D] (embedding rows); `positions` int32 [n];
    `sequences`: for each entry the sequence ids that see it; `wanted` bool [n]: logits or not.
    """

    inputs: Inputs
    positions: npt.NDArray[np.int32]
    sequences: Sequence[Sequence[int]]
    wanted: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, start: int, stop: int) -> Entries:
        """The entries start .. stop - 1."""
        return Entries(
            self.inputs[start:stop],
            self.positions[start:stop],
            self.sequences[start:stop],
            self.wanted[start:stop],
        )

    def filled(self, count: int, sequence: int) -> Entries:
        """With `count` entries more, the last one's twins in an empty sequence of their own."""
        last = self.inputs[-1:]
        return Entries(
            np.concatenate([self.inputs, *[last] * count]),
            np.concatenate([self.positions, np.arange(count, dtype=np.int32)]),
            [*self.sequences, *[(sequence,)] * count],
            np.concatenate([self.wanted, np.zeros(count, np.bool_)]),
        )


def fillers(n: int) -> int:
    """How many entries more make a pass of n cheaper where the weights are repacked.

    llama.cpp multiplies them with four rows at a time, what is left with single ones that cost half
    as much as four, and has a faster way for 16.
    """
    if n % 16 > 12:
        return -n % 16
    return -n % 4 if n % 4 > 1 else 0


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def make_batch(lib: Any, entries: Entries) -> tuple[Any, list[Any]]:
    """The C struct, and the arrays it points into: keep these until the decode has returned.

    Of `token` and `embd` exactly one is set: llama.cpp takes the token where both are.
    """
    inputs = np.ascontiguousarray(entries.inputs)
    counts = np.array([len(ids) for ids in entries.sequences], np.int32)
    flat = np.array([seq for ids in entries.sequences for seq in ids], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.uint64)
    pointers = np.uint64(flat.ctypes.data) + starts * np.uint64(flat.itemsize)
    pointers = np.append(pointers, np.uint64(0))
    positions = np.ascontiguousarray(entries.positions, np.int32)
    wanted = np.ascontiguousarray(entries.wanted, np.int8)
    batch = lib.llama_batch()
    batch.n_tokens = len(entries)
    if inputs.ndim == 1:
        batch.token = _pointer(inputs, lib.llama_token)
    else:
        batch.embd = _pointer(inputs, ctypes.c_float)
    batch.pos = _pointer(positions, lib.llama_pos)
    batch.n_seq_id = _pointer(counts, ctypes.c_int32)
    batch.seq_id = ctypes.cast(
        _pointer(pointers, ctypes.c_uint64), ctypes.POINTER(ctypes.POINTER(lib.llama_seq_id))
    )
    batch.logits = _pointer(wanted, ctypes.c_int8)
    return batch, [inputs, counts, flat, pointers, positions, wanted]
