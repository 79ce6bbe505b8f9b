"""Our products of weights as the file has them and llama.cpp's own, one thread, in turns.

    python bench/product.py [--rows 4,20,120] [--depth 2048] [--columns 688]

Multiply-accumulates per second of the function alone, on random numbers, for each kernel that this
processor runs; llama.cpp's is the one of the installed build (of K-quants it has none to call). A
model's passes, and llama.cpp's with its weights repacked: bench/layouts.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from mse_kernels import ggml, mapped
from mse_runtime.backbone import library


def seconds(name: str, kernel: str | None, weights: Any, rows: Any) -> float | None:
    """One product by `kernel`, None llama.cpp's; None where it has none of this type."""
    mapped.use(kernel, library.folder())
    begun = time.perf_counter()
    try:
        mapped.product(mapped.ours(), name, weights, rows)
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
    if not library.mapped_types():
        raise SystemExit("here llama.cpp's own products run: no Linux on x86-64, or no kernels")
    for name in library.mapped_types():
        for rows in (int(part) for part in args.rows.split(",")):
            compare(name, rows, args.depth, args.columns // 16 * 16)


def compare(name: str, rows: int, depth: int, columns: int) -> None:
    kernels = [
        kernel for kernel in ggml.kernels() if name in mapped.types_of(kernel, library.folder())
    ]
    weights, activations = mapped.sample(name, columns, rows, depth)
    times: dict[str | None, list[float]] = {kernel: [] for kernel in (*kernels, None)}
    for _ in range(31):
        for kernel, found in times.items():
            if (took := seconds(name, kernel, weights, activations)) is not None:
                found.append(took)
    own = times[None] and statistics.median(times[None])
    for kernel, found in times.items():
        if found:
            middle = statistics.median(found)
            ratio = f"{own / middle:5.2f} x" if own else ""
            speed = columns * rows * depth / middle / 1e9
            print(f"{name:5} {rows:4} rows  {kernel or 'llama.cpp':12} {speed:6.0f} GMAC/s {ratio}")


if __name__ == "__main__":
    main()
