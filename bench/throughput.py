"""Clips a second of `mse-run --batch`, and sequences in one `llama_decode`.

    python bench/throughput.py --shapes tiny,qwen-1.8b [--clips 16] [--out F.jsonl]

A batch is timed as a user starts it, from process start to end, with 1 and 2 feature workers; the
clips are those of examples/, over and over. `answers` are for 1, 4 and 16 clips whose features are
there, clip by clip and together (`Analyzer.analyze_many`, pseudo-last). `sequences` prefills 1, 4,
16 prompts per `llama_decode`: whole published ones, and tails behind a prefix that all share.
"""

from __future__ import annotations

import argparse
import csv
import time
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from bundles import TEXT, Pair, features, make
from children import mse_run
from common import ROOT, Writer, gpus, machine, note, parse, parser, timed, timing, turns

COUNTS = (1, 4, 16)
CLIPS = {"tiny": 16, "qwen-1.8b": 8}


def batch(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    """`mse-run --batch` over a list, by number of workers."""
    count = args.clips or CLIPS.get(pair.shape, 4)
    clips = sorted((ROOT / "examples").glob("*.mp4"))
    with TemporaryDirectory() as folder:
        listing = Path(folder) / "clips.csv"
        with listing.open("w", encoding="utf-8", newline="") as out:
            rows = csv.writer(out)
            rows.writerow(["clip", "text"])
            rows.writerows([str(clip), TEXT] for clip in islice(cycle(clips), count))

        def once(workers: int) -> float:
            out = Path(folder) / f"{workers}-{time.perf_counter_ns()}.jsonl"
            options = ["--threads", str(args.threads)] if args.threads else []
            took, _ = mse_run(
                "--batch", str(listing), "-o", str(out), "--bundle", str(pair.pseudo_last),
                "--workers", str(workers), *options,
            )  # fmt: skip
            return took / count

        cases = {
            f"batch of {count}, {n} workers": lambda n=n: once(n)
            for n in ([2] if args.quick else [1, 2])
        }
        repeat = min(args.repeat, 3)
        samples = turns(cases, repeat=repeat, seconds=args.seconds, least=1)
    for case, found in samples.items():
        clips_per_second = 1 / sorted(found)[len(found) // 2]
        write(timing("throughput", f"{case}, a clip", found, shape=pair.shape, quant=pair.quant,
                     clips=count, clips_per_second=round(clips_per_second, 3)))  # fmt: skip


def answers(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    """Seconds for each clip from features and text, one after the other and in common passes."""
    from mse_runtime import Analyzer
    from mse_runtime.bundle import load_bundle

    bundle = load_bundle(pair.pseudo_last)
    found = features(bundle)
    with Analyzer.open(bundle, threads=args.threads) as analyzer:
        analyzer.ready()

        def one_by_one() -> float:
            return timed(lambda: analyzer.analyze_features(found, TEXT))

        def together(count: int) -> float:
            clips = [(found, TEXT, None)] * count
            return timed(lambda: analyzer.analyze_many(clips)) / count

        counts = COUNTS[:2] if args.quick else COUNTS
        cases: dict[str, Any] = {"a clip by itself": one_by_one}
        for n in counts:
            cases[f"{n} clips answered together, each"] = lambda n=n: together(n)
        samples = turns(cases, repeat=min(args.repeat, 5), seconds=args.seconds, least=1)
    for case, times in samples.items():
        count = 0 if case.startswith("a clip") else int(case.split()[0])
        about = {"clips_per_second": round(1 / sorted(times)[len(times) // 2], 3)}
        if count:
            about["sequences"] = count
        write(timing("throughput", case, times, shape=pair.shape, quant=pair.quant, **about))


def sequences(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    """Seconds for each sequence, several per `llama_decode`."""
    from engine import Engine

    from mse_runtime.backbone import Backbone

    engine = Engine(pair, args.threads)
    old, new = engine.published, engine.pseudo_last
    lengths = {"prompt": old.n_prompt, "tail": new.n_tail}
    shared = len(new.prompt.early)
    threads = engine.threads
    engine.close()
    counts = COUNTS[:2] if args.quick else COUNTS
    room = shared + max(counts) * max(lengths.values())
    with Backbone.open(pair.gguf, n_ctx=room, n_seq_max=max(counts) + 1, threads=threads) as model:
        rng = np.random.default_rng(0)
        base = rng.standard_normal((shared, model.n_embd), dtype=np.float32) * 0.02
        cases: dict[str, Any] = {}
        for kind, length in lengths.items():
            rows = rng.standard_normal((length, model.n_embd), dtype=np.float32) * 0.02
            for count in counts:
                cases[f"{count} {kind}s of {length} positions"] = _case(
                    model, base if kind == "tail" else None, rows, count
                )
        repeat = min(args.repeat, 5)
        samples = turns(cases, repeat=repeat, seconds=args.seconds, least=1)
    for case, found in samples.items():
        write(timing("throughput", f"{case} at once, each", found, shape=pair.shape,
                     quant=pair.quant, threads=threads,
                     sequences=int(case.split()[0])))  # fmt: skip


def _case(model: Any, prefix: Any, rows: Any, count: int) -> Any:
    def run() -> float:
        model.clear()
        if prefix is not None:
            model.prefill(prefix, seq=count, logits="none")
            for seq in range(count):
                model.copy(count, seq)
        begun = time.perf_counter()
        model.prefill_many([(seq, rows) for seq in range(count)])
        return (time.perf_counter() - begun) / count

    return run


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--clips", type=int, help="clips of a batch (default by shape: 16, 8, 4)")
    args = parse(made)
    write = Writer(args.out)
    write(machine())
    if not gpus():
        write(note("throughput", "not run on a GPU: there is none here"))
    for shape in args.shapes:
        for quant in args.quants if shape != "tiny" else ["f16"]:
            pair = make(shape, quant, args.bundles)
            answers(pair, args, write)
            sequences(pair, args, write)
            batch(pair, args, write)


if __name__ == "__main__":
    main()
