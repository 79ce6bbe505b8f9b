"""The batch itself: features ahead in the workers, the language model one group at a time here.

Rows are answered and written in order. An error is a row of its own kind; the rest goes on.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mse_runtime.analyzer import Analyzer, Parity
from mse_runtime.batch.journal import Journal
from mse_runtime.batch.rows import Row
from mse_runtime.batch.together import GroupSize
from mse_runtime.errors import BackboneError, DecodeError, DeviceError, MSEError
from mse_runtime.features.npz import load_npz
from mse_runtime.features.pool import FeaturePool
from mse_runtime.features.spec import Features
from mse_runtime.prompt import check_text
from mse_runtime.result import Prediction

__all__ = ["Outcome", "answers", "run"]

AHEAD = 2
"""Rows of features that wait for the language model, for each worker."""


@dataclass(frozen=True)
class Outcome:
    """How a batch ended: rows written now, rows there before, rows with an error in all."""

    written: int
    before: int
    failed: int
    stopped: bool


def run(
    analyzer: Analyzer,
    rows: list[Row],
    journal: Journal,
    pool: FeaturePool,
    *,
    task: str | None = None,
    parity: Parity | None = None,
    fps: float | None = None,
    max_seconds: float = 60.0,
    progress: Callable[[], None] = lambda: None,
) -> Outcome:
    """Answer every row that has no line in `journal` yet.

    SIGINT and SIGTERM finish the rows in hand and stop; a second one stops at once, and so does the
    first while the model still loads.
    """
    analyzer.task(task)
    analyzer.ready()
    before = len(journal.done)
    todo = [row for row in rows if row.index not in journal.done]
    groups = answers(
        analyzer, todo, pool, task=task, parity=parity, fps=fps, max_seconds=max_seconds
    )
    with _stop_signals() as stop:
        while not stop.is_set() and (entries := next(groups, None)):
            for entry in entries:
                journal.write(entry)
                progress()
        stopped = stop.is_set()
    return Outcome(len(journal.done) - before, before, journal.failed, stopped)


def answers(
    analyzer: Analyzer,
    rows: Iterable[Row],
    pool: FeaturePool,
    *,
    task: str | None = None,
    parity: Parity | None = None,
    fps: float | None = None,
    max_seconds: float = 60.0,
    size: GroupSize | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """One line of output for each row, in order, while `pool` works on the features of the next.

    They come in groups that shared a pass through the language model, as large as `size` says
    (default: a new one); a row whose features are not there yet is not waited for. What keeps every
    row from an answer (no such task, a model that does not load) is raised.
    """
    analyzer.task(task)
    analyzer.ready()
    inputs = analyzer.bundle.features
    options = {
        "audio_spec": inputs.audio.spec,
        "face_spec": inputs.face.spec,
        "fps": fps,
        "max_seconds": max_seconds,
        "threads": 1,
        "needs": True,
        # Only a bundle with encoders of its own is needed to extract its features.
        "bundle": str(analyzer.bundle.path) if analyzer.bundle.encoders else None,
    }
    waiting: deque[tuple[Row, Future[Features]]] = deque()
    todo = iter(rows)
    size = size or GroupSize(analyzer)
    while True:
        count = 1 if parity else size.next
        while len(waiting) < AHEAD * pool.workers + count and (row := next(todo, None)):
            waiting.append((row, _features(row, pool, options)))
        if not waiting:
            return
        group = [waiting.popleft()]
        wait([group[0][1]])
        while len(group) < count and waiting and waiting[0][1].done():
            group.append(waiting.popleft())
        yield _entries(analyzer, group, task, parity, size)


def _features(row: Row, pool: FeaturePool, options: dict[str, Any]) -> Future[Features]:
    """Features of a row in the future; a row that cannot have any is refused there too."""
    try:
        if row.problem:
            raise MSEError(row.problem)
        check_text(row.text)
        if row.is_features:
            ready: Future[Features] = Future()
            ready.set_result(load_npz(row.source))
            return ready
    except Exception as error:
        refused: Future[Features] = Future()
        refused.set_exception(error)
        return refused
    window = {"start": row.start, "end": row.end}
    return pool.submit({"path": str(row.source), **window, **options})


def _entries(
    analyzer: Analyzer,
    group: list[tuple[Row, Future[Features]]],
    task: str | None,
    parity: Parity | None,
    size: GroupSize,
) -> list[dict[str, Any]]:
    """The lines of a group: those with features and the same task from one pass."""
    found: dict[int, Prediction] = {}
    if size.together and not parity:
        by_task: dict[str | None, list[tuple[Row, Features]]] = {}
        for row, features in group:
            if features.exception() is None:
                by_task.setdefault(row.task or task, []).append((row, features.result()))
        for name, rows in by_task.items():
            found |= _together(analyzer, rows, name, size)
        if found and size.measuring and len(group) == size.next:
            seconds = sum(result.timing_ms["total"] for result in found.values()) / 1e3
            positions = sum(
                analyzer.new_positions(row.text, row.task or task)
                for row, _ in group
                if row.index in found
            )
            size.took(len(group), seconds / positions)
    return [
        {"index": row.index, "id": row.id, **found[row.index].to_dict()}
        if row.index in found
        else _entry(analyzer, row, features, row.task or task, parity)
        for row, features in group
    ]


def _together(
    analyzer: Analyzer, rows: list[tuple[Row, Features]], task: str | None, size: GroupSize
) -> dict[int, Prediction]:
    """Answers by index; none where the pass failed: then each row is tried alone."""
    clips = [(features, row.text, str(row.source)) for row, features in rows]
    try:
        results = analyzer.analyze_many(clips, task=task)
    except (DecodeError, MemoryError):
        size.failed(for_good=True)
    except BackboneError:  # too much at a time, or one of the rows
        size.failed(for_good=False)
    except DeviceError:
        raise
    except Exception:  # one of them is to blame
        pass
    else:
        size.passed()
        return {row.index: result for (row, _), result in zip(rows, results, strict=True)}
    return {}


def _entry(
    analyzer: Analyzer,
    row: Row,
    features: Future[Features],
    task: str | None,
    parity: Parity | None,
) -> dict[str, Any]:
    head = {"index": row.index, "id": row.id}
    try:
        found = features.result()
        answer = partial(
            analyzer.analyze_features,
            found,
            row.text,
            task=task,
            parity=parity,
            clip=str(row.source),
        )
        try:
            result = answer()
        except (DecodeError, MemoryError):
            analyzer.shrink()  # once more, with an empty cache and smaller passes
            result = answer()
    except DeviceError:  # no row's fault, and no row could be answered after it
        raise
    except Exception as error:  # whatever it was, it is this row's
        problem = {"type": type(error).__name__, "message": str(error)}
        return {**head, "clip": str(row.source), "text": row.text, "error": problem}
    return {**head, **result.to_dict()}


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one has its usual effect."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    usual = {kind: signal.getsignal(kind) for kind in kinds}

    def restore() -> None:
        for kind, handler in usual.items():
            signal.signal(kind, handler)

    def first(_number: int, _frame: object) -> None:
        stop.set()
        restore()

    for kind in kinds:
        signal.signal(kind, first)
    try:
        yield stop
    finally:
        restore()
