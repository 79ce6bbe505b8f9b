"""A sequence's keys and values as bytes, with a header that only the same setting accepts.

llama.cpp trusts most of what it reads here, so damage is found in Python first.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mse_runtime.errors import BackboneError

__all__ = ["load", "save"]

_HEADER = struct.Struct("<8s16sIIQ")  # magic, fingerprint, positions, CRC-32, payload bytes
_MAGIC = b"MSEKV\x00\x00\x01"


def _digest(fingerprint: Sequence[object]) -> bytes:
    return hashlib.sha256(repr(tuple(fingerprint)).encode()).digest()[:16]


def save(lib: Any, context: Any, fingerprint: Sequence[object], seq: int, length: int) -> bytes:
    """Header and llama.cpp's own bytes of one sequence."""
    size = int(lib.llama_state_seq_get_size(context, seq))
    payload = (ctypes.c_uint8 * size)()
    written = int(lib.llama_state_seq_get_data(context, payload, size, seq))
    if not 0 < written <= size:
        raise BackboneError(f"llama.cpp could not save sequence {seq}. Run mse-doctor.")
    body = memoryview(payload)[:written].cast("B")
    return _HEADER.pack(_MAGIC, _digest(fingerprint), length, zlib.crc32(body), written) + body


def load(
    lib: Any,
    context: Any,
    fingerprint: Sequence[object],
    seq: int,
    saved: bytes | memoryview,
    n_ctx: int,
) -> None:
    """Put a saved sequence in place of `seq`."""
    if not isinstance(saved, bytes | bytearray | memoryview) or len(saved) < _HEADER.size:
        raise BackboneError("This is no saved state of a sequence: use the bytes of save_state.")
    magic, digest, length, crc, size = _HEADER.unpack_from(saved)
    body = memoryview(saved)[_HEADER.size :]
    if magic != _MAGIC or len(body) != size or zlib.crc32(body) != crc:
        raise BackboneError("The saved state is damaged or of another version. Prefill again.")
    if digest != _digest(fingerprint):
        raise BackboneError(
            "The saved state belongs to another model, cache type, attention setting or rotary "
            "table. Prefill again."
        )
    if length > n_ctx:
        raise BackboneError(f"The saved state has {length} positions; n_ctx is only {n_ctx}.")
    if not length:
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), seq, -1, -1)
        return
    payload = np.frombuffer(body, np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if int(lib.llama_state_seq_set_data(context, payload, size, seq)) != size:
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), seq, -1, -1)
        raise BackboneError(
            f"The KV cache has no room for the {length} positions of the saved state (n_ctx "
            f"{n_ctx}, shared by all sequences). Clear other sequences first."
        )
