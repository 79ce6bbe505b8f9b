"""llama.cpp's product of weights as the file has them, in our version (`src/ggml_mapped.h`).

Weights that lie mapped need no copy in another layout, so a model is open as soon as its file is
mapped. With int8 tiles (Intel AMX) nothing is lost by that; elsewhere llama.cpp runs its own.

    mapped.settle(folder)       # after `ggml.preload` and the loading of llama.cpp
    mapped.types()              # what ours multiplies from now on
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_kernels import ggml
from mse_kernels.samples import between, whole

__all__ = ["TYPES", "calls", "ours", "product", "sample", "settle", "theirs", "types", "use"]

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
_PLAIN, _K_QUANTS = ("Q4_0", "Q5_0", "Q8_0"), ("Q4_K", "Q5_K", "Q6_K")
_types: tuple[str, ...] = ()


class _Params(ctypes.Structure):
    """The beginning of `ggml_compute_params`."""

    _fields_ = (("thread", ctypes.c_int), ("threads", ctypes.c_int), ("rest", ctypes.c_int64 * 6))


def types() -> tuple[str, ...]:
    """The types of weights that ours multiplies in this process."""
    return _types


def theirs(folder: Path, symbol: str = SYMBOL) -> Any:
    """llama.cpp's own function in the library it has loaded from `folder`; None without one."""
    lib = _loaded(folder, "cpu")
    try:
        return lib and _SGEMM((symbol, lib))
    except AttributeError:
        return None


def settle(folder: Path) -> tuple[str, ...]:
    """What ours multiplies from now on: ours and theirs agree on a sample; empty without tiles.

    K-quants, which llama.cpp multiplies by the file's layout elsewhere, only where its tensors are
    laid out as we read them.
    """
    lib, other = _library(), theirs(folder)
    use((), folder)
    if lib is None or other is None or not lib.mse_mapped_has():
        return ()
    if ggml._address(getattr(ctypes.CDLL(None), SYMBOL)) != ggml._address(getattr(lib, SYMBOL)):
        return ()  # another's was there before
    if hasattr(cpu := _loaded(folder, "cpu"), "ggml_cpu_init"):
        cpu.ggml_cpu_init()  # its tables of halves; with its first model it would do so anyway
    use(_PLAIN, folder)
    for name in _PLAIN:
        # Two strips, a tile of rows and a part of one, in more depth than is unpacked at once.
        weights, rows = sample(name, 32, 20, 19 * 32)
        found, expected = (product(f, name, weights, rows) for f in (ours(), other))
        if not np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max():
            use((), folder)
            return ()
    if _source(folder) >= 0:
        use(tuple(TYPES), folder)
    return _types


def use(names: tuple[str, ...], folder: Path) -> None:
    """Which types ours multiplies in this process from now on: all, the plain ones or none."""
    global _types
    lib, other, tiled = _library(), theirs(folder), theirs(folder, TILED)
    if lib is None or other is None:
        return
    offset = _source(folder) if set(_K_QUANTS) & set(names) else -1
    plain, k_quants = (ctypes.cast(f, ctypes.c_void_p) if f else None for f in (other, tiled))
    lib.mse_mapped_use(plain, k_quants, int(bool(names)), offset)
    _types = names


def calls() -> int:
    """How often ours has been called by name in this process."""
    lib = _library()
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


def _library() -> Any:
    lib = ggml.preload()
    if lib is None or not hasattr(lib, "mse_mapped_has"):
        return None
    lib.mse_mapped_use.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    ]  # fmt: skip
    lib.mse_mapped_use.restype, lib.mse_mapped_calls.restype = None, ctypes.c_uint64
    return lib


def _loaded(folder: Path, name: str) -> Any:
    """ggml's library of that name, as llama.cpp has loaded it from `folder`; None without one."""
    for path in sorted(folder.glob(f"libggml-{name}*.so*")):
        try:
            return ctypes.CDLL(str(path), mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        except OSError:  # the same under another name
            continue
    return None


def _source(folder: Path) -> int:
    """Where a ggml_tensor keeps its first source; -1 where it is not laid out as we read it."""
    lib = _loaded(folder, "base")
    try:
        lib.ggml_init.argtypes, lib.ggml_init.restype = [_InitParams], ctypes.c_void_p
        lib.ggml_free.argtypes, lib.ggml_free.restype = [ctypes.c_void_p], None
        lib.ggml_new_tensor_2d.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
        ]  # fmt: skip
        lib.ggml_mul_mat.argtypes = [ctypes.c_void_p] * 3
        lib.ggml_new_tensor_2d.restype = lib.ggml_mul_mat.restype = ctypes.c_void_p
    except AttributeError:
        return -1
    context = lib.ggml_init(_InitParams(1 << 16, None, True))
    if not context:
        return -1
    try:
        weights = lib.ggml_new_tensor_2d(context, TYPES["Q4_K"][0], 256, 48)
        result = lib.ggml_mul_mat(context, weights, lib.ggml_new_tensor_2d(context, 0, 256, 5))
        words = (ctypes.c_uint64 * 40).from_address(result)
        sizes = (ctypes.c_int64 * 4).from_address(weights)
        places = [8 * i for i, word in enumerate(words) if word == weights]
        known = ctypes.c_int.from_address(weights).value == TYPES["Q4_K"][0]
        return places[0] if len(places) == 1 and known and sizes[2:] == [256, 48] else -1
    finally:
        lib.ggml_free(context)


class _InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (
        ("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)
    )  # fmt: skip
