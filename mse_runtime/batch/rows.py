"""What a batch reads: a CSV, a JSON Lines file or a folder of clips with transcripts beside them.

Columns: `clip` (or `features`, an .npz made before) and `text`; optional `id`, `task`, `start`,
`end`. Paths are relative to the list's folder. In a folder, `a.mp4` takes its text from `a.txt`. A
row that makes no sense becomes a `Row` with `problem` set, so that it is reported in its place.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mse_runtime.errors import UsageError

__all__ = ["COLUMNS", "Row", "make_row", "read_rows"]

PICTURE = ".mp4 .mov .mkv .webm .avi .m4v .mpg .mpeg .ts .3gp .flv .wmv"
SOUND = ".wav .mp3 .m4a .flac .ogg .opus .aac"
MEDIA = frozenset(f"{PICTURE} {SOUND}".split())
MAX_TEXT_FILE = 1 << 20
SEPARATORS = " Columns are separated by commas (in a .tsv by tabs)."
COLUMNS = ("id", "clip", "features", "text", "task", "start", "end")


@dataclass(frozen=True)
class Row:
    """One input. `source` is the clip, or the feature file where `is_features`."""

    index: int
    id: str
    source: Path
    text: str
    task: str | None = None
    start: float | None = None
    end: float | None = None
    is_features: bool = False
    problem: str | None = None


def read_rows(path: Path) -> list[Row]:
    """All rows of a list or folder, in order.

    Raises:
        UsageError: no such list, an unknown kind of file, or columns that are missing.
    """
    if path.is_dir():
        return list(_folder(path))
    if not path.is_file():
        raise UsageError(f"There is no batch list {path}. Give a .csv, .tsv, .jsonl or a folder.")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl}
    if path.suffix.lower() not in readers:
        raise UsageError(
            f"The batch list {path} is neither .csv, .tsv, .jsonl nor a folder. Save it as "
            "CSV with the columns clip and text."
        )
    try:
        found = list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The batch list {path} is not UTF-8 (byte {error.start}). Convert it, for example "
            "with: iconv -f latin1 -t utf-8"
        ) from error
    except (csv.Error, OSError) as error:
        raise UsageError(f"The batch list {path} cannot be read: {error}.") from error
    return [make_row(i, fields, path.parent) for i, fields in enumerate(found)]


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        table = csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = [name.strip().lower() for name in table.fieldnames or ()]
        if "text" not in names or not {"clip", "features"} & set(names):
            raise UsageError(
                f"{path} needs the columns clip (or features) and text; it has "
                f"{', '.join(names) or 'none'}.{SEPARATORS if ';' in str(names) else ''}"
            )
        table.fieldnames = names
        for fields in table:
            yield {k: v for k, v in fields.items() if k in COLUMNS and v not in (None, "")}


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = None
            yield fields if isinstance(fields, dict) else {"problem": "this line is not JSON"}


def _folder(path: Path) -> Iterator[Row]:
    clips = sorted(p for p in path.iterdir() if p.suffix.lower() in MEDIA)
    if not clips:
        raise UsageError(f"The folder {path} holds no clips. Put clips and their .txt files there.")
    for index, clip in enumerate(clips):
        text, problem = "", None
        try:
            with clip.with_suffix(".txt").open("rb") as handle:
                text = handle.read(MAX_TEXT_FILE).decode("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            problem = f"no transcript: {clip.with_suffix('.txt').name} is missing or not UTF-8"
        yield Row(index, clip.stem, clip, text, problem=problem)


def make_row(index: int, fields: dict[str, Any], folder: Path) -> Row:
    """The row of one entry of a list: `fields` by name of column, empty ones left out."""

    def string(name: str) -> str:
        value = fields.get(name, "")
        if not isinstance(value, str | int | float):
            problems.append(f"{name} is not a text")
            return ""
        return str(value)

    def seconds(name: str) -> float | None:
        if name not in fields or fields[name] is None:
            return None
        try:
            value = float(fields[name])
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not value >= 0 or math.isinf(value):
            problems.append(f"{name} is not a number of seconds")
            return None
        return value

    problems = [str(fields["problem"])] if "problem" in fields else []
    is_features = "features" in fields and "clip" not in fields
    source, text = string("features" if is_features else "clip"), string("text")
    if not source and not problems:
        problems.append("it names no clip")
    if "\x00" in source:
        problems.append("the path contains a NUL character")
        source = ""
    start, end = seconds("start"), seconds("end")
    return Row(
        index=index,
        id=string("id") or str(index),
        source=folder / source,
        text=text,
        task=string("task") or None,
        start=start,
        end=end,
        is_features=is_features,
        problem="; ".join(problems) or None,
    )
