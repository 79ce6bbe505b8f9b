"""What thousands of clips would show, in small: memory, open files, threads, cache cells.

The full run is `python bench/endurance.py`.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mse_runtime import Analyzer

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs /proc to see what a process holds"
)


@pytest.fixture(scope="module")
def endurance() -> Iterator[ModuleType]:
    """The bench, imported as its script is."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("endurance")
    finally:
        sys.path[:] = before


def numbers_of(code: str) -> list[float]:
    """What `code` prints, in a process of its own: another test's garbage is no growth here, and
    pages that it gave back would hide a leak."""
    begin = "import sys; sys.path.insert(0, 'bench')\n"
    command = [sys.executable, "-c", begin + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.split()]


def test_hundreds_of_clips_leave_nothing_behind() -> None:
    code = (
        "from endurance import answer_clips, course, leaked_cells\n"
        "from mse_runtime import Analyzer\n"
        "with Analyzer.open('tiny', adapter='onnx') as analyzer:\n"
        "    run = course(answer_clips(analyzer, fps=2.0, end=1.0), 200, 40)\n"
        "    print(run.growth, run.files, run.threads, leaked_cells(analyzer))\n"
    )
    growth, files, threads, cells = numbers_of(code)
    assert growth < 5e6
    assert files <= 0
    assert threads <= 0
    assert cells == 0


def test_a_leak_is_seen() -> None:
    code = (
        "import os\n"
        "from endurance import course\n"
        "kept, ends = [], []\n"
        "leaking = course(lambda _: kept.append(bytearray(os.urandom(1 << 17))), 100, 5)\n"
        "opening = course(lambda _: ends.append(os.open('/dev/null', os.O_RDONLY)), 10, 2)\n"
        "steady = course(lambda _: bytearray(1 << 17), 100, 5)\n"
        "print(leaking.growth, opening.files, steady.growth, steady.files)\n"
    )
    leaked, opened, steady, kept_open = numbers_of(code)
    assert leaked > 5e6
    assert opened == 9
    assert steady < 5e6
    assert kept_open == 0


def test_leaked_cells_are_counted(endurance: ModuleType) -> None:
    with Analyzer.open("tiny", threads=1, adapter="numpy") as analyzer:
        backbone = analyzer._backbone.result()
        backbone.prefill([0] * 7)
        assert endurance.leaked_cells(analyzer) == 0
        backbone.prefill([0] * 7)
        backbone._lib.llama_memory_seq_cp(backbone._memory, 0, 1, -1, -1)  # a leaf left behind
        backbone.truncate(0, 3)
        assert endurance.leaked_cells(analyzer) == 4
