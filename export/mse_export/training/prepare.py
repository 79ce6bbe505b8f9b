"""`mse-train prepare`: a CSV of clips becomes a folder of features, in parallel, going on after a
kill where it stopped.

Every feature file is named by what it was made from (clip, size, time of change, window, feature
specs), so a finished one is never made twice and a changed clip is made again.
"""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from mse_runtime.datasets import (
    DataSetInfo,
    Problem,
    assign_split,
    parse_label,
    split_name,
)
from mse_runtime.datasets.open_format import INFO, MANIFEST, guess_info, read_rows, write_info
from mse_runtime.datasets.samples import Kind
from mse_runtime.errors import MediaError, MSEError, UsageError

__all__ = ["Prepared", "Row", "prepare", "read_clips"]

COLUMNS = ("id", "features", "text", "label", "split", "speaker")
PROBLEMS = "problems.csv"


@dataclass(frozen=True)
class Row:
    """One good line of the CSV. `target` is the feature file it will have."""

    id: str
    clip: Path
    text: str
    label: str
    split: str
    speaker: str
    start: float | None
    end: float | None
    target: Path


@dataclass(frozen=True)
class Prepared:
    """What came of it: rows in the manifest, of which `made` now, and what went wrong."""

    folder: Path
    rows: int
    made: int
    splits: dict[str, int]
    problems: tuple[Problem, ...]
    interrupted: bool = False


def describe(
    path: Path,
    kind: Kind | None = None,
    labels: Sequence[str] = (),
    ends: tuple[float, float] | None = None,
) -> DataSetInfo:
    """What the CSV's labels ask, as told or else guessed from the label column."""
    values = [row.get("label", "") for _, row in read_rows(path)]
    kind = "classification" if labels else "regression" if ends else kind
    info = guess_info(values, path.stem, kind)
    if labels:
        info = replace(info, labels=tuple(labels))
    if ends:
        info = replace(info, range=ends)
    if info.kind == "classification" and len(info.labels) < 2:
        raise UsageError(
            f"{path} has {len(info.labels)} different labels; a classification needs at least two. "
            "Is there a column called label?"
        )
    return info


def read_clips(
    path: Path, folder: Path, info: DataSetInfo, face_fps: float | None = None
) -> tuple[list[Row], list[Problem]]:
    """The good rows of a CSV: clip, text, label, and optionally id, split, speaker, start, end."""
    rows: list[Row] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for line, row in read_rows(path):
        where = f"{path.name}, line {line}"
        try:
            found = _row(row, path.parent, folder, info, line, face_fps)
            if found.id in seen:
                raise ValueError(f"the id {found.id!r} stands twice")
        except ValueError as error:
            problems.append(Problem(where, str(error)))
            continue
        seen.add(found.id)
        rows.append(found)
    return rows, problems


def _row(
    row: dict[str, str],
    base: Path,
    folder: Path,
    info: DataSetInfo,
    line: int,
    fps: float | None,
) -> Row:
    if not row.get("clip"):
        raise ValueError("names no clip")
    clip = base / row["clip"]
    if not clip.is_file():
        raise ValueError(f"there is no clip {clip}")
    if not row["text"]:
        raise ValueError("the text is empty")
    if not row.get("label"):
        raise ValueError("has no label")
    parse_label(row["label"], info)
    start, end = (float(row[key]) if row.get(key) else None for key in ("start", "end"))
    key = row.get("id") or f"{line:06d}-{clip.stem}"
    speaker = row.get("speaker", "")
    split = split_name(row["split"]) if row.get("split") else assign_split(speaker or key)
    status = clip.stat()
    made_from = (
        clip.resolve(),
        status.st_size,
        status.st_mtime_ns,
        start,
        end,
        fps,
        info.audio_spec,
        info.face_spec,
    )
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    target = folder / "features" / f"{digest}.npz"
    return Row(key, clip, row["text"], row["label"], split, speaker, start, end, target)


def prepare(
    path: Path,
    folder: Path,
    info: DataSetInfo,
    *,
    jobs: int = 1,
    fps: float | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Extract the features of every clip in the CSV at `path` into `folder`.

    A clip that cannot be read is a problem of its own and stops nothing. An interrupt keeps what
    was done. Raises MediaError where no row is left.
    """
    rows, problems = read_clips(path, folder, info, fps)
    try:
        (folder / "features").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(
            f"{folder} cannot be made ({error.strerror}). Choose another -o."
        ) from error
    todo = {row.target: row for row in rows if not row.target.exists()}
    step(len(rows) - len(todo), len(rows))
    interrupted = False
    done = len(rows) - len(todo)
    failed: dict[Path, str] = {}
    try:
        for target, fault in _extract_all(list(todo.values()), info, jobs, fps):
            done += 1
            if fault:
                failed[target] = fault
            step(done, len(rows))
    except KeyboardInterrupt:
        interrupted = True
    ready = [row for row in rows if row.target.exists()]
    problems += [Problem(row.id, failed[row.target]) for row in rows if row.target in failed]
    _write(folder, ready, problems, info)
    if not ready and not interrupted:
        raise MediaError(
            f"No clip of {path} could be prepared; every reason is in {folder / PROBLEMS}. The "
            f"first: {problems[0] if problems else 'the file has no row'}."
        )
    counts = {name: sum(row.split == name for row in ready) for name in ("train", "valid", "test")}
    made = sum(row.target in todo for row in ready)
    return Prepared(folder, len(ready), made, counts, tuple(problems), interrupted)


def _extract_all(
    rows: Sequence[Row], info: DataSetInfo, jobs: int, fps: float | None
) -> Iterator[tuple[Path, str]]:
    """(feature file, fault or "") as the clips are done, in any order.

    A clip that kills its process is found by running what was left one at a time.
    """
    tasks = {
        row.target: (row.clip, row.target, row.start, row.end, fps, info.audio_spec, info.face_spec)
        for row in rows
    }
    left = dict(tasks)
    for workers in (jobs, 1):
        try:
            for target, fault in _pool(left, workers):
                del left[target]
                yield target, fault
        except BrokenProcessPool:
            continue
        return
    for target in list(left):  # one process a clip
        try:
            yield from _pool({target: tasks[target]}, 1)
        except BrokenProcessPool:
            yield target, "the process died while reading it; is the file damaged?"


def _pool(tasks: dict[Path, Any], workers: int) -> Iterator[tuple[Path, str]]:
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context)
    try:
        waiting: set[Future[tuple[Path, str]]] = set()
        for task in list(tasks.values()):
            with _deaf_to_ctrl_c():
                waiting.add(pool.submit(_extract_one, *task))
            if len(waiting) >= 4 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C is for the parent: processes started inside finish the clip in hand.

    One that died of it while it starts would leave the pool waiting for ever.
    """
    resource_tracker.ensure_running()  # it would unblock the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which children inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _extract_one(
    clip: Path,
    target: Path,
    start: float | None,
    end: float | None,
    fps: float | None,
    audio_spec: str,
    face_spec: str,
) -> tuple[Path, str]:
    """In a process of its own: one clip to one feature file."""
    from mse_runtime.features.extract import extract, save_npz

    try:
        features = extract(
            clip,
            audio_spec=audio_spec,
            face_spec=face_spec,
            fps=fps,
            start=start,
            end=end,
            threads=1,
        )
        if features.audio is None and features.face is None:
            return target, "has neither sound nor a picture"
        save_npz(target, features)
    except MSEError as error:
        return target, str(error)
    return target, ""


def _write(
    folder: Path, rows: Sequence[Row], problems: Sequence[Problem], info: DataSetInfo
) -> None:
    write_info(folder / INFO, info)
    table = [
        (r.id, str(r.target.relative_to(folder)), r.text, r.label, r.split, r.speaker) for r in rows
    ]
    _table(folder / MANIFEST, COLUMNS, table)
    _table(folder / PROBLEMS, ("where", "what"), [(p.where, p.what) for p in problems])


def _table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows(rows)
    partial.replace(path)
