"""Rows of float32 as the bytes of a ggml type: the floats here, the rest by ggml's own quantiser.

Rows are independent of each other, so a tensor goes through in slabs, several at a time, and the
peak of memory does not depend on the tensor's size.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as T
from numpy.typing import NDArray

from mse_runtime.errors import BackboneError

__all__ = ["as_f32", "encode", "encode_rows", "to_bf16"]

SLABS_BYTES = 128 << 20  # float32 in all slabs that are worked on at once
SLAB_BYTES = 16 << 20

Floats = NDArray[np.float32]


def as_f32(values: NDArray[Any], dtype: str) -> Floats:
    """Stored values (F32, F16, or BF16 as uint16 bits) as float32."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def encode(rows: Floats, kind: T, name: str) -> NDArray[Any]:
    """Rows [n, columns] in the type `kind`; BackboneError for values that it cannot hold."""
    if not np.isfinite(rows).all():
        raise BackboneError(
            f"The tensor {name!r} holds NaN or infinity. The weights are damaged: download them "
            "again."
        )
    if kind == T.F32:
        return rows
    if kind == T.BF16:
        return to_bf16(rows)
    if kind == T.F16:
        if np.abs(rows).max(initial=0.0) > np.finfo(np.float16).max:
            raise _too_large(name, kind)
        return rows.astype(np.float16)
    rows = np.ascontiguousarray(rows)
    block, size = (int(n) for n in GGML_QUANT_SIZES[kind])
    found = np.empty(rows.size // block * size, np.uint8)
    ggml = _ggml()
    written = ggml.ggml_quantize_chunk(
        int(kind), rows.ctypes.data, found.ctypes.data, 0, *rows.shape, None
    )
    if written != found.nbytes or not ggml.ggml_validate_row_data(
        int(kind), found.ctypes.data, found.nbytes
    ):
        raise _too_large(name, kind)
    return found


def _too_large(name: str, kind: T) -> BackboneError:
    return BackboneError(
        f"The tensor {name!r} has values that {kind.name} cannot hold. Use --quant bf16."
    )


def encode_rows(
    rows: Callable[[int, int], Floats],
    shape: tuple[int, int],
    kind: T,
    name: str,
    threads: int,
) -> Iterator[NDArray[Any]]:
    """A tensor in the type `kind`, slab by slab, in order.

    rows(start, stop): these rows, float32 [stop - start, columns]; called on `threads` threads.
    """
    count, columns = shape
    slab = min(SLAB_BYTES, SLABS_BYTES // (threads + 1))
    step = max(1, slab // (4 * columns))

    def work(start: int) -> NDArray[Any]:
        return encode(rows(start, min(start + step, count)), kind, name)

    if threads == 1 or count <= step:
        yield from map(work, range(0, count, step))
        return
    waiting: deque[Future[NDArray[Any]]] = deque()
    with ThreadPoolExecutor(threads, "mse-export-encode") as pool:
        for start in range(0, count, step):
            waiting.append(pool.submit(work, start))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@cache
def _ggml() -> Any:
    """ggml as llama.cpp's library has loaded it."""
    from mse_runtime.backbone import library

    ggml = library.load()._lib
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    return ggml
