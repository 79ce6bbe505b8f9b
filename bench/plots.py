"""Pictures of a report's records, as SVG: stages, memory by part, growth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Record

STAGES = {"adapter": "#4c78a8", "prefill": "#f58518", "readout": "#54a24b"}
PARTS = ("weights", "KV cache", "compute", "logits", "adapter", "features", "program")
COLOURS = ("#f58518", "#e45756", "#eeca3b", "#b279a2", "#4c78a8", "#72b7b2", "#9d9d9d")


def draw(records: Sequence[Record], folder: Path) -> list[tuple[str, Path]]:
    """(caption, file) of every picture the records suffice for."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, caption, picture in (
        ("stages.svg", "Warm answer from features, by stage", _stages),
        ("memory.svg", "Peak memory: the plan by part, measured as a mark", _memory),
        ("growth.svg", "Cost against size, with fitted lines", _growth),
        ("sequences.svg", "Seconds a sequence, several per llama_decode", _sequences),
    ):
        figure = picture(records)
        if figure is not None:
            figure.savefig(folder / name, bbox_inches="tight", metadata={"Date": None})
            made.append((caption, folder / name))
    return made


def _axes(count: int = 1, height: float = 2.8) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count if count > 1 else 7.5, height))
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _label(record: Record) -> str:
    return f"{record['shape']} {record['quant']}"


def _stages(records: Sequence[Record]) -> Any:
    bars: dict[str, dict[str, float]] = defaultdict(dict)
    for r in records:
        if r.get("bench") == "latency-stages" and r["stage"] in STAGES:
            bars[f"{_label(r)}, {r['layout']}"][r["stage"]] = r["median"] * 1e3
    peers: dict[str, float] = {
        f"{_label(r)}, {r['case']}": r["median"] * 1e3
        for r in records
        if r.get("bench") == "latency" and str(r.get("case")).startswith("transformers")
        and r["kind"] == "time"
    }  # fmt: skip
    if not bars:
        return None
    models = list(dict.fromkeys(name.partition(",")[0] for name in bars))
    figure, axes = _axes(len(models))
    for axis, model in zip(axes, models, strict=True):
        mine = {k.partition(", ")[2]: v for k, v in bars.items() if k.startswith(f"{model},")}
        left = dict.fromkeys(mine, 0.0)
        for stage, colour in STAGES.items():
            widths = [found.get(stage, 0.0) for found in mine.values()]
            axis.barh(list(mine), widths, left=list(left.values()), color=colour, label=stage)
            left = {k: at + w for (k, at), w in zip(left.items(), widths, strict=True)}
        theirs = {k.partition(", ")[2]: v for k, v in peers.items() if k.startswith(f"{model},")}
        axis.barh(list(theirs), list(theirs.values()), color="#bab0ac")
        axis.invert_yaxis()
        axis.set_title(model)
        axis.set_xlabel("milliseconds")
    axes[0].legend(frameon=False, loc="best")
    figure.tight_layout()
    return figure


def _memory(records: Sequence[Record]) -> Any:
    peaks = [r for r in records if r.get("bench") == "memory" and "parts" in r]
    if not peaks:
        return None
    latest = {f"{_label(r)}{', low memory' if r['low_memory'] else ''}": r for r in peaks}
    figure, (axis,) = _axes(height=0.5 * len(latest) + 1.4)
    left = dict.fromkeys(latest, 0.0)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        widths = [
            sum(ram for name, ram, _ in r["parts"] if name.startswith(part)) / 1e3
            for r in latest.values()
        ]
        axis.barh(list(latest), widths, left=list(left.values()), color=colour, label=part)
        left = {k: at + w for (k, at), w in zip(left.items(), widths, strict=True)}
    axis.plot([r["value"] / 1e3 for r in latest.values()], list(latest), "k|", ms=18, mew=2,
              label="measured peak")  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlabel("GB (10^9 bytes) of resident memory")
    axis.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.25))
    return figure


def _growth(records: Sequence[Record]) -> Any:
    series: dict[str, dict[float, float]] = defaultdict(dict)
    units: dict[str, str] = {}
    for r in records:
        if r.get("bench") == "slopes" and r["kind"] == "time":
            series[r["of"]][r["size"]] = r["median"] * 1e3
            units[r["of"]] = r["size_unit"]
    lines = {r["of"]: r for r in records if r.get("bench") == "slopes" and r["kind"] == "value"}
    kinds = [unit for unit in ("seconds", "steps", "positions") if unit in units.values()]
    if not kinds:
        return None
    figure, axes = _axes(len(kinds), 3.0)
    for axis, kind in zip(axes, kinds, strict=True):
        for name in (name for name in series if units[name] == kind):
            sizes, cost = list(series[name]), list(series[name].values())
            (mark,) = axis.plot(sizes, cost, "o", ms=4)
            fit = lines.get(name)
            if fit is not None:
                fixed, slope = fit["fixed_s"] * 1e3, fit["value"]
                axis.plot(sizes, [fixed + slope * s for s in sizes], "-", lw=1,
                          color=mark.get_color(), label=f"{name}: {slope:.3g} ms each")  # fmt: skip
        axis.set_xlabel(kind if kind != "seconds" else "seconds of clip")
        axis.set_ylabel("milliseconds")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure


def _sequences(records: Sequence[Record]) -> Any:
    series: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if r.get("bench") == "throughput" and "sequences" in r:
            kind = next(k for k in ("prompt", "tail", "clip") if k in r["case"])
            series[_label(r)][kind][r["sequences"]] = r["median"] * 1e3
    if not series:
        return None
    figure, axes = _axes(len(series), 2.6)
    for axis, (model, kinds) in zip(axes, series.items(), strict=True):
        for kind, found in kinds.items():
            axis.plot(list(found), list(found.values()), "o-", ms=4, label=kind)
        axis.set_title(model)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("sequences at once")
        axis.set_ylabel("milliseconds a sequence")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    figure.tight_layout()
    return figure
