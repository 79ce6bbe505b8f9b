"""The adapter alone: torch, ONNX Runtime and every kernel backend, beside this machine's floor.

    python bench/adapter.py --quick                      # batch 1 and 16, a minute or two
    python bench/adapter.py --jsonl out/adapter.jsonl    # everything

Contenders of one case run interleaved, one measured call each per round, in an order that changes
from round to round, so that a noisy neighbour hits all of them; the ratio is the median over rounds
of (time / ONNX Runtime's time in the same round). `cpu` is the same ratio in processor time, which
other processes can slow down but not stretch: of the calling thread with one thread, of the process
with more, idle threads that spin included. Prefer it where p25..p75 is wide.

With more than one thread a turn begins when the threads of the one before sleep (those of ONNX
Runtime and of torch's OpenMP spin for milliseconds after a call, and would take a processor from
whoever comes next), and the calls of its first 30 ms are not measured: a batch is rarely alone, and
everyone's threads and processors are awake then. All contenders have their defaults but for the
number of threads.

The floor is max(bytes / measured bandwidth,
multiply-accumulates / measured peak): what no fp32 implementation can pass that reads its weights
and inputs from memory once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mse_kernels
from mse_kernels import _cpu, reference

D = 4096  # Llama 2 7B and ChatGLM3 6B
P = 4
BASE = "onnxruntime-cpu"
WARM = 0.03  # seconds of calls before a measured one with several threads


@dataclass(frozen=True)
class Shape:
    """One data set of the published tables: steps, feature widths, LSTM widths."""

    name: str
    steps: tuple[int, int, int]  # audio, video, text
    dims: tuple[int, int]
    hidden: tuple[int, int]

    @property
    def weights(self) -> int:
        """Parameters that a call reads, the experts' second layers joined."""
        lstm = sum(
            4 * h * (d + h + 1) + 256 * (h + 1) for d, h in zip(self.dims, self.hidden, strict=True)
        )
        experts = D // 8 + D // 32 + D // 16
        return lstm + 256 * (D + 1) + experts * (256 + 1) + 256 * (experts + 1) + D * (256 + 1)

    def macs(self, batch: int) -> int:
        """Multiply-accumulates of a call: recurrences over all steps, then every weight once."""
        lstm = sum(
            4 * h * (d + h) * t
            for d, h, t in zip(self.dims, self.hidden, self.steps[:2], strict=True)
        )
        experts = D // 8 + D // 32 + D // 16
        return batch * (lstm + 256 * sum(self.hidden) + 2 * 256 * D + 2 * 256 * experts)

    def bytes(self, batch: int) -> int:
        """Bytes that a call reads or writes at least: fp32 weights once, inputs, outputs."""
        rows = sum(t * d for t, d in zip(self.steps, (*self.dims, D), strict=True))
        return 4 * (self.weights + batch * (rows + P * D))


SHAPES = (
    Shape("mosei", (500, 375, 50), (74, 35), (64, 32)),
    Shape("simsv2", (925, 232, 50), (25, 177), (64, 64)),
    Shape("cherma", (543, 16, 78), (1024, 2048), (32, 16)),
    Shape("meld", (157, 32, 65), (64, 64), (64, 32)),
)


def random_weights(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Published names; uniform in +-1 / sqrt(fan in), as a fresh layer."""

    def draw(*dims: int) -> np.ndarray:
        return np.asarray(rng.uniform(-1, 1, dims) / np.sqrt(dims[-1]), dtype=np.float32)

    layers = {"text_guide_mixer.text_mlp": (256, D)}
    out: dict[str, np.ndarray] = {}
    for name, d, h in zip(("audio", "video"), shape.dims, shape.hidden, strict=True):
        rnn = f"{name}_LSTM.rnn"
        out |= {f"{rnn}.weight_ih_l0": draw(4 * h, d), f"{rnn}.weight_hh_l0": draw(4 * h, h)}
        out |= {f"{rnn}.bias_ih_l0": draw(4 * h), f"{rnn}.bias_hh_l0": draw(4 * h)}
        layers[f"{name}_LSTM.linear"] = (256, h)
    fusion = "mutli_scale_fusion"
    for m, r in enumerate((8, 32, 16), start=1):
        layers[f"{fusion}.scale{m}.0"] = (D // r, 256)
        layers[f"{fusion}.scale{m}.2"] = (256, D // r)
    layers |= {f"{fusion}.multi_scale_projector": (D, 256), f"{fusion}.projector": (P, 1)}
    for name, dims in layers.items():
        out |= {f"{name}.weight": draw(*dims), f"{name}.bias": draw(dims[0])}
    mix = f"{fusion}.integrating.Integrating_layer.0"
    return out | {f"{mix}.weight": draw(1, 1, 1, 3), f"{mix}.bias": draw(1)}


def inputs(shape: Shape, batch: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Full-length samples, in the kernels' order."""
    out: list[np.ndarray] = []
    for t, d in zip(shape.steps, (*shape.dims, D), strict=True):
        out.append(rng.standard_normal((batch, t, d), dtype=np.float32))
        out.append(np.full(batch, t, np.int64))
    return tuple(out)


Call = Callable[[], Any]


def contenders(
    weights: dict[str, np.ndarray], args: tuple[np.ndarray, ...], threads: int, isas: bool
) -> Iterator[tuple[str, Call]]:
    """(name, call) of everything that runs here; what doesn't is said on stderr."""
    try:
        yield from _onnx(weights, args, threads)
    except ImportError as error:
        print(f"no ONNX Runtime or exporter: {error}", file=sys.stderr)
    try:
        yield from _torch(weights, args, threads)
    except ImportError as error:
        print(f"no torch: {error}", file=sys.stderr)
    for backend, reason in mse_kernels.available().items():
        if reason is not None:
            print(f"kernels-{backend}: {reason}", file=sys.stderr)
            continue
        for storage in ("f32", "f16", "bf16"):
            kernel = mse_kernels.open(backend, weights, threads, storage)
            yield f"kernels-{backend} {storage}", partial(kernel, *args)
        for isa in _cpu.isas()[1:] if backend == "cpu" and isas else ():
            kernel = mse_kernels.open(backend, weights, threads, isa=isa)
            yield f"kernels-cpu {isa}", partial(kernel, *args)
    if isas and threads == 1:
        yield "numpy", lambda: reference.forward(weights, *args)["pseudo"]


def _onnx(
    weights: dict[str, np.ndarray], args: tuple[np.ndarray, ...], threads: int
) -> Iterator[tuple[str, Call]]:
    import onnxruntime as ort

    from mse_export import onnx_graph

    model = onnx_graph.optimise(onnx_graph.build(weights)).SerializeToString()
    names = ("audio", "audio_len", "video", "video_len", "text", "text_len")
    feed = dict(zip(names, args, strict=True))
    for provider in ("CPU", "CUDA"):
        if f"{provider}ExecutionProvider" not in ort.get_available_providers():
            continue
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(model, options, providers=[f"{provider}ExecutionProvider"])
        run = partial(session.run, None, feed)
        yield f"onnxruntime-{provider.lower()}", run


def _torch(
    weights: dict[str, np.ndarray], args: tuple[np.ndarray, ...], threads: int
) -> Iterator[tuple[str, Call]]:
    import torch

    from mse_export.adapter import adapter_from_state

    torch.set_num_threads(threads)
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        module = adapter_from_state(state).to(device).eval()

        def call(module: Any = module, device: str = device) -> np.ndarray:
            with torch.inference_mode():
                moved = [torch.from_numpy(a).to(device) for a in args]
                return np.asarray(module(*moved).cpu().numpy())

        yield f"torch-{device}", call


def first_array(result: Any) -> np.ndarray:
    """The output [B, P, D]; ONNX Runtime returns a list of outputs."""
    return np.asarray(result[0] if isinstance(result, list) else result)


@dataclass(frozen=True)
class Machine:
    """Measured limits with that many threads."""

    threads: int
    gmacs: float  # multiply-accumulates per second, in 1e9, fp32
    gbytes: float  # bytes per second from memory, in 1e9


def measure_machine(threads: int) -> Machine:
    """Best of several: register-only multiply-adds, and one pass over 64 MB per thread."""
    lib, isa = _cpu.library(), _cpu.isas()[0].encode()
    buffers = [np.ones(1 << 24, np.float32) for _ in range(threads)]

    def best(call: Callable[[int], float], tries: int) -> float:
        found = 0.0
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(tries):
                start = time.perf_counter()
                work = sum(pool.map(call, range(threads)))
                found = max(found, work / (time.perf_counter() - start))
        return found / 1e9

    def read(i: int) -> float:
        lib.mse_probe_read(isa, buffers[i].ctypes.data, buffers[i].size)
        return float(buffers[i].nbytes)

    return Machine(threads, best(lambda _: lib.mse_probe_mac(isa, 4_000_000), 10), best(read, 20))


def quantile(values: list[float], q: float) -> float:
    """Nearest-rank quantile."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def wait_until_idle() -> None:
    """Return when no thread of this process works any more, half a second later at most.

    The kernel adds what a thread on another processor uses to the process's clock every 4 to 10 ms
    only: over less than that a spinning thread looks idle.
    """
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(0.025)
        if time.process_time() - used < 0.1 * (time.perf_counter() - start):
            return


def run_case(
    shape: Shape, batch: int, threads: int, machine: Machine, seconds: float, isas: bool
) -> Iterator[dict[str, Any]]:
    """Rows of one case, one per contender; times in milliseconds."""
    rng = np.random.default_rng(0)
    weights, args = random_weights(shape, rng), inputs(shape, batch, rng)
    calls = dict(contenders(weights, args, threads, isas))
    outputs = {name: first_array(call()) for name, call in calls.items()}
    base = BASE if BASE in calls else next(iter(calls))
    times: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.thread_time if threads == 1 else time.process_time
    order, shuffle = list(calls), random.Random(0).shuffle
    begin = time.perf_counter()
    while len(times[base]) < 7 or time.perf_counter() - begin < seconds:
        shuffle(order)
        for name in order:
            call = calls[name]
            if threads > 1:
                wait_until_idle()
                warm = time.perf_counter() + WARM
                while time.perf_counter() < warm:
                    call()
            start, used = time.perf_counter(), clock()
            call()
            cpu[name].append((clock() - used) * 1e3)
            times[name].append((time.perf_counter() - start) * 1e3)
    floor = 1e3 * max(
        shape.bytes(batch) / machine.gbytes / 1e9, shape.macs(batch) / machine.gmacs / 1e9
    )
    most = np.abs(outputs[base]).max()
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[base], strict=True)]
        yield {
            "shape": shape.name,
            "batch": batch,
            "threads": threads,
            "contender": name,
            "rounds": len(values),
            "median_ms": statistics.median(values),
            "p25_ms": quantile(values, 0.25),
            "p75_ms": quantile(values, 0.75),
            "min_ms": min(values),
            "ratio": statistics.median(ratios),
            "ratio_of_min": min(values) / min(times[base]),
            "cpu_ms": statistics.median(cpu[name]),
            "ratio_cpu": statistics.median(cpu[name]) / statistics.median(cpu[base]),
            "floor_ms": floor,
            "difference": float(np.abs(outputs[name] - outputs[base]).max() / most),
        }


HEADER = (
    f"{'shape':7} {'batch':>5} {'thr':>3} {'contender':18} {'median':>8} {'p25..p75':>17} "
    f"{'min':>8} {'ratio':>6} {'of min':>6} {'cpu':>5} {'floor':>8} {'diff':>8}"
)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    spread = f"{row['p25_ms']:.3f}..{row['p75_ms']:.3f}"
    return (
        f"{row['shape']:7} {row['batch']:5} {row['threads']:3} {row['contender']:18} "
        f"{row['median_ms']:8.3f} {spread:>17} {row['min_ms']:8.3f} {row['ratio']:6.2f} "
        f"{row['ratio_of_min']:6.2f} {row['ratio_cpu']:5.2f} {row['floor_ms']:8.3f} "
        f"{row['difference']:8.1e}"
    )


def main() -> None:
    """Parse, measure, print the table; JSON lines where asked."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 1 and 16, short")
    parser.add_argument("--jsonl", type=Path, help="also write one JSON object per line here")
    parser.add_argument("--seconds", type=float, default=None, help="per case")
    parser.add_argument("--shapes", nargs="*", default=[s.name for s in SHAPES])
    parser.add_argument("--batches", nargs="*", type=int, default=None)
    parser.add_argument("--threads", nargs="*", type=int, default=None)
    parser.add_argument("--no-isas", action="store_true", help="only the best instruction set")
    options = parser.parse_args()
    cases: list[tuple[int, int]]
    if options.quick and not options.batches:
        cases = [(1, 1), (16, min(2, cores))]
    else:
        threads = options.threads or sorted({1, min(2, cores), cores})
        cases = [(b, t) for b in options.batches or (1, 4, 16, 64) for t in threads]
    seconds = options.seconds or (4.0 if options.quick else 10.0)
    machines = {t: measure_machine(t) for t in sorted({t for _, t in cases})}
    rows: list[dict[str, Any]] = [asdict(m) for m in machines.values()]
    for m in machines.values():
        print(f"{m.threads} threads: {m.gmacs:.1f} GMAC/s fp32, {m.gbytes:.1f} GB/s from memory")
    print("times in ms; ratio: median of time / ONNX Runtime CPU of the same round\n" + HEADER)
    for shape in SHAPES:
        for batch, count in cases if shape.name in options.shapes else ():
            isas = batch <= 4 and not options.no_isas and not options.quick
            for row in run_case(shape, batch, count, machines[count], seconds, isas):
                rows.append(row)
                print(line(row), flush=True)
    if options.jsonl:
        options.jsonl.parent.mkdir(parents=True, exist_ok=True)
        options.jsonl.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
