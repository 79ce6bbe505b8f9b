"""The output of a batch: one JSON line for each row, safe against kill -9 and power loss.

Lines are appended and synced one by one. A last line that was cut is removed when the file is
opened again, and rows that have a line already are not done twice.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from mse_runtime.batch.rows import Row
from mse_runtime.errors import UsageError

__all__ = ["Journal", "foreign"]


class Journal:
    """An append-only JSON Lines file; `done` holds the indices that have a line."""

    def __init__(self, path: Path, rows: list[Row], *, run: str = "", retry: bool = False) -> None:
        """Open `path` for `rows`, repairing and reading what an earlier run left.

        `run` tells what every line was made with (bundle, task, ...): a file of another run is
        refused, so that no file mixes answers.
        With `retry`, lines with an error are dropped, so that their rows are done again.

        Raises:
            UsageError: the file belongs to another list, or cannot be written.
        """
        self.path = path
        self.run = run
        self.done: set[int] = set()
        self.failed = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(
                f"Cannot write {path}: {error.strerror or error}. Name a file in a folder that "
                "exists."
            ) from error
        try:
            self._resume(rows)
            if retry and self.failed:
                self._drop_errors()
                self.done.clear()
                self.failed = 0
                self._resume(rows)
        except BaseException:
            os.close(self._fd)
            raise

    def _drop_errors(self) -> None:
        """Replace the file by one without its lines that have an error, whole or not at all."""
        part = self.path.with_name(f".{self.path.name}.part")
        with self.path.open("rb") as old, part.open("wb") as new:
            for line in old:
                try:
                    failed = "error" in json.loads(line)
                except (ValueError, TypeError, RecursionError):
                    failed = False  # `_resume` knows what to do with it
                if not failed:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        part.replace(self.path)
        os.close(self._fd)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)

    def _resume(self, rows: list[Row]) -> None:
        good = 0
        with self.path.open("rb") as handle:
            for line in handle:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    index, name = entry["index"], entry["id"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise foreign(self.path) from None
                if not isinstance(index, int) or not 0 <= index < len(rows):
                    raise foreign(self.path)
                row = rows[index]
                if name != row.id or entry.get("text", row.text) != row.text:
                    raise foreign(self.path)
                if entry.get("run", "") != self.run:
                    raise UsageError(
                        f"{self.path} was written with another bundle, task or options. Give "
                        "another -o, or remove it."
                    )
                good += len(line)
                self.done.add(index)
                self.failed += "error" in entry
        os.ftruncate(self._fd, good)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line; it is on the disk when this returns.

        Raises:
            UsageError: the disk is full or gone. What was written before stays whole.
        """
        if self.run:
            entry = {**entry, "run": self.run}
        # File names need not be UTF-8: half a surrogate pair becomes \udc.., as JSON writes it.
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        end = os.fstat(self._fd).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, end)
            raise UsageError(
                f"Cannot write {self.path}: {error.strerror or error}. Make room and run the same "
                "command again: it goes on where it stopped."
            ) from error
        self.done.add(entry["index"])
        self.failed += "error" in entry

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def foreign(path: Path) -> UsageError:
    """The error for a file that is in the way."""
    return UsageError(
        f"{path} exists and was not written for this list. Give another -o, or remove it."
    )
