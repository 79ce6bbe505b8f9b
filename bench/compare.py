"""The main table: this runtime beside PyTorch and bare llama.cpp, from one run's records.

python bench/compare.py --from bench/results/report.jsonl        # README's table, in Markdown
python bench/compare.py --shapes tiny,qwen-1.8b                  # measures first
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from children import HERE
from common import Record, child_environment, parser, read_records, seconds, table

HEAD = (
    "model",
    "PyTorch: answer, peak",
    "mse-run: answer, peak",
    "floor: llama.cpp alone",
    "after the last feature (pseudo-last)",
)


def find(records: Iterable[Record], **wanted: object) -> Record | None:
    """The last record whose fields are as wanted."""
    found = [r for r in records if all(r.get(k) == v for k, v in wanted.items())]
    return found[-1] if found else None


def models(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(shape, quant) of every warm answer, in order."""
    seen = [
        (r["shape"], r["quant"])
        for r in records
        if r.get("bench") == "latency" and r.get("case") == "answer, published layout"
    ]
    return list(dict.fromkeys(seen))


def time_of(records: Sequence[Record], shape: str, quant: str, case: str) -> str:
    found = find(records, kind="time", bench="latency", shape=shape, quant=quant, case=case)
    if found is None:
        return "not run"
    return seconds(found["median"]) + (" (wide)" if found["wide"] else "")


def peak_of(records: Sequence[Record], shape: str, quant: str, case: str) -> str:
    found = find(records, kind="value", bench="memory", shape=shape, quant=quant, case=case)
    if found is None:
        return "not run"
    mb = found["value"]
    return f"{mb:.0f} MB" if mb < 1000 else f"{mb / 1e3:.2f} GB"


def main_table(records: Sequence[Record]) -> str:
    """Markdown; the peer is the faster of bf16 and fp32, named."""
    rows = []
    for shape, quant in models(records):
        peers = [
            (found["median"], dtype)
            for dtype in ("bf16", "fp32")
            if (found := find(records, kind="time", bench="latency", shape=shape, quant=quant,
                              case=f"transformers {dtype}"))
        ]  # fmt: skip
        peer = "not run"
        if peers:
            dtype = min(peers)[1]
            took = time_of(records, shape, quant, f"transformers {dtype}")
            peak = peak_of(records, shape, quant, f"peak, transformers {dtype}")
            peer = f"{took}, {peak} ({dtype})"
        answer = time_of(records, shape, quant, "answer, published layout")
        peak = peak_of(records, shape, quant, "peak, default")
        floor = time_of(records, shape, quant, "raw llama.cpp, prompt and readout")
        tail = time_of(records, shape, quant, "after features, pseudo-last")
        rows.append((f"{shape} {quant}", peer, f"{answer}, {peak}", floor, tail))
    return table(HEAD, rows)


def demands(records: Sequence[Record]) -> str:
    """Every record with a demand, met or missed; later runs of a case replace earlier ones."""
    last: dict[tuple[str, ...], Record] = {}
    for record in records:
        if "demand" in record:
            key = tuple(str(record.get(k, "")) for k in ("bench", "case", "shape", "quant"))
            last[key] = record
    rows = []
    for record in last.values():
        number = record["value"] if record["kind"] == "value" else record["median"]
        spread = f"{record['spread']:.0%}" if "spread" in record else ""
        if record.get("n") == 1:
            spread = "one turn"
        model = f"{record.get('shape', '')} {record.get('quant', '')}"
        unit = f" {record['unit']}" if record["kind"] == "value" else ""
        shown = f"{number:.3f}" if number < 100 else f"{number:.0f}"
        rows.append(
            (model, record["case"], record["demand"], shown + unit, spread,
             "met" if record["met"] else "**missed**")
        )  # fmt: skip
    return table(("model", "what", "demand", "measured", "spread", ""), rows)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--from", dest="source", type=Path, help="records of an earlier run")
    args: argparse.Namespace = made.parse_args()
    if args.source:
        records = read_records(args.source)
    else:
        with TemporaryDirectory() as folder:
            out = args.out or Path(folder) / "compare.jsonl"
            for script in ("latency.py", "memory.py"):
                options = ["--shapes", ",".join(args.shapes), "--quants", ",".join(args.quants)]
                options += ["--bundles", str(args.bundles), "--repeat", str(args.repeat)]
                options += ["--seconds", str(args.seconds), "--out", str(out)]
                options += ["--threads", str(args.threads)] if args.threads else []
                command = [sys.executable, str(HERE / script), *options]
                command += ["--quick"] * args.quick
                subprocess.run(command, check=True, stdout=sys.stderr, env=child_environment())
            records = read_records(out)
    print(main_table(records))
    print(demands(records))


if __name__ == "__main__":
    main()
