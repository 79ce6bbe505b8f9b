"""BENCHMARKS.md from records: machine, demands, tables, pictures, what was not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from common import Record, seconds, table
from compare import demands, main_table

TITLES = {
    "latency": "Latency",
    "latency-stages": "Stages of one warm answer",
    "memory": "Memory",
    "throughput": "Throughput",
    "neighbour": "Beside a busy neighbour",
    "slopes": "How the cost grows",
    "layouts": "Weights as the file has them, and in llama.cpp's layout",
}
INTRO = """# Benchmarks

Written by `make bench` (`python bench/report.py`), which replaces this page by what it measures on
your machine. Backbones are synthetic: the exact shapes with random weights, which cost what the
real ones cost. Times are wall clock, medians of interleaved turns; `spread` is the middle half of
the samples over their median, and *wide* marks more than 10 %. Ratios are medians of the ratios of
one turn each, so other load on the machine hits both sides alike: where a row is wide, believe the
ratios. "Answer" is from features and text to the distribution over 61 numbers (MOSEI). The PyTorch
peer is the published way: transformers, `inputs_embeds`, the adapter in torch, `generate`; its
Qwen-1.8B is transformers' Qwen 2 in the same shape. "llama.cpp alone" and "raw llama.cpp" are
llama.cpp with its own products of weights, layout of them and attention, where the runtime has
others (kernels/README.md), which is why an answer can take less than that floor.
All records, samples included: `{source}`.
"""


def report(
    records: Sequence[Record], pictures: Iterable[tuple[str, Path]], root: Path, source: Path
) -> str:
    """The page; links are relative to `root`."""
    shown = source.relative_to(root) if source.is_relative_to(root) else source.name
    parts = [INTRO.format(source=shown), _machines(records)]
    if missing := _missing(records):
        parts.append("## Not measured, and remarks\n\n" + missing)
    parts += ["## Side by side\n\n" + main_table(records), "## Demands\n\n" + demands(records)]
    for caption, path in pictures:
        parts.append(f"![{caption}]({path.relative_to(root)})\n\n*{caption}.*\n")
    for bench, title in TITLES.items():
        if rows := _rows(records, bench):
            parts.append(f"## {title}\n\n{rows}")
    for record in records:
        if record["kind"] == "text":
            body = record["text"].rstrip()
            parts.append(f"## `{record['command']}`\n\n```\n{body}\n```\n")
    parts.append("## Commands\n\n" + _commands(records))
    return "\n".join(parts)


def _machines(records: Sequence[Record]) -> str:
    found = [r for r in records if r["kind"] == "machine"]
    if not found:
        return ""
    first, loads = found[0], [r["load"] for r in records if "load" in r]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    gpu = ", ".join(first["gpu_info"]) or "none: nothing on this page ran on a GPU"
    rows = [
        ("CPU", f"{first['cpu_info']}, {first['cores']} cores"),
        ("memory", f"{first['ram_gb']} GB"),
        ("GPU", gpu),
        ("system", f"{first['os']}, Python {first['python']}"),
        ("versions", versions),
        ("llama.cpp", f"build {first['build']}: {first['system']}".replace("|", "/")),
        ("time, commit", f"{first['time']}, {first['commit']}"),
        ("load average", f"{min(loads):.1f} to {max(loads):.1f} while this ran"),
    ]
    return "## Machine\n\n" + table(("", ""), rows)


def _missing(records: Sequence[Record]) -> str:
    notes = dict.fromkeys(
        " ".join(filter(None, (r.get("shape"), r.get("quant"), f"{r['bench']}: {r['text']}")))
        for r in records
        if r["kind"] == "note"
    )
    return "".join(f"- {text}\n" for text in notes)


def _rows(records: Sequence[Record], bench: str) -> str:
    """One table for each bench; later runs of a case replace earlier ones."""
    last: dict[tuple[str, ...], Record] = {}
    for r in records:
        if r.get("bench") == bench and r["kind"] in ("time", "ratio", "value"):
            last[tuple(str(r.get(k, "")) for k in ("shape", "quant", "case"))] = r
    rows = []
    for r in last.values():
        model = f"{r.get('shape', '')} {r.get('quant', '')}".strip()
        if r["kind"] == "value":
            extra = f", {r['off_line']:.0%} off the line at worst" if "off_line" in r else ""
            rows.append((model, r["case"], f"{r['value']:.4g} {r['unit']}{extra}", "", "", ""))
            continue
        if r["kind"] == "time":
            middle, low = seconds(r["median"]), seconds(r["min"])
        else:
            middle, low = f"{r['median']:.3f} x", f"{r['min']:.3f} x"
        if "clips_per_second" in r:
            middle += f" ({r['clips_per_second']:.2f} clips/s)"
        spread = f"{r['spread']:.0%}" + (" *wide*" if r["wide"] else "")
        rows.append((model, r["case"], middle, low, spread, str(r["n"])))
    head = ("model", "what", "median", "least", "spread", "n")
    return table(head, rows) if rows else ""


def _commands(records: Sequence[Record]) -> str:
    steps = [r for r in records if r["kind"] == "step"]
    if not steps:
        return "See the records.\n"
    return table(
        ("command", "minutes"),
        [(f"`{r['command']}`", f"{r['minutes']:.1f}" if "minutes" in r else "") for r in steps],
    )
