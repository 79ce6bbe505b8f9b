"""How the cost grows: features with seconds, the adapter with steps, prefill with positions.

    python bench/slopes.py --shapes tiny [--out F.jsonl]

Each row is one size; a `slope` record fits cost = fixed + slope x size to the medians, and says by
how much the worst size is off that line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from bundles import CLIP, Pair, make
from common import Writer, machine, parse, parser, timed, timing, turns, value

SECONDS = (2, 4, 8, 16)
STEPS = (100, 200, 400, 800)
POSITIONS = (16, 32, 64, 128, 256)


def growth(
    of: str, unit: str, cases: dict[float, Callable[[], float]], args: argparse.Namespace,
    write: Writer, **about: Any,
) -> None:  # fmt: skip
    """Measure `cases` by size and fit a line."""
    by_name = {f"{of}, {size:g} {unit}": work for size, work in cases.items()}
    samples = turns(by_name, repeat=args.repeat, seconds=args.seconds)
    medians = []
    for size, (case, found) in zip(cases, samples.items(), strict=True):
        record = timing("slopes", case, found, of=of, size=size, size_unit=unit, **about)
        medians.append(record["median"])
        write(record)
    sizes = np.array(list(cases), float)
    slope, fixed = np.polyfit(sizes, medians, 1)
    off = float(np.abs(fixed + slope * sizes - medians).max() / max(medians))
    write(value("slopes", f"{of}: slope", slope * 1e3, f"ms per {unit.rstrip('s')}", of=of,
                fixed_s=float(fixed), off_line=round(off, 3), **about))  # fmt: skip


def features(args: argparse.Namespace, write: Writer) -> None:
    """`extract` on the first seconds of a clip that is long enough."""
    from features import film

    from mse_runtime.features.extract import extract

    with TemporaryDirectory() as folder:
        clip = film(CLIP, Path(folder) / "long.mp4", hours=(SECONDS[-1] + 8) / 3600)
        cases = {
            float(s): lambda s=s: timed(lambda: extract(clip, end=float(s), threads=args.threads))
            for s in SECONDS
        }
        growth("features", "seconds", cases, args, write)


def adapter(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    """Audio and face steps grow together."""
    from mse_runtime.adapter import open_adapter
    from mse_runtime.bundle import load_bundle

    bundle = load_bundle(pair.published)
    info = bundle.adapter
    rng = np.random.default_rng(0)
    text = rng.standard_normal((1, 50, info.n_embd), dtype=np.float32)
    for backend in ("onnx", "kernels-cpu"):
        try:
            run = open_adapter(bundle, backend)
        except Exception as error:
            print(f"{backend}: {error}")
            continue

        def case(steps: int, run: Any = run) -> Callable[[], float]:
            audio = rng.standard_normal((1, steps, info.audio_dim), dtype=np.float32)
            face = rng.standard_normal((1, steps, info.face_dim), dtype=np.float32)
            one = np.ones(1, np.int64)
            call = (audio, one * steps, face, one * steps, text, one * 50)
            return lambda: timed(lambda: [run(*call) for _ in range(5)]) / 5

        cases = {float(steps): case(steps) for steps in STEPS}
        growth(f"adapter ({backend})", "steps", cases, args, write, shape=pair.shape)


def prefill(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    """One all-embedding batch of growing length."""
    from mse_runtime.backbone import Backbone
    from mse_runtime.bundle import load_bundle
    from mse_runtime.sizing import default_threads

    threads = args.threads or default_threads(load_bundle(pair.published))
    with Backbone.open(pair.gguf, n_ctx=POSITIONS[-1], threads=threads) as model:
        ids = (np.arange(POSITIONS[-1]) * 37 % model.n_vocab).astype(np.int32)

        def case(n: int) -> Callable[[], float]:
            def work() -> float:
                model.clear()
                return timed(lambda: model.prefill(model.embed(ids[:n])))

            return work

        cases = {float(n): case(n) for n in POSITIONS}
        growth(f"prefill ({pair.shape} {pair.quant})", "positions", cases, args, write,
               shape=pair.shape, quant=pair.quant)  # fmt: skip


def main() -> None:
    args = parse(parser(__doc__))
    write = Writer(args.out)
    write(machine())
    for number, shape in enumerate(args.shapes):
        for quant in args.quants if shape != "tiny" else ["f16"]:
            pair = make(shape, quant, args.bundles)
            if not number:
                adapter(pair, args, write)
            prefill(pair, args, write)
    if not args.quick:
        features(args, write)


if __name__ == "__main__":
    main()
