"""bench/adapter.py runs and its numbers are of the right kind; nothing about how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mse_kernels import _cpu

ROOT = Path(__file__).resolve().parent.parent


def test_bench_adapter(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    if _cpu.reason() is not None:
        pytest.skip(str(_cpu.reason()))
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "bench" / "adapter.py"), "--jsonl", str(out)]
    options = ["--shapes", "meld", "--batches", "2", "--threads", "1", "--seconds", "0.2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    machine, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert machine["gmacs"] > 0
    assert machine["gbytes"] > 0
    names = {row["contender"] for row in rows}
    assert {"onnxruntime-cpu", "kernels-cpu f32", "kernels-cpu scalar", "numpy"} <= names
    for row in rows:
        assert row["rounds"] >= 7
        assert 0 < row["min_ms"] <= row["p25_ms"] <= row["median_ms"] <= row["p75_ms"]
        exact = row["contender"].rsplit(" ", 1)[-1] not in ("f16", "bf16")
        assert row["difference"] <= (1e-5 if exact else 2e-2), row
        assert row["contender"] in done.stdout
