"""llama.cpp's attention over its cache, in our version (`src/attention.h`).

llama.cpp takes fewer than 64 rows one by one, key by key, in half precision. Ours takes sixteen or
thirty-two at a time and adds in float32.

    kernel = attention.settle(folder)      # after `ggml.preload` and the loading of llama.cpp
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mse_kernels import ggml, theirs
from mse_kernels.samples import between, whole

__all__ = ["KERNELS", "Inputs", "calls", "compute", "kernels", "sample", "settle", "use"]

SYMBOL = "ggml_compute_forward_flash_attn_ext"
KERNELS = {
    "avx512": (2, ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")),
    "avx2": (1, ("avx2", "fma", "f16c")),
}
"""Name -> number in the library, and what the processor must have; best first."""


class Inputs(NamedTuple):
    """float32 queries [heads, rows, depth], float16 keys and values [heads / n, keys, depth], and
    what is added to the scores, float16 [rows or more, keys].
    """

    queries: NDArray[np.float32]
    keys: NDArray[np.float16]
    values: NDArray[np.float16]
    mask: NDArray[np.float16]


def settle(folder: Path) -> str | None:
    """The kernel that computes from now on: llama.cpp calls it and the results are its own's.

    None where none does, or where tensors are not laid out as we read them.
    """
    use(None, folder)
    if theirs.knows_tensors(folder):
        expected = compute(folder, sample())
        for kernel in kernels():
            use(kernel, folder)
            before = calls()
            found = compute(folder, sample())
            if (
                expected is not None
                and found is not None
                and calls() > before
                and np.abs(found - expected).max() <= 4e-3  # they add halves; values are below one
            ):
                return kernel
        use(None, folder)
    return None


def kernels() -> tuple[str, ...]:
    """Those that this processor runs, best first."""
    here = ggml.flags()
    return tuple(name for name, (_, needs) in KERNELS.items() if set(needs) <= here)


def use(kernel: str | None, folder: Path) -> None:
    """Which of `KERNELS` computes in this process from now on; None: llama.cpp's own."""
    lib = ggml.preload()
    if lib is not None:
        number = KERNELS[kernel][0] if kernel else 0
        lib.mse_attention_use(theirs.function(folder, SYMBOL), number)


def calls() -> int:
    """How often ours has computed in this process."""
    lib = ggml.preload()
    return 0 if lib is None else int(lib.mse_attention_calls())


def sample() -> Inputs:
    """Each row sees a key more than the one before it, and not the first."""
    rows, heads, group, keys, depth = 5, 4, 2, 24, 64
    shapes = ((heads, rows, depth), *[(heads // group, keys, depth)] * 2)
    q, k, v = (between(shape, -1.0, 1.0, seed) for seed, shape in enumerate(shapes))
    hidden = np.arange(keys)[None] > keys - rows + np.arange(rows)[:, None]
    hidden[:, 0] = True
    mask = np.where(hidden, -np.inf, whole(hidden.shape, -2, 1, 7))
    half = np.float16
    return Inputs(q.astype(np.float32), k.astype(half), v.astype(half), mask.astype(half))


def compute(folder: Path, inputs: Inputs, threads: int = 1) -> NDArray[np.float32] | None:
    """Attention [rows, heads, depth], scaled by depth^-1/2, that llama.cpp computes; None where it
    cannot.
    """
    heads, rows, depth = inputs.queries.shape
    with theirs.graph(folder, (1 << 20) + 4 * sum(x.nbytes for x in inputs)) as g:
        if g is None:
            return None
        tensors = []
        values: NDArray[np.floating[Any]]
        for values in inputs[:3]:  # as llama.cpp has them: the heads of a row beside each other
            n, length, depth = values.shape
            one = g.tensor(int(values.dtype == np.float16), depth, n, length)
            g.fill(one, np.ascontiguousarray(values.swapaxes(0, 1)))
            tensors.append(g.base.ggml_permute(g.context, one, 0, 2, 1, 3))
        tensors.append(g.tensor(1, *inputs.mask.shape[::-1]))
        g.fill(tensors[-1], np.ascontiguousarray(inputs.mask))
        result = g.base.ggml_flash_attn_ext(g.context, *tensors, depth**-0.5, 0.0, 0.0)
        return g.compute(result, (rows, heads, depth), threads)
