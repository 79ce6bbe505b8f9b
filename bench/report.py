"""Every bench, one after the other, and BENCHMARKS.md with the pictures from what they measured.

    python bench/report.py                      # some 20 minutes on two cores
    python bench/report.py --from F.jsonl       # only writes, from records that are there

A step that would start after `--minutes` is left out and named in the report.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bundles import Pair, remove
from children import HERE
from common import ROOT, Record, child_environment, parse, parser, read_records
from plots import draw
from write_report import report

RESULTS = HERE / "results"


@dataclass(frozen=True)
class Step:
    """One bench as the report runs it."""

    script: str
    options: tuple[str, ...]

    @property
    def command(self) -> str:
        return shlex.join(("python", f"bench/{self.script}", *self.options))


def steps(shapes: Sequence[str], quick: bool, limit: int) -> list[Step]:
    """In order of importance: what the claim rests on comes first.

    features.py and adapter.py have a format of their own; their output goes into the report as it
    is.
    """
    found: list[Step] = []
    claimed = [shape for shape in shapes if shape != "chatglm3-6b"]
    for shape in claimed:
        big = ("--seconds", str(limit)) if shape != "tiny" else ("--seconds", "30")
        where = ("--shapes", shape, *big)
        found += [Step("latency.py", where), Step("memory.py", where)]
    found += [
        Step("features.py", ("--repeat", "3" if quick else "5", "--short")),
        Step("adapter.py", ("--quick",)),
    ]
    rest = ("--shapes", ",".join(s for s in shapes if s in ("tiny", "qwen-1.8b")) or shapes[0])
    found += [
        Step("throughput.py", (*rest, "--seconds", "30")),
        Step("neighbour.py", (*rest, "--seconds", "30")),
        Step("slopes.py", (*rest, "--seconds", "20")),
    ]
    if "qwen-1.8b" in shapes:
        found.append(Step("layouts.py", ("--shapes", "qwen-1.8b", "--seconds", "25")))
    if "llama2-7b" in shapes and not quick:
        few = ("--clips", "4", "--seconds", "20")
        found.append(Step("throughput.py", ("--shapes", "llama2-7b", *few)))
    for shape in (shape for shape in shapes if shape not in claimed):
        where = ("--shapes", shape, "--peers", "", "--quick")
        found += [
            Step("latency.py", (*where, "--no-cold", "--seconds", "20")),
            Step("memory.py", where),
        ]
    if "qwen-1.8b" in shapes and not quick:
        others = ("--shapes", "qwen-1.8b", "--quants", "q4_k_m,q8_0", "--peers", "", "--quick")
        found += [
            Step("latency.py", (*others, "--no-cold", "--seconds", "20")),
            Step("memory.py", others),
        ]
    return found


def run(step: Step, out: Path, common: Sequence[str]) -> str:
    """Run one step; its output."""
    own = step.script in ("features.py", "adapter.py")
    options = [] if own else [*common, "--out", str(out)]
    command = [sys.executable, str(HERE / step.script), *step.options, *options]
    done = subprocess.run(
        command,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        return f"FAILED (exit code {done.returncode}): {done.stdout[-600:]}"
    return done.stdout


def measure(
    shapes: Sequence[str], quick: bool, minutes: float, out: Path, common: Sequence[str],
    bundles: Path,
) -> None:  # fmt: skip
    """Run every step for which there is time, records into `out`."""
    import json

    begun = time.perf_counter()

    def tell(record: Record) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    todo = steps(shapes, quick, 60 if not quick else 15)
    for number, step in enumerate(todo):
        spent = (time.perf_counter() - begun) / 60
        print(f"[{number + 1}/{len(todo)}, {spent:.1f} min] {step.command}", file=sys.stderr)
        if spent > minutes:
            text = f"`{step.command}` was left out: no time was left of {minutes:g} minutes"
            tell({"kind": "note", "bench": "report", "text": text})
            continue
        text = run(step, out, common)
        failed = text.startswith("FAILED")
        if failed:
            tell({"kind": "note", "bench": "report", "text": f"`{step.command}` {text}"})
        elif step.script in ("features.py", "adapter.py"):
            tell({"kind": "text", "bench": step.script, "command": step.command, "text": text})
        took = (time.perf_counter() - begun) / 60 - spent
        tell({"kind": "step", "bench": "report", "command": step.command,
              "minutes": round(took, 2), "failed": failed})  # fmt: skip
        later = {option for s in todo[number + 1 :] for option in s.options[1:2]}
        for shape in (s for s in shapes if s not in ("tiny", "qwen-1.8b")):
            if shape in step.options and shape not in later:
                remove(Pair(shape, "q4_0", bundles / f"{shape}-q4_0" / "published", bundles))


def main() -> None:
    made = parser(__doc__, shapes=("tiny", "qwen-1.8b", "llama2-7b", "chatglm3-6b"))
    made.add_argument("--from", dest="source", type=Path, help="records of an earlier run")
    made.add_argument("--minutes", type=float, default=18, help="start no step after (default 18)")
    made.add_argument("--to", type=Path, default=ROOT / "BENCHMARKS.md", help="the page to write")
    args = parse(made)
    source = args.source
    if source is None:
        source = args.out or RESULTS / "report.jsonl"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.unlink(missing_ok=True)
        common = ["--bundles", str(args.bundles), *["--quick"] * args.quick]
        common += ["--threads", str(args.threads)] if args.threads else []
        measure(args.shapes, args.quick, args.minutes, source, common, args.bundles)
    records = read_records(source)
    pictures = draw(records, args.to.parent / "bench" / "plots")
    args.to.write_text(
        report(records, pictures, args.to.parent, source.resolve()), encoding="utf-8"
    )
    print(args.to)


if __name__ == "__main__":
    main()
