"""Our products of Q4_0 weights and llama.cpp's own, one thread, in turns.

    python bench/product.py [--rows 4,20,120] [--depth 2048] [--columns 688]

Multiply-accumulates per second of the function alone, on random numbers; llama.cpp's is the one of
the installed build. A model's answer: bench/latency.py, "answer / raw".
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from typing import Any

import numpy as np

from mse_kernels import ggml
from mse_runtime.backbone import library


def operands(rows: int, depth: int, columns: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    weights = np.zeros((columns // 8, depth // 32), ggml.WEIGHTS)
    activations = np.zeros((rows // 4, depth // 32), ggml.ACTIVATIONS)
    for array, low, high in ((weights, 0, 256), (activations, -127, 128)):
        array["scale"] = rng.uniform(0, 0.02, array["scale"].shape)
        array["values"] = rng.integers(low, high, array["values"].shape)
    return weights, activations


def seconds(kernel: str | None, weights: Any, activations: Any) -> float:
    """One product by name, as llama.cpp calls it; None: llama.cpp's own."""
    ggml.use(kernel, library.folder())
    function = ctypes.CFUNCTYPE(*ggml.SIGNATURE)((ggml.SYMBOL, ggml.preload()))
    begun = time.perf_counter()
    ggml.product(function, weights, activations)
    return time.perf_counter() - begun


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--rows", default="4,20,120")
    made.add_argument("--depth", type=int, default=2048)
    made.add_argument("--columns", type=int, default=688)
    args = made.parse_args()
    library.load()
    if library.q4_0_product() == "llama.cpp":
        raise SystemExit("here llama.cpp's own product runs: no Linux on x86-64, or no kernels")
    names: tuple[str | None, ...] = (*ggml.kernels(), None)
    for rows in map(int, args.rows.split(",")):
        pair = operands(rows, args.depth, args.columns)
        times: dict[str | None, list[float]] = {name: [] for name in names}
        for _ in range(31):
            for name in names:
                times[name].append(seconds(name, *pair))
        work, own = rows * args.depth * args.columns / 1e9, statistics.median(times[None])
        for name, found in times.items():
            middle = statistics.median(found)
            print(f"{rows:4} rows  {name or 'llama.cpp':12} {work / middle:6.0f} GMAC/s "
                  f"{own / middle:5.2f} x")  # fmt: skip


if __name__ == "__main__":
    main()
