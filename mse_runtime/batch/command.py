"""`mse-run --batch`: the list, the journal, the workers and a progress bar put together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mse_runtime import background
from mse_runtime.batch.export import convert, failures, journal_path
from mse_runtime.batch.journal import Journal, foreign
from mse_runtime.batch.rows import read_rows
from mse_runtime.batch.run import run
from mse_runtime.features.pool import FeaturePool

if TYPE_CHECKING:
    from mse_runtime.analyzer import Analyzer

__all__ = ["run_batch"]


def run_batch(analyzer: Analyzer, listing: Path, output: Path, options: dict[str, Any]) -> int:
    """Run a batch with the command line's options; the exit code: 0, 1 (rows failed) or 130."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    rows = read_rows(listing)
    if output.exists() and not journal_path(output).exists():
        raise foreign(output)
    console = Console(stderr=True)
    workers = options["workers"] or max(1, min(4, background.cores()))
    with (
        Journal(
            journal_path(output), rows, run=_fingerprint(analyzer, options), retry=options["retry"]
        ) as journal,
        FeaturePool(
            workers, options["clip_timeout"], options["clip_memory"], verbose=options["verbose"]
        ) as pool,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        ) as bar,
    ):  # fmt: skip
        if journal.done:
            console.print(f"{len(journal.done)} of {len(rows)} rows are done already: going on.")
        shown = bar.add_task("clips", total=len(rows), completed=len(journal.done), rate="")

        def advance() -> None:
            bar.advance(shown)
            if speed := bar.tasks[0].speed:
                bar.update(shown, rate=f"{speed:.2f}/s")

        outcome = run(
            analyzer,
            rows,
            journal,
            pool,
            task=options["task"],
            parity=options["parity"],
            fps=options["fps"],
            max_seconds=options["max_seconds"],
            progress=advance,
        )
    convert(output)
    summary = (
        f"{outcome.written + outcome.before} of {len(rows)} rows, {outcome.failed} with errors"
    )
    click.echo(f"{output}: {summary}", err=True)
    if outcome.stopped:
        click.echo("stopped; run the same command again to go on", err=True)
        return 130
    if outcome.failed:
        kinds = failures(journal_path(output)).most_common()
        for message, count in kinds[:3]:
            click.echo(f"  {count} x {message}", err=True)
        if len(kinds) > 3:
            rest = sum(count for _, count in kinds[3:])
            click.echo(f"  {rest} x others: see {journal_path(output)}", err=True)
        click.echo("--retry does the rows with errors again.", err=True)
    return 1 if outcome.failed else 0


def _fingerprint(analyzer: Analyzer, options: dict[str, Any]) -> str:
    """Twelve hex digits of everything that an answer depends on beside its row."""
    bundle = analyzer.bundle
    chosen = [options[name] for name in ("task", "parity", "fps", "max_seconds")]
    text = json.dumps([bundle.to_dict(), *chosen], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
