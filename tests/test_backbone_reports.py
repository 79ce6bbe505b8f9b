"""llama.cpp's log and its progress while loading, taken in by the kernels' library or by Python."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_fixtures import toy_gguf

from mse_runtime.backbone import Backbone, library, reports
from mse_runtime.errors import BackboneError

DEBUG, INFO, WARN, ERROR, CONTINUED = 1, 2, 3, 4, 5
Say = Callable[[int, bytes], None]


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    """As where mse-kernels is not installed."""
    patch.setitem(sys.modules, "mse_kernels.reports", None)


@pytest.fixture(params=["kernels", "python"])
def say(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Say]:
    """Logs a line the way llama.cpp does."""
    if request.param == "kernels":
        pytest.importorskip("mse_kernels.reports")
    else:
        without_kernels(monkeypatch)
    lib = library.load()
    monkeypatch.setattr(reports, "_source", None)
    monkeypatch.setattr(reports, "_log", type(reports._log)(maxlen=600))
    reports.redirect_log(lib)
    source = reports._source
    assert hasattr(source, "take") == (request.param == "kernels")
    reports.log_mark()
    reports._log.clear()
    callback = ctypes.cast(getattr(source, "callback", source), lib.llama_log_callback)
    yield lambda level, text: callback(level, text, None)
    monkeypatch.undo()
    reports.redirect_log(lib)


def test_lines_are_kept_but_for_debug_lines(say: Say) -> None:
    say(INFO, b"one")
    say(CONTINUED, b" and more\n")
    say(DEBUG, b"tensor")
    say(CONTINUED, b" of no interest")
    mark = reports.log_mark()
    say(WARN, b"two \xff\n")
    say(INFO, b"")
    say(ERROR, b"three")
    assert reports.log_lines() == ["one and more", "two \ufffd", "three"]
    assert reports.log_lines(mark) == ["two \ufffd", "three"]
    assert reports.log_errors() == "two \ufffd | three"
    assert reports.log_errors(limit=1) == "three"
    assert reports.log_lines() == [
        "one and more",
        "two \ufffd",
        "three",
    ]  # asking takes nothing away


def test_the_latest_lines_are_kept_and_a_long_one_is_cut_or_whole(say: Say) -> None:
    for i in range(700):
        say(INFO, b"line %d" % i)
    say(INFO, b"x" * 10_000)
    found = reports.log_lines()
    assert len(found) == 600
    assert found[-2] == "line 699"
    assert set(found[-1]) == {"x"}
    assert len(found[-1]) in (4096, 10_000)


def test_lines_of_several_threads_are_all_there(say: Say) -> None:
    with ThreadPoolExecutor(4) as pool:
        for i in range(100):
            pool.submit(say, INFO, b"%d" % i)
            reports.log_mark()
    assert sorted(map(int, reports.log_lines())) == list(range(100))


def told(lib: Any, fractions: list[float], step: float, stop_at: float = 2.0) -> list[float]:
    found: list[float] = []

    def report(fraction: float, _user: Any) -> bool:
        found.append(fraction)
        return fraction < stop_at

    callback, user_data, _alive = reports.progress_callback(lib, report, step)
    for fraction in fractions:
        if not callback(fraction, user_data):
            break
    return found


parts = st.integers(0, 1024).map(lambda n: n / 1024)  # the same in float32


@given(st.lists(parts, min_size=1, max_size=50).map(sorted), parts)
def test_progress_is_told_in_steps_with_the_kernels_and_without(
    fractions: list[float], step: float
) -> None:
    lib = library.load()
    found = told(lib, fractions, step)
    assert found[0] == fractions[0]
    assert found.count(1.0) == fractions.count(1.0)
    inner = [fraction for fraction in found if fraction < 1]
    assert all(b - a >= step for a, b in itertools.pairwise(inner))
    assert all(any(b - a < step for a in inner if a <= b) for b in fractions if b not in found)
    with pytest.MonkeyPatch.context() as patch:
        without_kernels(patch)
        assert told(lib, fractions, step) == found


def test_progress_can_stop_the_load() -> None:
    assert told(library.load(), [0.0, 0.5, 0.75, 1.0], 0.1, stop_at=0.5) == [0.0, 0.5]


@pytest.mark.usefixtures("say")
def test_a_model_loads_and_says_why_it_does_not(tmp_path: Path) -> None:
    """What `Backbone.info` and its errors read off the log, either way."""
    path = toy_gguf(tmp_path / "m.gguf", "llama")
    seen: list[float] = []
    with Backbone.open(path, threads=1, progress=seen.append) as backbone:
        assert any("KV" in name for name in backbone.info["buffers_mib"])
    assert seen[-1] == 1.0
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(path.read_bytes().replace(b"blk.0.ffn_up", b"blk.0.ffn_uq"))
    with pytest.raises(BackboneError, match=r"cannot load.*ffn_up"):
        Backbone.open(bad, threads=1)
