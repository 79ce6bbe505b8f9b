"""The benches' statistics and records, every script's --help, one run in miniature."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCH = Path(__file__).resolve().parent.parent / "bench"
SCRIPTS = (
    "latency.py",
    "memory.py",
    "throughput.py",
    "slopes.py",
    "neighbour.py",
    "compare.py",
    "report.py",
    "bundles.py",
)
SAMPLES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """Bench modules, imported as the scripts import each other."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        names = ("common", "compare", "write_report", "plots", "report")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path[:] = before


@given(samples=SAMPLES)
def test_statistics(bench: dict[str, ModuleType], samples: list[float]) -> None:
    found = bench["common"].describe(samples)
    assert found["min"] <= found["median"] <= found["max"]
    assert found["min"] <= found["avg"] * (1 + 1e-9)
    assert found["stddev"] >= 0
    assert found["n"] == len(samples) == len(found["samples"])
    json.dumps(found)


def test_spread_is_the_middle_half_over_the_median(bench: dict[str, ModuleType]) -> None:
    describe = bench["common"].describe
    steady = describe([1.0, 1.01, 1.0, 0.99, 9.0])  # one outlier does not make a row wide
    assert not steady["wide"]
    assert steady["median"] == 1.0
    uneven = describe([1.0, 2.0, 3.0, 4.0, 5.0])
    assert uneven["spread"] == pytest.approx(2 / 3, abs=1e-4)
    assert uneven["wide"]
    with pytest.raises(ValueError, match="no samples"):
        describe([])


def test_a_ratio_pairs_the_samples_of_a_turn(bench: dict[str, ModuleType]) -> None:
    # The machine got three times slower in between: the ratio does not move.
    found = bench["common"].ratio(
        "b", "a / b", [2.0, 6.0, 2.0], [1.0, 3.0, 1.0], demand="<= 1.05", shape="tiny"
    )
    assert found["median"] == 2.0
    assert found["spread"] == 0
    assert found["met"] is False
    assert found["demand"] == "<= 1.05"
    with pytest.raises(ValueError, match="zip"):
        bench["common"].ratio("b", "c", [1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("number", "demand", "met"),
    [(0.65, "<= 0.65", True), (0.66, "<= 0.65", False), (3, ">= 2", True), (1, ">= 2", False)],
)
def test_demands(bench: dict[str, ModuleType], number: float, demand: str, met: bool) -> None:
    found = bench["common"].value("memory", "peak", number, "GB", demand=demand)
    assert found["met"] is met
    assert "demand" not in bench["common"].value("memory", "peak", number, "GB")


def test_turns_interleave_and_stop(bench: dict[str, ModuleType]) -> None:
    called: list[str] = []

    def case(name: str) -> Any:
        def work() -> float:
            called.append(name)
            return 1.0

        return work

    cases = {"a": case("a"), "b": case("b")}
    found = bench["common"].turns(cases, repeat=3, pause=0)
    assert called == ["a", "b", *"ab", *"ba", *"ab"]  # a turn to warm up, then back and forth
    assert found == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert len(bench["common"].turns(cases, repeat=9, seconds=0, least=4, pause=0)["a"]) == 4


def test_machine_says_what_it_is(bench: dict[str, ModuleType]) -> None:
    found = bench["common"].machine()
    assert found["cpu_info"]
    assert found["cores"] >= 1
    assert found["ram_gb"] > 0
    assert found["versions"]["numpy"]
    assert isinstance(found["gpu_info"], list)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_needs_nothing(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(BENCH / script), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--shapes" in done.stdout
    assert "--quick" in done.stdout
    assert "| torch\n" not in done.stderr


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One run in miniature."""
    folder = tmp_path_factory.mktemp("bench")
    out = folder / "records.jsonl"
    for script, options in (
        ("latency.py", ["--peers", "", "--no-cold"]),
        ("memory.py", ["--peers", ""]),
        ("neighbour.py", []),
    ):
        subprocess.run(
            [sys.executable, str(BENCH / script), "--shapes", "tiny", "--quick", "--repeat", "2",
             "--bundles", str(folder / "bundles"), "--out", str(out), *options],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_miniature_records(records: list[dict[str, Any]]) -> None:
    assert records[0]["kind"] == "machine"
    times = {r["case"]: r for r in records if r["kind"] == "time"}
    for case in (
        "answer, published layout",
        "raw llama.cpp, prompt",
        "after features, pseudo-last",
    ):
        row = times[case]
        assert {"shape", "quant", "threads", "n_prompt", "median", "avg", "stddev", "samples"} <= {
            *row
        }
        assert all(seconds > 0 for seconds in row["samples"])
    published, tail = (
        times["after features, published layout"],
        times["after features, pseudo-last"],
    )
    assert tail["n_prompt"] < 20 < published["n_prompt"]
    ratios = {r["case"] for r in records if r["kind"] == "ratio"}
    assert {"answer / raw, same positions", "after features: pseudo-last / published"} <= ratios
    assert any(
        r["bench"] == "neighbour" and r["median"] > 0 for r in records if r["kind"] == "ratio"
    )


def test_report_from_records(
    bench: dict[str, ModuleType], records: list[dict[str, Any]], tmp_path: Path
) -> None:
    pictures = bench["plots"].draw(records, tmp_path / "plots")
    assert {path.name for _, path in pictures} == {"stages.svg", "memory.svg"}
    note = bench["common"].note("memory", "VRAM: not run on a GPU", shape="tiny")
    page = bench["write_report"].report([*records, note], pictures, tmp_path, tmp_path / "r.jsonl")
    assert "tiny f16" in page
    assert "VRAM: not run on a GPU" in page
    assert "(plots/stages.svg)" in page
    machine = records[0]
    assert machine["cpu_info"] in page
    assert "not run" in bench["compare"].main_table(records)  # no peer was measured
    assert "answer / raw" not in bench["compare"].demands(records)  # tiny has no such demand


def test_report_names_every_bench(bench: dict[str, ModuleType]) -> None:
    steps = bench["report"].steps(("tiny", "qwen-1.8b", "llama2-7b"), False, 60)
    scripts = {step.script for step in steps}
    assert scripts == {"latency.py", "memory.py", "throughput.py", "neighbour.py", "slopes.py",
                       "layouts.py", "features.py", "adapter.py"}  # fmt: skip
    assert all((BENCH / script).exists() for script in scripts)


def test_a_file_is_ready_whatever_the_page_cache_had_of_it(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = bench["common"]
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(5 << 20))
    (tmp_path / "empty.gguf").touch()
    assert common._maps_large(path) in (True, False)
    assert common._maps_large(tmp_path / "empty.gguf")
    read: list[Path] = []
    monkeypatch.setattr(common, "_read", read.append)
    monkeypatch.setattr(common, "_maps_large", lambda path: not path.stat().st_size)
    monkeypatch.setattr(common, "_always_small", set())
    for times in (2, 3):  # from the disk once; that it does not help is not tried again
        common.machine_ready(tmp_path)
        assert read.count(path) == times
    monkeypatch.undo()
    monkeypatch.setattr(common, "_smaps", lambda _: "Rss: 5 kB\n")  # an older kernel
    assert common._maps_large(path)
    for pieces, large in ((0, False), (4, False), (5, True)):
        said = f"Rss:   5 kB\nFilePmdMapped:   {pieces} kB\n"
        monkeypatch.setattr(common, "_smaps", lambda _, said=said: said)
        assert common._maps_large(path) == large
