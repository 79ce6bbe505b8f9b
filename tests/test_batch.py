"""Batches: every row once, whatever happens in between."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mse_runtime import Analyzer
from mse_runtime.backbone import reports
from mse_runtime.batch.export import convert, journal_path
from mse_runtime.batch.journal import Journal
from mse_runtime.batch.rows import Row, read_rows
from mse_runtime.batch.run import run
from mse_runtime.errors import DecodeError, DeviceError, MediaError, MSEError, UsageError
from mse_runtime.features.npz import load_npz
from mse_runtime.features.pool import FeaturePool

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "examples" / "happy.mp4"
REQUEST = {"path": str(CLIP), "fps": 2.0, "end": 1.0, "threads": 1}


@pytest.fixture(scope="module")
def analyzer() -> Iterator[Analyzer]:
    with Analyzer.open("tiny", adapter="onnx") as opened:
        yield opened


@pytest.fixture(scope="module")
def pool() -> Iterator[FeaturePool]:
    with FeaturePool(2, timeout=120, memory_mb=4096) as made:
        yield made


def feature_rows(folder: Path, count: int) -> list[Row]:
    """Rows of ready feature files: quick, and no worker is needed."""
    rng = np.random.default_rng(0)
    np.savez(
        folder / "f.npz",
        audio=rng.normal(size=(40, 13)).astype(np.float32),
        video=rng.normal(size=(10, 167)).astype(np.float32),
    )
    listing = folder / "list.csv"
    with listing.open("w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["id", "features", "text"])
        table.writerows([f"r{i}", "f.npz", f"This is sentence number {i}."] for i in range(count))
    return read_rows(listing)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_errors_are_rows_and_the_rest_goes_on(
    analyzer: Analyzer, pool: FeaturePool, tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    listing = tmp_path / "list.jsonl"
    entries: list[dict[str, Any] | str] = [
        {"clip": str(CLIP), "text": "I love it.", "end": 1.5},
        {"clip": "missing.mp4", "text": "hello"},
        {"clip": "text.mp4", "text": "hello"},
        {"clip": str(CLIP), "text": " "},
        "{not json",
        {"text": "no clip"},
        {"clip": str(CLIP), "text": "x", "start": "soon"},
        {"clip": str(CLIP), "text": "It was awful.", "end": 1.5, "task": "emotion", "id": "last"},
    ]
    listing.write_text(
        "\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries), "utf-8"
    )
    out = tmp_path / "out.jsonl"
    rows = read_rows(listing)
    with Journal(out, rows) as journal:
        outcome = run(analyzer, rows, journal, pool, fps=2.0)
    found = lines(out)
    assert [entry["index"] for entry in found] == list(range(8))
    assert ["error" in entry for entry in found] == [False, *[True] * 6, False]
    assert outcome.failed == 6
    assert found[-1]["id"] == "last"
    assert found[-1]["task"] == "emotion"
    assert len({entry["error"]["message"] for entry in found if "error" in entry}) == 6


@given(cut=st.integers(0, 400))
def test_a_cut_line_is_repaired(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("journal")
    rows = [Row(i, f"r{i}", Path("c.mp4"), f"text {i}") for i in range(5)]
    out = folder / "out.jsonl"
    with Journal(out, rows) as journal:
        for row in rows:
            journal.write({"index": row.index, "id": row.id, "text": row.text})
    size = out.stat().st_size
    os.truncate(out, max(0, size - cut))
    with Journal(out, rows) as journal:
        for row in rows:
            if row.index not in journal.done:
                journal.write({"index": row.index, "id": row.id, "text": row.text})
    assert [entry["index"] for entry in lines(out)] == list(range(5))


@pytest.mark.parametrize(
    "content",
    [b"not json\n", b'{"index": 9, "id": "x"}\n', b'{"index": 0, "id": "other"}\n', b"[]\n"],
)
def test_a_file_of_something_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(UsageError, match="not written for this list"):
        Journal(out, [Row(0, "r0", Path("c.mp4"), "text")])
    assert out.read_bytes() == content


def test_kill_9_loses_and_repeats_nothing(tmp_path: Path) -> None:
    rows = feature_rows(tmp_path, 150)
    command = [
        sys.executable, "-m", "mse_runtime.cli", "--batch", str(tmp_path / "list.csv"),
        "-o", str(tmp_path / "out.jsonl"), "--adapter", "onnx",
    ]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    out = tmp_path / "out.jsonl"
    while first.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 20):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = out.read_bytes().count(b"\n")
    assert 20 <= before < len(rows)
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert second.returncode == 0, second.stderr
    assert "going on" in second.stderr
    assert [entry["index"] for entry in lines(out)] == list(range(len(rows)))


def test_sigterm_finishes_the_row_in_hand(tmp_path: Path) -> None:
    feature_rows(tmp_path, 400)
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "mse_runtime.cli", "--batch", str(tmp_path / "list.csv"),
        "-o", str(out), "--adapter", "onnx",
    ]  # fmt: skip
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while child.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "go on" in said
    assert [entry["index"] for entry in lines(out)] == list(range(len(lines(out))))


def test_a_clip_that_takes_too_long_is_given_up() -> None:
    with (
        FeaturePool(1, timeout=0.01, memory_mb=4096) as pool,
        pytest.raises(MediaError, match="clip-timeout"),
    ):
        pool.submit(REQUEST).result()


def test_what_stops_every_row_is_no_row(tmp_path: Path) -> None:
    """A model that does not load or a task that is not there ends the command, not the rows."""
    feature_rows(tmp_path, 2)
    for options, code in ((["--task", "nothing"], 2), (["--require-gpu"], 5)):
        out = tmp_path / f"{code}.jsonl"
        command = [
            sys.executable, "-m", "mse_runtime.cli", "--batch", str(tmp_path / "list.csv"),
            "-o", str(out), *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if code == 5 and done.returncode == 0:
            continue  # this machine has a GPU that llama.cpp uses
        assert done.returncode == code, done.stderr
        assert out.read_bytes() == b""


def test_errors_are_done_again_when_asked(tmp_path: Path) -> None:
    rows = [Row(i, f"r{i}", Path("c.mp4"), f"text {i}") for i in range(4)]
    out = tmp_path / "out.jsonl"
    with Journal(out, rows) as journal:
        for row in rows:
            entry: dict[str, Any] = {"index": row.index, "id": row.id, "text": row.text}
            journal.write(entry | ({"error": {"type": "MediaError"}} if row.index % 2 else {}))
    with Journal(out, rows) as journal:
        assert (journal.done, journal.failed) == ({0, 1, 2, 3}, 2)
    with Journal(out, rows, retry=True) as journal:
        assert (journal.done, journal.failed) == ({0, 2}, 0)
        journal.write({"index": 1, "id": "r1", "text": "text 1"})
    assert [entry["index"] for entry in lines(out)] == [0, 2, 1]


def test_a_file_of_another_task_is_left_alone(tmp_path: Path) -> None:
    feature_rows(tmp_path, 2)
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "mse_runtime.cli", "--batch", str(tmp_path / "list.csv"),
        "-o", str(out),
    ]  # fmt: skip
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    before = out.read_bytes()
    for more in (["--task", "emotion"], ["--task", "emotion", "--retry"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert "another bundle, task or options" in done.stderr
    assert out.read_bytes() == before


def test_a_module_beside_the_clips_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "av.py").write_text("raise SystemExit('executed')")
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from mse_runtime.features.pool import FeaturePool\n"
        "with FeaturePool(1, 60, 4096) as pool:\n"
        f"    print(pool.submit({REQUEST!r}).result().face is not None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


def test_a_clip_that_takes_too_much_memory_fails_alone() -> None:
    with FeaturePool(1, timeout=60, memory_mb=256) as pool, pytest.raises(MSEError):
        pool.submit({**REQUEST, "threads": 2}).result()


def test_a_worker_that_dies_is_replaced() -> None:
    with FeaturePool(1, timeout=60, memory_mb=4096) as pool:
        before = pool.submit(REQUEST).result()
        process = pool._all[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGSEGV)
        with pytest.raises(MediaError, match="SIGSEGV"):
            pool.submit(REQUEST).result()
        after = pool.submit(REQUEST).result()
    assert before.face is not None
    assert after.face is not None
    np.testing.assert_array_equal(before.face.values, after.face.values)


def test_a_backbone_failure_is_tried_once_more(
    analyzer: Analyzer, pool: FeaturePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = feature_rows(tmp_path, 3)
    usual, calls = analyzer.analyze_features, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        if calls.count(args[1]) == 1 or args[1] == rows[2].text:
            raise DecodeError("llama_decode failed (simulated)")
        return usual(*args, **kwargs)

    def never(*_args: Any, **_kwargs: Any) -> Any:
        raise DecodeError("llama_decode failed for several (simulated)")

    monkeypatch.setattr(analyzer, "analyze_features", failing)
    monkeypatch.setattr(analyzer, "analyze_many", never)
    with Journal(tmp_path / "out.jsonl", rows) as journal:
        outcome = run(analyzer, rows, journal, pool)
    assert outcome.failed == 1
    assert [("error" in entry) for entry in lines(tmp_path / "out.jsonl")] == [False, False, True]


class ShortOfMemory:
    """llama.cpp, whose `llama_decode` fails for more than `room` positions, as on a full device."""

    def __init__(self, lib: Any, room: int) -> None:
        self._lib, self._room = lib, room
        self.failed: list[int] = []
        self.passed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def llama_decode(self, context: Any, batch: Any) -> int:
        if batch.n_tokens > self._room:
            self.failed.append(batch.n_tokens)
            return -2
        self.passed.append(batch.n_tokens)
        return int(self._lib.llama_decode(context, batch))


@pytest.mark.parametrize("room", [20, 10])
def test_a_failed_decode_is_tried_in_smaller_passes(
    room: int, pool: FeaturePool, tmp_path: Path
) -> None:
    rows = feature_rows(tmp_path, 3)
    with Analyzer.open("tiny", adapter="onnx") as analyzer:
        usual = [
            analyzer.analyze_features(load_npz(row.source), row.text).answer.probabilities
            for row in rows
        ]
        backbone: Any = analyzer._backbone.result()
        backbone._lib = lib = ShortOfMemory(backbone._lib, room)
        with Journal(tmp_path / "out.jsonl", rows) as journal:
            outcome = run(analyzer, rows, journal, pool)
        backbone._lib = lib._lib
        assert backbone.length() == len(analyzer._constant)
    found = lines(tmp_path / "out.jsonl")
    if room == 20:  # as a group, alone, in small passes; after that every pass is small
        assert outcome.failed == 0
        assert len(lib.failed) == 2
        assert max(lib.passed) <= 16
        for entry, expected in zip(found, usual, strict=True):
            assert entry["probabilities"] == pytest.approx(expected, abs=1e-3)
    else:  # not even that fits: once more for each row alone, then an error row
        assert [entry["error"]["type"] for entry in found] == ["DecodeError"] * 3
        assert len(lib.failed) == 1 + 6


def test_no_memory_at_all_ends_the_batch(
    pool: FeaturePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the smaller cache can be made: no row's fault, so the rest is left for later."""
    rows = feature_rows(tmp_path, 3)
    with Analyzer.open("tiny", adapter="onnx") as analyzer:
        analyzer.ready()
        backbone: Any = analyzer._backbone.result()
        backbone._lib = lib = ShortOfMemory(backbone._lib, 0)
        monkeypatch.setattr(lib._lib, "llama_init_from_model", lambda *_: None)
        with (
            Journal(tmp_path / "out.jsonl", rows) as journal,
            pytest.raises(DeviceError, match="no memory left"),
        ):
            run(analyzer, rows, journal, pool)
        monkeypatch.undo()
        backbone._lib = lib._lib
    assert lines(tmp_path / "out.jsonl") == []


def test_smaller_passes_take_less_memory(tmp_path: Path) -> None:
    def compute_buffer(lines: list[str]) -> float:
        sizes = [re.search(r"compute buffer size = +([\d.]+) MiB", line) for line in lines]
        return sum(float(found[1]) for found in sizes if found)

    with Analyzer.open("tiny", adapter="onnx") as analyzer:
        analyzer.ready()
        usual = compute_buffer(reports.log_lines())
        mark = reports.log_mark()
        analyzer.shrink()
        assert 0 < compute_buffer(reports.log_lines(mark)) < usual


def test_ctrl_c_while_the_model_loads_stops_at_once(
    pool: FeaturePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = feature_rows(tmp_path, 1)

    def interrupted() -> None:  # whoever started the tests may have had Ctrl-C ignored
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    with Analyzer.open("tiny", adapter="onnx") as analyzer:
        monkeypatch.setattr(analyzer, "ready", interrupted)
        with Journal(tmp_path / "out.jsonl", rows) as journal, pytest.raises(KeyboardInterrupt):
            run(analyzer, rows, journal, pool)


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from mse_runtime.batch.journal import Journal\n"
        "from mse_runtime.batch.rows import Row\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "rows = [Row(i, str(i), Path('c'), 'x' * 200) for i in range(10)]\n"
        "with Journal(Path(sys.argv[1]), rows) as journal:\n"
        "    for row in rows:\n"
        "        journal.write({'index': row.index, 'id': row.id, 'text': row.text})\n"
    )
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, cwd=ROOT
    )
    assert "UsageError: Cannot write" in done.stderr
    whole = lines(out)
    assert 1 <= len(whole) < 10
    rows = [Row(i, str(i), Path("c"), "x" * 200) for i in range(10)]
    with Journal(out, rows) as journal:
        assert len(journal.done) == len(whole)


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_tables(kind: str, analyzer: Analyzer, pool: FeaturePool, tmp_path: Path) -> None:
    if kind == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    rows = feature_rows(tmp_path, 3)
    output = tmp_path / f"out{kind}"
    with Journal(journal_path(output), rows) as journal:
        run(analyzer, rows, journal, pool)
    convert(output)
    if kind == ".csv":
        with output.open(encoding="utf-8", newline="") as handle:
            table: list[Any] = list(csv.DictReader(handle))
    else:
        table = parquet.read_table(output).to_pylist()
    assert [row["id"] for row in table] == ["r0", "r1", "r2"]
    assert all(-3 <= float(row["value"]) <= 3 for row in table)


def test_a_folder_takes_texts_beside_the_clips(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.wav", "c.mp4", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    rows = read_rows(tmp_path)
    assert [row.id for row in rows] == ["a", "b", "c"]
    assert [row.problem is None for row in rows] == [True, False, False]


def test_lists_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.txt").touch()
    (tmp_path / "list.csv").write_text("a,b\n1,2\n")
    (tmp_path / "latin.csv").write_bytes(b"clip,text\na.mp4,caf\xe9\n")
    (tmp_path / "empty").mkdir()
    for name in ("list.txt", "list.csv", "latin.csv", "empty", "missing.csv"):
        with pytest.raises(UsageError):
            read_rows(tmp_path / name)
    with pytest.raises(UsageError, match="should end in"):
        journal_path(tmp_path / "out.xls")


@given(content=st.binary(max_size=300), kind=st.sampled_from([".csv", ".jsonl"]))
def test_lists_of_anything_never_crash(
    content: bytes, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("list") / f"l{kind}"
    path.write_bytes(content)
    try:
        rows = read_rows(path)
    except UsageError:
        return
    assert [row.index for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("reading", [False, True])
def test_kill_9_ends_the_feature_processes_too(reading: bool) -> None:
    """Between two clips and in the middle of one."""
    code = (
        "import os, signal\n"
        "from mse_runtime.features import pool\n"
        "def die(*_):\n"
        "    print(features._all[0]._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"pool._reply = die if {reading} else pool._reply\n"
        "features = pool.FeaturePool(1, 60, 4096)\n"
        f"features.submit({REQUEST!r}).result()\n"
        "die()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = Path("/proc") / str(int(done.stdout))
    for _ in range(600):
        if not (worker / "exe").exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {worker}")
