"""What the runtime's prefill costs over raw llama.cpp: the same positions, threads and build.

    python bench/overhead.py MODEL.gguf [--positions 110] [--threads N] [--repeat 9] [--json]

The floor is a bare loop over the C API: clear the cache, one `llama_decode` of a token batch, read
the logits. The runtime does what an answer needs: look up the rows in the mapped file, check them,
prefill them as one batch of embeddings, copy the logits. Both take turns in one process, so other
load on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine import Raw

from mse_runtime.backbone import Backbone


def timed(work: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds, CPU seconds of all threads, and what was computed."""
    begun, cpu = time.perf_counter(), time.process_time()
    value = work()
    return time.perf_counter() - begun, time.process_time() - cpu, value


def compare(path: Path, positions: int, threads: int | None, repeat: int) -> dict[str, Any]:
    with Backbone.open(path, n_ctx=positions, threads=threads) as backbone:
        ids = (np.arange(positions) * 37 % backbone.n_vocab).astype(np.int32)
        raw = Raw(backbone)

        def ours() -> float:
            backbone.clear()
            return float(backbone.prefill(backbone.embed(ids))[0])

        def floor() -> float:
            raw.decode(positions)
            return raw.first_logit()

        for work in (ours, floor):
            work()  # warm up: pages, threads, graph
        times: dict[str, list[float]] = {"runtime": [], "raw": []}
        cpu: dict[str, list[float]] = {"runtime": [], "raw": []}
        for turn in range(repeat):
            order = [("runtime", ours), ("raw", floor)]
            values = {}
            for name, work in order if turn % 2 else reversed(order):
                seconds, used, values[name] = timed(work)
                times[name].append(seconds)
                cpu[name].append(used)
            if abs(values["runtime"] - values["raw"]) > 0.05 * (1 + abs(values["raw"])):
                raise SystemExit(f"the two disagree: {values}")
        rows = min(timed(lambda: float(backbone.embed(ids)[0, 0]))[0] for _ in range(5))
        raw.close()
        pairs = [a / b for a, b in zip(times["runtime"], times["raw"], strict=True)]
        return {
            "model": path.name,
            "weights": backbone._gguf.weight_type,
            "positions": positions,
            "threads": backbone.info["threads"],
            "repeat": repeat,
            "runtime_s": statistics.median(times["runtime"]),
            "raw_s": statistics.median(times["raw"]),
            "runtime_min_s": min(times["runtime"]),
            "raw_min_s": min(times["raw"]),
            "runtime_cpu_s": min(cpu["runtime"]),
            "raw_cpu_s": min(cpu["raw"]),
            "overhead_of_cpu": min(cpu["runtime"]) / min(cpu["raw"]) - 1,
            "overhead_median_of_pairs": statistics.median(pairs) - 1,
            "overhead_of_minima": min(times["runtime"]) / min(times["raw"]) - 1,
            "embedding_rows_s": rows,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, default=110)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = compare(args.model, args.positions, args.threads, args.repeat)
    if args.json:
        print(json.dumps(found))
        return
    print(
        f"{found['model']} ({found['weights']}), {found['positions']} positions, "
        f"{found['threads']} threads, {found['repeat']} turns each\n"
        f"  raw llama.cpp  median {found['raw_s']:.3f} s, least {found['raw_min_s']:.3f} s\n"
        f"  runtime        median {found['runtime_s']:.3f} s, least {found['runtime_min_s']:.3f} s"
        f" (of it {found['embedding_rows_s'] * 1e3:.1f} ms for the rows)\n"
        f"  overhead       {found['overhead_median_of_pairs']:+.1%} (median of pairs), "
        f"{found['overhead_of_minima']:+.1%} (least against least), "
        f"{found['overhead_of_cpu']:+.1%} (least CPU time)"
    )


if __name__ == "__main__":
    main()
