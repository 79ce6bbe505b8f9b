"""Peak memory of an answer in a new process, the plan beside it, and the PyTorch peer.

    python bench/memory.py --shapes tiny,qwen-1.8b [--quants q4_0,q8_0] [--out F.jsonl]

The peak is the kernel's own high-water mark of resident memory (VmHWM) after a whole answer from a
clip: decoding, feature networks, language model. Clips are read as `mse-run` does: in a process
beside, whose own mark is added, and with `--low-memory` in the same one. The mapped file counts
where it is mapped. The peer's peak has the model and one answer, no clip. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse

from bundles import CLIP, TEXT, Pair, make
from children import PeerProcess, peer_missing, run
from common import (
    Record,
    Writer,
    available_bytes,
    gpus,
    machine,
    note,
    parse,
    parser,
    value,
)

ANSWER = """
import json, os, sys
from mse_runtime import heap
heap.collect_late()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
from mse_runtime import cli
bundle, clip, text, low, threads = sys.argv[1:]
how = {"low_memory": low == "1", "plot": None, "verbose": False}
with cli._reader(how) as pool:
    from mse_runtime.analyzer import Analyzer
    how = {"low_memory": how["low_memory"], "threads": int(threads) or None}
    with Analyzer.open(bundle, **how, pool=pool) as analyzer:
        found = analyzer.analyze(clip, text)
        items = [[i.name, i.ram / 1e6, i.vram / 1e6] for i in analyzer.plan.items]
print(json.dumps({
    "peak_mb": found.memory_mb["peak_rss"], "vram_mb": found.memory_mb["vram"],
    "plan_mb": analyzer.plan.ram / 1e6, "items": items, "seconds": found.timing_ms["total"] / 1e3,
}))
"""
REQUEST = """
import json, sys
from pathlib import Path
from bundles import Pair
from engine import Engine, request
shape, quant, published, pseudo_last = sys.argv[1:]
pair = Pair(shape, quant, Path(published), Path(pseudo_last))
engine = Engine(pair, 1)
print(json.dumps(request(pair, engine.published)))
"""
DEMANDS = {("llama2-7b", "q4_0", True): "<= 4300"}


def ours(pair: Pair, args: argparse.Namespace, write: Writer) -> dict[bool, float]:
    """Peaks in MB, by whether `--low-memory` was given."""
    peaks: dict[bool, float] = {}
    for low in (False, True):
        about: Record = {"shape": pair.shape, "quant": pair.quant, "low_memory": low}
        mode = "low memory" if low else "default"
        found = run(
            str(pair.pseudo_last), str(CLIP), TEXT, str(int(low)), str(args.threads or 0),
            code=ANSWER,
        )[1]  # fmt: skip
        peaks[low] = found["peak_mb"]
        demand = DEMANDS.get((pair.shape, pair.quant, low), "")
        write(value("memory", f"peak, {mode}", found["peak_mb"], "MB", demand=demand,
                    parts=found["items"], answer_s=found["seconds"], **about))  # fmt: skip
        write(value("memory", f"plan, {mode}", found["plan_mb"], "MB", **about))
        off = abs(found["plan_mb"] / found["peak_mb"] - 1)
        write(value("memory", f"plan's error, {mode}", off, "of the peak",
                    demand="<= 0.10", **about))  # fmt: skip
    return peaks


def peers(pair: Pair, args: argparse.Namespace, write: Writer, peak: float) -> None:
    """The PyTorch peer, and our peak over its."""
    about: Record = {"shape": pair.shape, "quant": pair.quant}
    wanted: Record = {}
    for dtype in args.peers:
        if why := peer_missing(pair.shape, dtype):
            write(note("memory", f"transformers {dtype} was not run: {why}", **about))
            continue
        wanted = wanted or _request(pair)
        with PeerProcess(wanted, dtype, args.threads or 2) as peer:
            peer.answer()
            found = float(peer.ask("memory")["peak_mb"])
        write(value("memory", f"peak, transformers {dtype}", found, "MB", **about))
        demand = "<= 0.5" if (pair.shape, dtype) == ("qwen-1.8b", "bf16") else ""
        write(value("memory", f"peak: default / transformers {dtype}", peak / found, "x",
                    demand=demand, **about))  # fmt: skip


def _request(pair: Pair) -> Record:
    """In a process of its own: this one must stay small, children start from its size."""
    from children import HERE
    from common import PACKAGES

    code = f"import sys; sys.path[:0] = {[str(HERE), *PACKAGES]!r}\n{REQUEST}"
    return run(pair.shape, pair.quant, str(pair.published), str(pair.pseudo_last), code=code)[1]


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--peers",
        type=lambda text: [x for x in text.split(",") if x],
        default=["bf16", "fp32"],
        metavar="A,B",
        help="types of the PyTorch peer: bf16, fp32, or nothing (default both, where they fit)",
    )
    args = parse(made)
    write = Writer(args.out)
    write(machine())
    if not gpus():
        write(note("memory", "VRAM: not run on a GPU, there is none here"))
    for shape in args.shapes:
        for quant in args.quants if shape != "tiny" else ["f16"]:
            pair = make(shape, quant, args.bundles)
            room, need = available_bytes(), pair.gguf.stat().st_size + 1_000_000_000
            if room and need > room:
                text = f"not run: needs {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
                write(note("memory", text, shape=shape, quant=quant))
                continue
            peaks = ours(pair, args, write)
            peers(pair, args, write, peaks[False])


if __name__ == "__main__":
    main()
