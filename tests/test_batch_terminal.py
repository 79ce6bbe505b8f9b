"""`mse-run --batch` as its user sees it: the bar, Ctrl-C, exit codes, tables."""

from __future__ import annotations

import csv
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_tools import ROOT, batch_list, command, json_lines

PLAIN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def start(*arguments: str | Path, stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mse_runtime.cli", "--adapter", "onnx", *map(str, arguments)],
        stderr=stderr, cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
        # A test run started in the background hands an ignored Ctrl-C down to its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_the_bar_shows_rows_rate_and_time_left(tmp_path: Path) -> None:
    listing = batch_list(tmp_path, 60)
    parent, child = pty.openpty()
    process = start("--batch", listing, "-o", tmp_path / "out.jsonl", stderr=child)
    os.close(child)
    seen = b""
    try:
        while select.select([parent], [], [], 100)[0]:
            seen += os.read(parent, 65536)
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(parent)
    assert process.wait(60) == 0
    shown = PLAIN.sub("", seen.decode("utf-8"))
    last = [line for line in re.split(r"[\r\n]+", shown) if "/60" in line][-1]
    assert re.search(r"60/60\s+[\d.]+/s\s+\d:\d\d:\d\d\s+\d:\d\d:\d\d", last), last
    assert re.search(r"\d+/60\s+[\d.]+/s\s+\d:\d\d:\d\d\s+\d:\d\d:\d\d", shown)  # time left
    assert "60 of 60 rows, 0 with errors" in shown


def test_ctrl_c_finishes_the_row_and_the_next_run_the_rest(tmp_path: Path) -> None:
    listing, out = batch_list(tmp_path, 400), tmp_path / "out.jsonl"
    process = start("--batch", listing, "-o", out, stderr=subprocess.PIPE)
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1].decode()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    done = json_lines(out)  # every line is whole
    assert 0 < len(done) < 400
    again = start("--batch", listing, "-o", out, stderr=subprocess.PIPE)
    assert f"{len(done)} of 400 rows are done already" in again.communicate()[1].decode()
    assert again.returncode == 0
    assert json_lines(out)[: len(done)] == done
    assert [entry["index"] for entry in json_lines(out)] == list(range(400))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_exit_code_tells_whether_a_row_failed(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    listing, out = batch_list(tmp_path, 3), tmp_path / f"out.{kind}"
    lines = listing.read_text("utf-8")
    listing.write_text(lines + "bad,missing.npz,hello\n", "utf-8")
    arguments = ("--batch", listing, "-o", out, "--adapter", "onnx")
    failed = command(*arguments)
    assert failed.returncode == 1, failed.stderr
    assert "4 of 4 rows, 1 with errors" in failed.stderr
    if kind == "jsonl":
        rows = json_lines(out)
        assert [row["id"] for row in rows] == ["r0", "r1", "r2", "bad"]
        assert set(rows[3]["error"]) == {"type", "message"}
    else:
        if kind == "csv":
            with out.open(encoding="utf-8", newline="") as handle:
                table = list(csv.DictReader(handle))
        else:
            table = parquet.read_table(out).to_pylist()
        assert [row["id"] for row in table] == ["r0", "r1", "r2", "bad"]
        assert [bool(row["error"]) for row in table] == [False, False, False, True]
    (tmp_path / "f.npz").rename(tmp_path / "missing.npz")
    mended = command(*arguments, "--retry")
    assert mended.returncode == 0, mended.stderr
    assert "4 of 4 rows, 0 with errors" in mended.stderr
