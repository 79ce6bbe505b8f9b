"""Our products of weights and llama.cpp's own, one thread, in turns: repacked Q4_0, and mapped.

    python bench/product.py [--rows 4,20,120] [--depth 2048] [--columns 688]

Multiply-accumulates per second of the function alone, on random numbers; llama.cpp's is the one of
the installed build (of K-quants it has none to call). A model's answer: bench/latency.py, "answer /
raw".
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from typing import Any

import numpy as np

from mse_kernels import ggml, mapped
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


def mapped_seconds(name: str, own: bool, weights: Any, rows: Any) -> float | None:
    """One product of weights as the file has them; None where llama.cpp has none of this type."""
    function = mapped.theirs(library.folder()) if own else mapped.ours()
    begun = time.perf_counter()
    try:
        mapped.product(function, name, weights, rows)
    except ValueError:
        return None
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
    rows = [int(part) for part in args.rows.split(",")]
    if library.q4_0_product() != "llama.cpp":
        repacked(rows, args.depth, args.columns)
    for name in library.mapped_types():
        as_mapped(name, rows, args.depth, args.columns)
    if library.q4_0_product() == "llama.cpp" and not library.mapped_types():
        raise SystemExit("here llama.cpp's own products run: no Linux on x86-64, or no kernels")


def repacked(counts: list[int], depth: int, columns: int) -> None:
    names: tuple[str | None, ...] = (*ggml.kernels(), None)
    for rows in counts:
        pair = operands(rows, depth, columns)
        times: dict[str | None, list[float]] = {name: [] for name in names}
        for _ in range(31):
            for name in names:
                times[name].append(seconds(name, *pair))
        own = statistics.median(times[None])
        for name, found in times.items():
            _show("repacked Q4_0", rows, name, rows * depth * columns, found, own)


def as_mapped(name: str, counts: list[int], depth: int, columns: int) -> None:
    for rows in counts:
        weights, activations = mapped.sample(name, columns // 16 * 16, rows, depth)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(31):
            for own, found in times.items():
                if (took := mapped_seconds(name, own, weights, activations)) is not None:
                    found.append(took)
        own = statistics.median(times[True]) if times[True] else None
        work = len(weights) * rows * depth
        _show(f"mapped {name}", rows, "tiles", work, times[False], own)
        if own:
            _show(f"mapped {name}", rows, None, work, times[True], own)


def _show(
    what: str, rows: int, kernel: str | None, work: int, found: list[float], own: float | None
) -> None:
    middle = statistics.median(found)
    ratio = f"{own / middle:5.2f} x" if own else ""
    speed = work / middle / 1e9
    print(f"{what:14} {rows:4} rows  {kernel or 'llama.cpp':12} {speed:6.0f} GMAC/s {ratio}")


if __name__ == "__main__":
    main()
