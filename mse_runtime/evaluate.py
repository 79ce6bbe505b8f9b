"""`mse-eval`: the published metrics of a bundle on the runtime, calibration, quantisations."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mse_runtime.errors import MSEError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mse_runtime.bundle import Bundle, Task
    from mse_runtime.datasets import DataSet
    from mse_runtime.evaluation import Report, Scored

__all__ = ["main", "mse_eval"]

FEWEST = 30
"""Samples below which a fitted temperature is worth a warning."""
EPILOG = """\b
Examples:
  mse-eval --bundle my-bundle --data data/
  mse-eval --bundle my-bundle --data data/ --compare f16,q8_0,q4_k_m
  mse-eval --bundle my-bundle --data data/ --fit-temperature --write
  mse-eval --bundle meld-bundle --dataset meld --data MELD/ --parity published --json

\b
Exit codes: 0 ok, 2 usage, 3 bad data (the rest was evaluated and printed), 4 bad bundle,
5 device or memory, 6 backbone, 130 interrupted.
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--bundle", default="tiny", show_default=True, help="Name, folder or org/repo.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="See docs/data.md.")
@click.option("--dataset", help="mosei, simsv2, meld, cherma, iemocap, or a name for your own.")
@click.option("--split", default="test", show_default=True, help="train, valid or test.")
@click.option("--task", help="One of the bundle's tasks (default: told from the labels).")
@click.option("--compare", metavar="TYPES", help="Quantisations, such as f16,q8_0,q4_k_m.")
@click.option("--fit-temperature", is_flag=True, help="Fit the temperature on the valid split.")
@click.option("--write", is_flag=True, help="Store the fitted temperature in the bundle.")
@click.option(
    "--parity",
    type=click.Choice(["published"]),
    help="Generate greedily and parse as the published code does.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N samples of a split.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--predictions", type=click.Path(path_type=Path), help="Write each answer to a CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--offline", is_flag=True, help="Never use the network.")
def mse_eval(**options: Any) -> None:
    """Evaluate a bundle on a data set of feature files or clips.

    The answers are the runtime's own; PyTorch is not needed. Tables go to stdout, progress and
    warnings to stderr.
    """
    from mse_runtime.bundle import load_bundle
    from mse_runtime.bundle.hub import resolve_bundle
    from mse_runtime.datasets import load_dataset
    from mse_runtime.evaluation import choose_task

    if options["write"] and not options["fit_temperature"]:
        raise UsageError("--write stores a fitted temperature: add --fit-temperature.")
    if options["fit_temperature"] and options["parity"]:
        raise UsageError("--fit-temperature has no meaning with --parity published.")
    data = load_dataset(options["data"], options["dataset"])
    bundle = load_bundle(
        resolve_bundle(options["bundle"], offline=options["offline"]), offline=options["offline"]
    )
    task_name = choose_task(bundle, data.info, options["task"])
    run = _Run(bundle, task_name, data, options)
    with _bar() as run.step:
        temperature = run.fit() if options["fit_temperature"] else None
        reports = run.compare(temperature)
    run.print(reports)
    if options["write"] and temperature is not None:
        from mse_runtime.evaluation import store_temperature

        path = store_temperature(bundle, task_name, temperature)
        click.echo(f"Temperature {temperature:.4f} of {task_name} stored in {path}.", err=True)
    if run.problems:
        from mse_runtime.datasets import summary

        click.echo(
            f"{len(run.problems)} samples could not be evaluated:\n{summary(run.problems)}",
            err=True,
        )
        sys.exit(3)


class _Run:
    """One call of the command."""

    def __init__(
        self, bundle: Bundle, task_name: str, data: DataSet, options: dict[str, Any]
    ) -> None:
        self.bundle, self.task_name, self.data, self.options = bundle, task_name, data, options
        self.task: Task = bundle.tasks[task_name]
        self.step: Callable[[str, int, int], None] = lambda what, done, total: None
        self.problems = list(data.problems)
        self.remarks: list[str] = []
        self._scored: dict[tuple[str, str], Scored] = {}
        self._changed: list[float] = []

    def score(self, bundle: Bundle, split: str, what: str) -> Scored:
        from mse_runtime.evaluation import score

        if (what, split) not in self._scored:
            samples = self.data.split(split)[: self.options["limit"]]
            found = score(
                bundle,
                samples,
                self.data.info,
                self.task_name,
                parity=self.options["parity"],
                threads=self.options["threads"],
                step=lambda done, total: self.step(f"{what} on {split}", done, total),
            )
            self._scored[what, split] = found
            known = {problem.where for problem in self.problems}
            self.problems += [p for p in found.problems if p.where not in known]
        return self._scored[what, split]

    def fit(self) -> float | None:
        """The temperature, or None where the samples do not settle one."""
        from mse_runtime.calibration import HIGHEST, LOWEST, fit_temperature
        from mse_runtime.evaluation import label_columns

        split = "valid" if self.data.splits.get("valid") else self.options["split"]
        if split == self.options["split"]:
            self.remarks.append(
                f"The temperature was fitted on the split it is reported on ({split}): the "
                "calibration error after it flatters."
            )
        scored = self.score(self.bundle, split, "bundle")
        columns = label_columns(self.task, scored.truth)
        if len(scored) < FEWEST:
            self.remarks.append(
                f"The temperature was fitted on {len(scored)} samples only; {FEWEST} are the least "
                "that means something."
            )
        found = round(fit_temperature(scored.log_scores, columns), 4)
        if not 1.01 * LOWEST < found < 0.99 * HIGHEST:
            self.remarks.append(
                f"No temperature is the best one for these {len(scored)} samples (the search ended "
                f"at {found:g}), so the bundle's own is kept. Give a larger validation split."
            )
            return None
        return found

    def compare(self, temperature: float | None) -> list[Report]:
        """The bundle as it is, then each type of --compare."""
        from mse_runtime.evaluation import report
        from mse_runtime.quantised import requantised

        split = self.options["split"]
        scored = self.score(self.bundle, split, "bundle")
        held = self.bundle.backbone.gguf.type or "bundle"
        reports = [report(held.lower(), self.bundle, self.task, scored, temperature)]
        self._changed.append(0.0)
        for name in _types(self.options["compare"]):
            if name == reports[0].name:
                continue
            other, remark = requantised(self.bundle, name, threads=self.options["threads"] or 0)
            if remark:
                self.remarks.append(f"{name}: {remark}.")
            found = self.score(other, split, name)
            reports.append(report(name, other, self.task, found, temperature))
            self._changed.append(_changed(self.task, scored, found))
        return reports

    def print(self, reports: Sequence[Report]) -> None:
        if self.options["predictions"]:
            scored = self._scored["bundle", self.options["split"]]
            _write_predictions(self.options["predictions"], self.task, scored)
        for remark in self.remarks:
            click.echo(remark, err=True)
        if self.options["as_json"]:
            click.echo(json.dumps(self._document(reports), ensure_ascii=False))
            return
        _print_tables(self, reports)

    def _document(self, reports: Sequence[Report]) -> dict[str, Any]:
        return {
            "schema": "mse-runtime/evaluation/1",
            "bundle": {"name": self.bundle.name, "version": self.bundle.version},
            "trained": self.bundle.trained,
            "dataset": self.data.info.name,
            "split": self.options["split"],
            "task": self.task_name,
            "labels": _labels(self.task),
            "parity": self.options["parity"],
            "runs": [
                row.to_dict() | {"changed_answers": changed}
                for row, changed in zip(reports, self._changed, strict=True)
            ],
            "problems": [str(problem) for problem in self.problems],
            "remarks": self.remarks,
        }


def _types(text: str | None) -> list[str]:
    return [name.strip().lower() for name in text.split(",") if name.strip()] if text else []


def _labels(task: Task) -> list[str]:
    from mse_runtime.evaluation import POLARITY

    return [label.name for label in task.labels] or list(POLARITY)


def _changed(task: Task, first: Scored, other: Scored) -> float:
    """Share of answers that differ (classes), or the mean difference of the values."""
    there = {s.id: p for s, p in zip(other.samples, other.predicted, strict=True)}
    pairs = [
        (p, there[s.id])
        for s, p in zip(first.samples, first.predicted, strict=True)
        if s.id in there
    ]
    a, b = np.array(pairs).T
    return float(np.mean(a != b) if task.kind == "classification" else np.mean(np.abs(a - b)))


def _write_predictions(path: Path, task: Task, scored: Scored) -> None:
    from mse_runtime.calibration import probabilities

    names = [label.name for label in task.labels]
    table = probabilities(scored.log_scores, task.temperature)
    try:
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(("id", "truth", "predicted", *(f"p_{name}" for name in names)))
            for sample, true, guess, row in zip(
                scored.samples, scored.truth, scored.predicted, table, strict=True
            ):
                shown = [f"{value:.6f}" for value in row] if names else []
                writer.writerow((sample.id, f"{true:g}", f"{guess:g}", *shown))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}).") from error


def _print_tables(run: _Run, reports: Sequence[Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console = Console(width=140, highlight=False)
    first = reports[0]
    trained = "" if run.bundle.trained else ", UNTRAINED"
    table = Table(
        title=f"{run.bundle.name} on {run.data.info.name}/{run.options['split']}, "
        f"{first.n} samples{trained}",
        title_justify="left",
    )
    table.add_column("")
    for row in reports:
        table.add_column(row.name, justify="right")
    for metric in first.metrics:
        table.add_row(metric, *(_shown(row.metrics[metric]) for row in reports))
    table.add_section()
    table.add_row("ECE before (T = 1)", *(_shown(row.ece[0]) for row in reports))
    table.add_row(f"ECE after (T = {first.temperature:.3f})", *(_shown(r.ece[1]) for r in reports))
    table.add_section()
    if len(reports) > 1:
        kind = "answers changed" if run.task.kind == "classification" else "mean |change|"
        table.add_row(kind, *(_shown(value) for value in run._changed))
    table.add_row("GGUF, MB", *(f"{row.gguf_bytes / 1e6:.1f}" for row in reports))
    table.add_row("s per sample", *(f"{row.seconds_per_sample:.3f}" for row in reports))
    console.print(table)
    labels = _labels(run.task)
    matrix = Table(title="Confusion (rows: truth)", title_justify="left")
    matrix.add_column("")
    stray = bool(first.confusion[:, -1].any())
    for label in [*labels, *(["none"] if stray else [])]:
        matrix.add_column(label, justify="right")
    for name in ("precision", "recall", "F1", "n"):
        matrix.add_column(name, justify="right", style="dim")
    for i, (label, found) in enumerate(zip(labels, first.classes, strict=True)):
        counts = first.confusion[i, : len(labels) + stray]
        matrix.add_row(
            label,
            *map(str, counts),
            *(f"{value:.3f}" for value in (found.precision, found.recall, found.f1)),
            str(found.support),
        )
    console.print(matrix)


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def step(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what)
        bar.update(tasks[what], completed=done, total=total)

    with bar:
        yield step


def main() -> None:
    """Entry point: MSEErrors become one paragraph and an exit code."""
    try:
        mse_eval.main(standalone_mode=False)
    except MSEError as error:
        click.echo(f"mse-eval: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("mse-eval: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
