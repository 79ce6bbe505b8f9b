"""A prediction as a person likes to read it: the value on its scale, bars, timings, placement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mse_runtime.bundle import Task
    from mse_runtime.result import Prediction

__all__ = ["print_prediction"]

WIDTH = 41
BLOCKS = " ▁▂▃▄▅▆▇█"
STAGES = ("load", "decode", "features", "adapter", "prefill", "readout")


def print_prediction(prediction: Prediction, task: Task, console: Console) -> None:
    """Print to `console`: the answer first, what it cost last."""
    low, high = task.range or (-1.0, 1.0)
    parts: list[RenderableType] = [_headline(prediction)]
    if prediction.distribution:
        parts.append(_scale(prediction, low, high))
    parts.append(_bars(prediction.probabilities))
    if prediction.generated:
        parts.append(Text(f"generated  {prediction.generated.text!r}", style="dim"))
    parts += [Text(""), _cost(prediction)]
    console.print(Padding(Group(*parts), (1, 2)))


def _headline(prediction: Prediction) -> Text:
    line = Text(prediction.label, style="bold")
    if prediction.value is not None and prediction.distribution:
        line.append(f"  {prediction.value:+.2f}", style="bold " + _colour(prediction.value))
        if not prediction.generated:
            line.append(f" ± {prediction.answer.std:.2f}", style="dim")
    if not prediction.bundle["trained"]:
        line.append("  (untrained)", style="yellow")
    return line


def _scale(prediction: Prediction, low: float, high: float) -> Group:
    """The distribution as a row of blocks over the scale, the expected value marked below."""
    columns = [0.0] * WIDTH
    for number, p in prediction.distribution or ():
        columns[round((number - low) / (high - low) * (WIDTH - 1))] += p
    top = max(columns)
    blocks = "".join(BLOCKS[round(p / top * (len(BLOCKS) - 1))] for p in columns)
    value = min(max(prediction.answer.value or 0.0, low), high)
    place = round((value - low) / (high - low) * (WIDTH - 1))
    margin = " " * 6
    return Group(
        Text(margin + blocks, style=_colour(value)),
        Text(f"{low:+5.1f} " + "─" * place + "┼" + "─" * (WIDTH - 1 - place) + f" {high:+.1f}"),
    )


def _bars(probabilities: dict[str, float]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    for name, p in probabilities.items():
        best = p == max(probabilities.values())
        table.add_row(
            Text(name, style="bold" if best else ""),
            Text("█" * round(p * 24) or "▏", style="cyan" if best else "dim"),
            f"{p:6.1%}",
        )
    return table


def _cost(prediction: Prediction) -> Group:
    timing = prediction.timing_ms
    stages = ", ".join(f"{name} {timing[name]:.0f}" for name in STAGES if name in timing)
    memory = f"{prediction.memory_mb['peak_rss'] or 0:.0f} MB peak"
    if vram := prediction.memory_mb.get("vram"):
        memory += f", {vram:.0f} MB VRAM"
    backbone = prediction.backend["backbone"]
    bundle = prediction.bundle
    lines = (
        f"{timing['total']:.0f} ms (side by side: {stages}), {memory}",
        f"{bundle['name']} {bundle['version']}, {prediction.task}; adapter "
        f"{prediction.backend['adapter']}; {backbone['offloaded_layers']}/{backbone['n_layer']} "
        f"layers on the GPU, threads {backbone['threads']}",
    )
    return Group(*(Text(line, style="dim") for line in lines))


def _colour(value: float) -> str:
    return "green" if value > 0.5 else "red" if value < -0.5 else "white"
