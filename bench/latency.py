"""Seconds to an answer: cold, first and warm; both prompt layouts; beside peers, in turns.

    python bench/latency.py --shapes tiny,qwen-1.8b [--quants q4_0] [--quick] [--out F.jsonl]

Rows
  answer            warm, from features and text to the answer; `greedy` as the published code does
  raw llama.cpp     one `llama_decode` of as many positions (and rows of logits): the floor, without
                    and with the readout's positions
  split             the same answer by tokens / embeddings / tokens, three passes
  transformers      the same shape in PyTorch: inputs_embeds, torch adapter, generate
  after features    from the moment the features are ready; model loaded, text known
  process, ...      a new process, from its start to its end; just before, the model's file was read
                    and as much free memory used (common.machine_ready). `mse-run` loads an excerpt
                    of a large vocabulary, and so does "loading alone"
Ratios pair the samples of one turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bundles import CLIP, TEXT, Pair, features, make
from children import PeerProcess, mse_run, peer_missing, run
from common import (
    Writer,
    available_bytes,
    machine,
    machine_ready,
    note,
    parse,
    parser,
    ratio,
    timing,
    turns,
)

ANSWER = "answer, published layout"
# As `mse-run` starts and ends, with the model alone between.
LOAD = """
import json, os, sys
from mse_runtime import heap
heap.collect_late()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import mse_runtime.cli
from mse_runtime.analyzer import Analyzer
analyzer = Analyzer.open(sys.argv[1], threads=int(sys.argv[2]) or None, texts=sys.argv[3:])
analyzer._backbone.result()
print(json.dumps({"load": analyzer._load_seconds}), flush=True)
os._exit(0)
"""
FIRST = """
import json, sys
from mse_runtime.analyzer import Analyzer
from mse_runtime.features.npz import load_npz
features = load_npz(sys.argv[3])
analyzer = Analyzer.open(sys.argv[1], threads=int(sys.argv[2]) or None)
found = analyzer.analyze_features(features, sys.argv[4]).timing_ms
print(json.dumps(found))
"""


def warm(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    """Everything in one process, peers beside it."""
    from engine import Engine, Raw, request

    engine = Engine(pair, args.threads)
    raw = Raw(engine.backbone)
    old, new = engine.published, engine.pseudo_last
    about = {
        "shape": pair.shape,
        "quant": pair.quant,
        "threads": engine.threads,
        "n_prompt": old.n_prompt,
    }
    cases: dict[str, Callable[[], float]] = {
        ANSWER: old.answer,
        "raw llama.cpp, prompt": lambda: raw.decode(old.n_prompt),
        "raw llama.cpp, prompt and readout": lambda: raw.decode(
            old.n_prompt + old.n_readout, old.n_logits
        ),
        "after features, published layout": old.after_features,
        "after features, pseudo-last": new.after_features,
    }
    if not args.quick:
        cases |= {
            "answer, published layout, greedy": lambda: old.answer(parity=True),
            "answer, pseudo-last": new.answer,
            "split token/embd/token": old.split,
        }
    wanted = request(pair, old)
    with ExitStack() as stack:
        stack.callback(engine.close)
        stack.callback(raw.close)
        # The peers come last: beside one of 14 GB the kernel would drop the mapped weights.
        share = 0.6 if args.peers else 1.0
        samples = turns(cases, repeat=args.repeat, seconds=share * args.seconds)
        stages = [(name, layout.stages()) for name, layout in _layouts(engine) for _ in range(3)]
        answers = {case: work for case, work in cases.items() if case.startswith(ANSWER)}
        peers: dict[str, Callable[[], float]] = {}
        for dtype in args.peers:
            if why := peer_missing(pair.shape, dtype):
                write(note("latency", f"transformers {dtype} was not run: {why}", **about))
                continue
            peer = stack.enter_context(PeerProcess(wanted, dtype, engine.threads))
            peers[f"transformers {dtype}"] = peer.answer
        beside = {}
        if peers:
            beside = turns(answers | peers, repeat=args.repeat, seconds=(1 - share) * args.seconds)
    counts = {"after features, pseudo-last": new.n_tail, "answer, pseudo-last": new.n_prompt}
    for case, found in (samples | {peer: beside[peer] for peer in peers}).items():
        n_prompt = counts.get(case, old.n_prompt)
        extra = {"n_readout": old.n_readout}
        write(timing("latency", case, found, **{**about, "n_prompt": n_prompt, **extra}))
    for name, _ in _layouts(engine):
        of_layout = [found for layout, found in stages if layout == name]
        for stage in of_layout[0]:
            values = [found[stage] for found in of_layout]
            write(timing("latency-stages", f"{name}: {stage}", values, layout=name, stage=stage,
                         **about))  # fmt: skip
    _ratios(samples, beside, about, write)


def _layouts(engine: Any) -> list[tuple[str, Any]]:
    return [("published", engine.published), ("pseudo-last", engine.pseudo_last)]


def _ratios(
    samples: dict[str, list[float]],
    beside: dict[str, list[float]],
    about: dict[str, Any],
    write: Writer,
) -> None:
    """The demands: over the floor, over the peers (`beside` them), latency hidden."""

    def pair(case: str, upper: str, lower: str, demand: str = "") -> None:
        of = beside if lower.startswith("transformers") else samples
        if upper in of and lower in of:
            write(ratio("latency", case, of[upper], of[lower], demand=demand, **about))

    answer, big = ANSWER, about["shape"] != "tiny"
    pair("answer / raw, same positions", answer, "raw llama.cpp, prompt and readout",
         "<= 1.05" if big else "")  # fmt: skip
    pair("answer / raw, prompt alone", answer, "raw llama.cpp, prompt")
    pair("split / answer", "split token/embd/token", answer)
    for dtype in ("bf16", "fp32"):
        demand = "<= 0.65" if (about["shape"], dtype) == ("qwen-1.8b", "bf16") else ""
        pair(f"answer / transformers {dtype}", answer, f"transformers {dtype}", demand)
        pair(f"greedy answer / transformers {dtype}", f"{answer}, greedy", f"transformers {dtype}")
    pair("after features: pseudo-last / published", "after features, pseudo-last",
         "after features, published layout", "<= 0.25" if big else "")  # fmt: skip


def cold(pair: Pair, args: argparse.Namespace, write: Writer) -> None:
    """New processes: `mse-run` on a clip, and its parts alone.

    All but the first ever find the constant part of the prompt in the cache folder; one case
    deletes it each time.
    """
    from mse_runtime import kept_prefix
    from mse_runtime.bundle import load_bundle
    from mse_runtime.cache import cache_dir
    from mse_runtime.features.npz import save_npz

    threads = str(args.threads or 0)
    common = ["--threads", threads] if args.threads else []
    tails: list[float] = []
    with TemporaryDirectory() as folder:
        ready = Path(folder) / "features.npz"
        save_npz(ready, features(load_bundle(pair.published)))

        def whole() -> float:
            machine_ready(pair.pseudo_last)
            took, found = mse_run(
                str(CLIP), TEXT, "--bundle", str(pair.pseudo_last), "--jsonl", *common
            )
            tails.append(sum(found["timing_ms"][k] for k in ("adapter", "readout")) / 1e3)
            return took

        def forgetful() -> float:
            for kept in (cache_dir() / kept_prefix.FOLDER).glob("*.kv"):
                kept.unlink()
            machine_ready(pair.pseudo_last)
            return mse_run(str(CLIP), TEXT, "--bundle", str(pair.pseudo_last), "--jsonl", *common)[
                0
            ]

        def published() -> float:
            machine_ready(pair.published)
            return mse_run(
                "--features", str(ready), TEXT, "--bundle", str(pair.published), "--jsonl", *common
            )[0]

        def feature_part() -> float:
            out = str(Path(folder) / "clip.npz")
            return mse_run(
                str(CLIP), "--features-only", "-o", out, "--bundle", str(pair.pseudo_last)
            )[0]

        def first() -> float:
            machine_ready(pair.published)
            ms = run(str(pair.published), threads, str(ready), TEXT, code=FIRST)[1]
            return float(ms["total"]) / 1e3

        def loading(*texts: str) -> float:
            machine_ready(pair.pseudo_last)
            return run(str(pair.pseudo_last), threads, *texts, code=LOAD)[0]

        cases = {
            "process, clip to answer, nothing kept": forgetful,
            "process, clip to answer (pseudo-last)": whole,
            "process, loading alone": lambda: loading(TEXT),
            "process, loading alone, the whole vocabulary": loading,
            "process, features alone": feature_part,
            "process, features to answer (published)": published,
            "first answer after opening (published)": first,
        }
        repeat = args.repeat if pair.shape == "tiny" else min(args.repeat, 5)
        samples = turns(cases, repeat=repeat, seconds=args.seconds)
    about = {"shape": pair.shape, "quant": pair.quant, "clip": CLIP.name}
    for case, found in samples.items():
        write(timing("latency", case, found, **about))
    after = next(
        (r["median"] for r in write.records if r.get("shape") == pair.shape
         and r.get("quant") == pair.quant and r.get("case") == "after features, pseudo-last"),
        sum(tails) / len(tails),
    )  # fmt: skip
    # Of a large vocabulary `mse-run` loads an excerpt: the second row tells what it would be else.
    for name, load in (("load", ""), ("load of the whole vocabulary", ", the whole vocabulary")):
        loads = samples[f"process, loading alone{load}"]
        bound = [
            max(pair_of) + after
            for pair_of in zip(loads, samples["process, features alone"], strict=True)
        ]
        demand = "<= 1.15" if pair.shape == "qwen-1.8b" and not load else ""
        write(ratio("latency", f"cold mse-run / (max({name}, features) + tail)",
                    samples["process, clip to answer (pseudo-last)"], bound, demand=demand,
                    **about))  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--peers",
        type=lambda text: [x for x in text.split(",") if x],
        default=["bf16", "fp32"],
        metavar="A,B",
        help="types of the PyTorch peer: bf16, fp32, or nothing (default both, where they fit)",
    )
    made.add_argument("--no-cold", action="store_true", help="leave the new processes out")
    args = parse(made)
    write = Writer(args.out)
    write(machine())
    for shape in args.shapes:
        for quant in args.quants if shape != "tiny" else ["f16"]:
            pair = make(shape, quant, args.bundles)
            room, need = available_bytes(), pair.gguf.stat().st_size + 1_000_000_000
            if room and need > room:
                text = f"not run: needs {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
                write(note("latency", text, shape=shape, quant=quant))
                continue
            warm(pair, args, write)
            if not args.no_cold:
                cold(pair, args, write)


if __name__ == "__main__":
    main()
