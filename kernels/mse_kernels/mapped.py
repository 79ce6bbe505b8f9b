"""llama.cpp's product of weights as the file has them, in our version (`src/ggml_mapped.h`).

Weights that lie mapped need no copy in another layout, so a model is open as soon as its file is
mapped. With int8 tiles (Intel AMX) that is so for all types, by vectors for Q4_0; what ours has
not, llama.cpp multiplies.

    kernel = mapped.settle(folder)      # after `ggml.preload` and the loading of llama.cpp
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

__all__ = [
    "TYPES",
    "calls",
    "graph_product",
    "ours",
    "product",
    "sample",
    "settle",
    "theirs",
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


_libraries: dict[tuple[Path, str], Any] = {}


class _Params(ctypes.Structure):
    """The beginning of `ggml_compute_params`."""

    _fields_ = (("thread", ctypes.c_int), ("threads", ctypes.c_int), ("rest", ctypes.c_int64 * 6))


def theirs(folder: Path, symbol: str = SYMBOL) -> Any:
    """llama.cpp's own function in the library it has loaded from `folder`; None without one."""
    lib = _loaded(folder, "cpu")
    try:
        return lib and _SGEMM((symbol, lib))
    except AttributeError:
        return None


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
        theirs = graph_product(folder, name)
        use(kernel, folder)
        before = calls()
        found = graph_product(folder, name)
        if theirs is None or found is None or calls() == before:
            return False
        if not np.abs(found - theirs).max() <= 1e-4 * np.abs(theirs).max():
            return False
    return True


def types_of(kernel: str, folder: Path) -> tuple[str, ...]:
    """What a kernel of `ggml.KERNELS` multiplies. K-quants, which llama.cpp looks after in another
    place, only where its tensors are laid out as we read them there.
    """
    if kernel != "amx":
        return ("Q4_0",)
    return tuple(TYPES) if _source(folder) >= 0 else _PLAIN


def use(kernel: str | None, folder: Path) -> None:
    """Which of `ggml.kernels` multiplies in this process from now on; None: llama.cpp's own."""
    lib = ggml.preload()
    if lib is None:
        return
    plain, tiled = (
        ctypes.cast(f, ctypes.c_void_p) if f else None
        for f in (theirs(folder), theirs(folder, TILED))
    )
    number, offset = (ggml.KERNELS[kernel][0], _source(folder)) if kernel else (0, -1)
    lib.mse_mapped_use(plain, tiled, number, offset)


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


def _loaded(folder: Path, name: str) -> Any:
    """ggml's library of that name, as llama.cpp has loaded it from `folder`; None without one."""
    if (folder, name) not in _libraries:
        for path in sorted(folder.glob(f"libggml-{name}*.so*")):
            try:
                lib = ctypes.CDLL(str(path), mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
            except OSError:  # the same under another name
                continue
            _libraries[folder, name] = lib
            break
    return _libraries.get((folder, name))


def graph_product(folder: Path, name: str) -> NDArray[np.float32] | None:
    """A product [20, 32] that llama.cpp computes, of weights of a type; None where it cannot.

    Two strips of columns, a tile of rows and a part of one, in more depth than is unpacked at once.
    """
    base, cpu = _functions(folder)
    if base is None:
        return None
    columns, rows, depth = 32, 20, 19 * 32 if name in _PLAIN else 3 * 256
    weights = sample(name, columns, rows, depth)[0]
    values = between((rows, depth), -1.0, 1.0, 2).astype(np.float32)
    context = base.ggml_init(_InitParams(1 << 20, None, False))
    if not context:
        return None
    try:
        w = base.ggml_new_tensor_2d(context, TYPES[name][0], depth, columns)
        x = base.ggml_new_tensor_2d(context, 0, depth, rows)
        for tensor, array in ((w, weights), (x, values)):
            ctypes.memmove(base.ggml_get_data(tensor), array.ctypes.data, array.nbytes)
        result, graph = base.ggml_mul_mat(context, w, x), base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, result)
        if cpu.ggml_graph_compute_with_ctx(context, graph, 1):
            return None
        out = np.empty((rows, columns), np.float32)
        ctypes.memmove(out.ctypes.data, base.ggml_get_data(result), out.nbytes)
        return out
    finally:
        base.ggml_free(context)


def _source(folder: Path) -> int:
    """Where a ggml_tensor keeps its first source; -1 where it is not laid out as we read it."""
    base, _ = _functions(folder)
    context = base.ggml_init(_InitParams(1 << 16, None, True)) if base else None
    if not context:
        return -1
    try:
        kind = TYPES["Q4_K"][0]
        weights = base.ggml_new_tensor_2d(context, kind, 256, 48)
        result = base.ggml_mul_mat(context, weights, base.ggml_new_tensor_2d(context, 0, 256, 5))
        words = (ctypes.c_uint64 * 40).from_address(result)
        sizes = (ctypes.c_int64 * 4).from_address(weights)
        places = [8 * i for i, word in enumerate(words) if word == weights]
        known = ctypes.c_int.from_address(weights).value == kind and sizes[2:] == [256, 48]
        return places[0] if len(places) == 1 and known else -1
    finally:
        base.ggml_free(context)


def _functions(folder: Path) -> tuple[Any, Any]:
    """ggml's libraries with the functions used here declared; (None, None) where one is missing."""
    base, cpu = _loaded(folder, "base"), _loaded(folder, "cpu")
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    wanted = (
        (base, "ggml_init", pointer, [_InitParams]),
        (base, "ggml_free", None, [pointer]),
        (base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, whole, whole]),
        (base, "ggml_mul_mat", pointer, [pointer] * 3),
        (base, "ggml_get_data", pointer, [pointer]),
        (base, "ggml_new_graph", pointer, [pointer]),
        (base, "ggml_build_forward_expand", None, [pointer] * 2),
        (cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    )
    try:
        for library, name, result, arguments in wanted:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError:
        return None, None
    return base, cpu


class _InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (
        ("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)
    )  # fmt: skip
