"""A batch's journal as a table: CSV or Parquet beside the JSON Lines that everything else reads."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mse_runtime.errors import UsageError

__all__ = ["convert", "failures", "journal_path"]

TABLES = (".csv", ".parquet")
PLAIN = ("index", "id", "clip", "text", "task", "value", "label", "mode", "std")


def journal_path(output: Path) -> Path:
    """Where the rows are written as they come: `output` itself, or beside a table.

    Raises:
        UsageError: a kind of file that is not known, or Parquet without pyarrow.
    """
    kind = output.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return output
    if kind not in TABLES:
        raise UsageError(f"-o {output} should end in .jsonl, .csv or .parquet.")
    if kind == ".parquet":
        _pyarrow()
    return output.with_name(output.name + ".jsonl")


def convert(output: Path) -> None:
    """Write the table at `output` from its journal; nothing to do for JSON Lines."""
    kind = output.suffix.lower()
    if kind not in TABLES:
        return
    rows = sorted(_rows(journal_path(output)), key=lambda row: int(row["index"]))
    names = list(PLAIN)
    for row in rows:
        names += [name for name in row if name not in names]
    part = output.with_name(f".{output.name}.part")
    try:
        if kind == ".csv":
            with part.open("w", encoding="utf-8", newline="") as handle:
                table = csv.DictWriter(handle, names)
                table.writeheader()
                table.writerows(rows)
        else:
            pyarrow, parquet = _pyarrow()
            columns = {name: [row.get(name) for row in rows] for name in names}
            parquet.write_table(pyarrow.table(columns), part)
        part.replace(output)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(
            f"Cannot write {output}: {error.strerror or error}. The rows are safe in "
            f"{journal_path(output)}."
        ) from error


def failures(journal: Path) -> Counter[str]:
    """How often each error occurs."""
    return Counter(row["error"] for row in _rows(journal) if row["error"])


def _rows(journal: Path) -> Iterator[dict[str, Any]]:
    with journal.open(encoding="utf-8") as handle:
        for line in handle:
            entry = json.loads(line)
            row = {name: entry.get(name) for name in PLAIN}
            row |= {f"p_{name}": p for name, p in (entry.get("probabilities") or {}).items()}
            row["bundle"] = (entry.get("bundle") or {}).get("name")
            row["error"] = entry["error"]["message"] if "error" in entry else None
            row["warnings"] = " | ".join(entry.get("warnings", ())) or None
            yield {name: _text(value) for name, value in row.items()}


def _text(value: Any) -> Any:
    """Half a surrogate pair (a file name that is not UTF-8) as \\udc..: tables hold text only."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            "Parquet needs pyarrow: pip install 'mse-runtime[parquet]', or write .jsonl or .csv."
        ) from None
    return pyarrow, parquet
