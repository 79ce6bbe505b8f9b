"""The first-run probe, with children that really die."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from make_fixtures import toy_gguf

from mse_runtime import cache, cpu, probe
from mse_runtime.backbone import Backbone, library
from mse_runtime.errors import BackboneError


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))


def child(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time; {code}"]


DIES_FAST = "print('plain', flush=True); os.kill(os.getpid(), signal.SIGILL)"
DIES_AT_ONCE = "os.kill(os.getpid(), signal.SIGILL)"


def test_the_real_child_answers_and_is_remembered() -> None:
    first = probe.fast_path()
    assert not first.remembered
    assert first.outcome in ("ok", "it died by SIGILL", "it died by SIGSEGV")
    assert first.extra_bufts == (first.outcome == "ok")
    again = probe.fast_path(child("sys.exit(9)"))  # not asked again, so this never runs
    assert again == probe.ProbeResult(first.extra_bufts, first.outcome, again.seconds, True)


def test_a_child_killed_on_the_fast_path_means_the_slow_one() -> None:
    found = probe.fast_path(child(DIES_FAST))
    assert not found.extra_bufts
    assert found.outcome == "it died by SIGILL"
    assert found.warning is not None
    assert "SIGILL" in found.warning
    assert "mse-doctor" in found.warning
    assert probe.fast_path().remembered


def test_a_build_for_another_cpu_is_an_error_not_a_crash() -> None:
    with pytest.raises(BackboneError, match=r"does not run on this CPU at all.*SIGILL"):
        probe.fast_path(child(DIES_AT_ONCE))
    assert cache.read_json("probe.json") == {}


def test_wrong_numbers_mean_the_slow_path() -> None:
    found = probe.fast_path(child("print('plain'); print('differs'); sys.exit(1)"))
    assert not found.extra_bufts
    assert "other numbers" in found.outcome


@pytest.mark.parametrize(
    "command",
    [child("sys.exit(3)"), child("print('plain'); sys.exit(1)"), child("pass"),
     ["/nonexistent/python"], ["\0"]],
)  # fmt: skip
def test_an_unclear_end_is_careful_and_not_remembered(command: list[str]) -> None:
    found = probe.fast_path(command)
    assert not found.extra_bufts
    assert found.warning is not None
    assert not probe.fast_path(child("print('plain'); print('fast')")).remembered


def test_a_child_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TIMEOUT", 0.3)
    found = probe.fast_path(child("time.sleep(60)"))
    assert not found.extra_bufts
    assert "TimeoutExpired" in found.outcome


def test_another_build_or_cpu_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    works = child("print('plain'); print('fast')")
    assert not probe.fast_path(works).remembered
    assert probe.fast_path(works).remembered
    monkeypatch.setattr(cpu, "model", lambda: "another CPU")
    assert not probe.fast_path(works).remembered
    monkeypatch.setattr("mse_runtime.backbone.library.build_id", lambda: "another build")
    assert not probe.fast_path(works).remembered
    assert probe.fast_path(works).remembered
    assert not probe.fast_path(works, force=True).remembered


def test_a_damaged_memory_is_asked_again(tmp_path: Path) -> None:
    works = child("print('plain'); print('fast')")
    probe.fast_path(works)
    path = tmp_path / "cache" / "probe.json"
    for damage in ("", "[1]", path.read_text().replace("outcome", "come-out")):
        path.write_text(damage)
        assert not probe.fast_path(works).remembered
        assert probe.fast_path(works).remembered


def test_without_a_cache_folder_it_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSE_CACHE", "/proc/nowhere")
    assert probe.fast_path(child("print('plain'); print('fast')")).extra_bufts


def test_the_backbone_falls_back_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    monkeypatch.setattr(probe, "_child_command", lambda _model: child(DIES_FAST))
    monkeypatch.setattr(library, "mapped_types", lambda: ())  # else nothing is repacked here
    with Backbone.open(path, threads=1) as backbone:
        assert backbone.info["extra_bufts"] is False
        assert any("SIGILL" in warning for warning in backbone.info["warnings"])
        assert not any("REPACK" in name for name in backbone.info["buffers_mib"])
        slow = backbone.prefill([1, 2, 3])

    def fast() -> Any:
        with Backbone.open(path, threads=1, extra_bufts=True) as backbone:
            assert backbone.info["warnings"] == []
            return backbone.prefill([1, 2, 3])

    # llama.cpp configures AMX tiles once for each thread, and torch has left others on this one.
    with ThreadPoolExecutor(1) as pool:
        assert abs(pool.submit(fast).result() - slow).max() < 0.05 * abs(slow).max()


def test_nothing_is_probed_where_nothing_is_repacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "fast_path", lambda: pytest.fail("probed"))
    quantised = toy_gguf(tmp_path / "q.gguf", "llama", dtype="q4_0")
    for path, options in (
        (toy_gguf(tmp_path / "m.gguf", "llama", dtype="bf16"), {}),
        (quantised, {"low_memory": True}),
        (quantised, {"extra_bufts": False}),
    ):
        Backbone.open(path, threads=1, **options).close()  # type: ignore[arg-type]
