"""The fuzzers themselves: all seeds, a second of each, and a planted fault that must be found.

Minutes and hours: `python -m tests.fuzz all --minutes 60`.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.__main__ import ALL

ROOT = Path(__file__).resolve().parent.parent
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (Linux x86-64)"
)


def fuzz(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # A new process begins with its parent's peak memory in the accounts that libFuzzer reads: the
    # shell between is a small parent.
    command = ["sh", "-c", '"$@"; exit $?', "sh"]
    command += [sys.executable, "-m", "tests.fuzz", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd=ROOT, timeout=300
    )


@pytest.mark.parametrize("name", ALL)
def test_every_seed_and_every_find_of_before(name: str) -> None:
    done = fuzz(name, "--replay")
    assert done.returncode == 0, done.stderr[-3000:]
    count = int(done.stdout.split()[0])
    assert count >= 2 + len([*(ROOT / "tests" / "fixtures" / "fuzz" / name).glob("*")])


@needs_atheris
@pytest.mark.parametrize("name", ALL)
def test_a_second_of_each(name: str, tmp_path: Path) -> None:
    done = fuzz(name, "--minutes", "0.02", "--corpus", tmp_path / "c", "--finds", tmp_path / "f")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [*(tmp_path / "f" / name).iterdir()] == []
    ran = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert ran is not None
    assert int(ran[1]) > 20


@needs_atheris
@pytest.mark.parametrize("kind", ["exception", "time", "memory", "signal"])
def test_a_planted_fault_is_found_and_kept(kind: str, tmp_path: Path) -> None:
    done = fuzz(
        f"planted-{kind}", "--minutes", "0.5", "--corpus", tmp_path / "c", "--finds", tmp_path / "f"
    )
    assert done.returncode != 0, done.stderr[-3000:]
    (find,) = (tmp_path / "f" / f"planted-{kind}").iterdir()
    assert len(find.read_bytes()) > 3
