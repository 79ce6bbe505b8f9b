"""llama.cpp's product of weights as the file has them, in our version (`src/ggml_mapped.h`).

Weights that lie mapped need no copy in another layout, so a model is open as soon as its file is
mapped. With int8 tiles (Intel AMX) that is so for all types, by vectors for Q4_0; what ours has
not, llama.cpp multiplies.

    kernel = mapped.settle(folder)      # after `ggml.preload` and the loading of llama.cpp
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_kernels import ggml, theirs
from mse_kernels.samples import between, whole

__all__ = [
    "TYPES",
    "calls",
    "graph_product",
    "ours",
    "product",
    "sample",
    "settle",
    "types_of",
    "use",
]

SYMBOL = "llamafile_sgemm"
TILED = "ggml_compute_forward_mul_mat_tiled"
_SGEMM = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, *[ctypes.c_int64] * 3, *[ctypes.c_void_p, ctypes.c_int64] * 3,
    *[ctypes.c_int] * 3,
)  # fmt: skip
_Q8_0, _Q8_K = (8, 32, 34), (15, 256, 292)
TYPES = {
    "Q4_0": (2, 32, 18, _Q8_0),
    "Q5_0": (6, 32, 22, _Q8_0),
    "Q8_0": (8, 32, 34, _Q8_0),
    "Q4_K": (12, 256, 144, _Q8_K),
    "Q5_K": (13, 256, 176, _Q8_K),
    "Q6_K": (14, 256, 210, _Q8_K),
}
"""Name -> ggml's number, values and bytes of a block, and the same of the rows it multiplies."""
_SCALES = {144: (0, 2), 176: (0, 2), 210: (208,)}  # where blocks of so many bytes have halves
_PLAIN = ("Q4_0", "Q5_0", "Q8_0")


class _Params(ctypes.Structure):
    """The beginning of `ggml_compute_params`."""

    _fields_ = (("thread", ctypes.c_int), ("threads", ctypes.c_int), ("rest", ctypes.c_int64 * 6))


def settle(folder: Path) -> str | None:
    """The kernel that multiplies from now on: llama.cpp calls it and the results are its own's.

    Compared are products that llama.cpp computes, with ours and without, by the best kernel that
    agrees; None where none does or ours is not called.
    """
    for kernel in ggml.kernels():
        if _agrees(kernel, folder):
            return kernel
    use(None, folder)
    return None


def _agrees(kernel: str, folder: Path) -> bool:
    """Afterwards it multiplies, if it agrees with llama.cpp's own."""
    for name in types_of(kernel, folder):
        use(None, folder)
        expected = graph_product(folder, name)
        use(kernel, folder)
        before = calls()
        found = graph_product(folder, name)
        if expected is None or found is None or calls() == before:
            return False
        if not np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max():
            return False
    return True


def types_of(kernel: str, folder: Path) -> tuple[str, ...]:
    """What a kernel of `ggml.KERNELS` multiplies. K-quants, which llama.cpp looks after in another
    place, only where its tensors are laid out as we read them there.
    """
    if kernel != "amx":
        return ("Q4_0",)
    return tuple(TYPES) if theirs.knows_tensors(folder) else _PLAIN


def use(kernel: str | None, folder: Path) -> None:
    """Which of `ggml.kernels` multiplies in this process from now on; None: llama.cpp's own."""
    lib = ggml.preload()
    if lib is None:
        return
    plain, tiled = theirs.function(folder, SYMBOL), theirs.function(folder, TILED)
    number = ggml.KERNELS[kernel][0] if kernel else 0
    lib.mse_mapped_use(plain, tiled, number, number and theirs.knows_tensors(folder))


def calls() -> int:
    """How often ours has been called by name in this process."""
    lib = ggml.preload()
    return 0 if lib is None else int(lib.mse_mapped_calls())


def product(
    function: Any, name: str, weights: NDArray[np.uint8], rows: NDArray[np.uint8], threads: int = 1
) -> NDArray[np.float32]:
    """Weights [N, bytes] of type `name` and rows [M, bytes] of its activations -> [M, N]."""
    number, _, size, (rows_number, _, rows_size) = TYPES[name]
    blocks = weights.shape[1] // size
    out = np.full((len(rows), len(weights)), np.nan, np.float32)
    for thread in range(threads):
        params = _Params(thread, threads)
        done = function(
            ctypes.addressof(params), len(weights), len(rows), blocks, weights.ctypes.data, blocks,
            rows.ctypes.data, rows.shape[1] // rows_size, out.ctypes.data, len(weights),
            number, rows_number, 0,
        )  # fmt: skip
        if not done:
            raise ValueError(f"not a product for this function: {name}")
    return out


def ours() -> Any:
    """Our function, whatever it does now."""
    return _SGEMM((SYMBOL, ggml.preload()))


def sample(
    name: str, columns: int, rows: int, depth: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Random weights of a type [columns, bytes] and rows of its activations [rows, bytes]."""
    _, values, size, (_, _, rows_size) = TYPES[name]
    made = []
    for seed, (count, width) in enumerate(((columns, size), (rows, rows_size))):
        blocks = whole((count, depth // values, width), 0, 256, seed).astype(np.uint8)
        blocks[blocks == 0x80] = 0x81  # no quantiser gives -128, and llama.cpp cannot multiply it
        for at in _SCALES.get(width, (0,)):
            scales = between((*blocks.shape[:2], 1), 0.001, 0.02, seed)
            kind = "<f4" if width == _Q8_K[2] else "<f2"
            one = scales.astype(kind).view(np.uint8)
            blocks[..., at : at + one.shape[-1]] = one
        made.append(blocks.reshape(count, -1))
    return made[0], made[1]


def graph_product(folder: Path, name: str) -> NDArray[np.float32] | None:
    """A product [20, 32] that llama.cpp computes, of weights of a type; None where it cannot.

    Two strips of columns, a tile of rows and a part of one, in more depth than is unpacked at once.
    """
    columns, rows, depth = 32, 20, 19 * 32 if name in _PLAIN else 3 * 256
    weights = sample(name, columns, rows, depth)[0]
    values = between((rows, depth), -1.0, 1.0, 2).astype(np.float32)
    with theirs.graph(folder) as g:
        if g is None:
            return None
        w, x = g.tensor(TYPES[name][0], depth, columns), g.tensor(0, depth, rows)
        g.fill(w, weights)
        g.fill(x, values)
        return g.compute(g.base.ggml_mul_mat(g.context, w, x), (rows, columns))
