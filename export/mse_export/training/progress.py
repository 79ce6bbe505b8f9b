"""Where progress goes: lines and a bar on stderr; lines alone where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Reporter", "console_reporter"]


def _quiet(what: str, done: int, total: int) -> None:
    """No bar."""


@dataclass(frozen=True)
class Reporter:
    """A line for people, and steps of a bar called `what`."""

    say: Callable[[str], None]
    step: Callable[[str, int, int], None] = _quiet


@contextmanager
def console_reporter() -> Iterator[Reporter]:
    """A reporter on stderr for the time of a `with` block."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True, soft_wrap=True, highlight=False)
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
        bar.update(tasks[what], completed=done, total=total, visible=done < total)

    with bar:
        yield Reporter(lambda text: console.print(text, markup=False), step)
