"""What one process computed of a prompt's constant part, another one reads."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mse_runtime import Analyzer, kept_prefix
from mse_runtime.features.spec import Features

NOTHING = Features(None, None, 1.0, (), {})
TEXT = "Thank you so much for everything."


@pytest.fixture(autouse=True)
def every_model_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_prefix, "SMALL_MODEL", 0)
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))


def answer(task: str | None = None) -> tuple[np.ndarray, int]:
    """The scores of a fresh analyzer, and the positions it prefilled to get them."""
    with Analyzer.open("tiny", adapter="onnx", threads=1) as analyzer:
        analyzer.ready()
        backbone, fed = analyzer._backbone.result(), []
        decode = backbone._decode
        backbone._decode = lambda entries, *others: (  # type: ignore[method-assign]
            fed.append(len(entries)) or decode(entries, *others)
        )
        scores = analyzer.analyze_features(NOTHING, TEXT, task=task).answer.log_scores
        written()
        return scores, sum(fed)


def written() -> None:
    for thread in threading.enumerate():
        if thread.name == "mse-prefix":
            thread.join()


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / kept_prefix.FOLDER).glob("*"))


def test_a_second_process_computes_less_and_answers_the_same(tmp_path: Path) -> None:
    first, computed = answer()
    assert len(files(tmp_path)) == 1
    second, again = answer()
    np.testing.assert_array_equal(first, second)
    with Analyzer.open("tiny", adapter="onnx", threads=1) as analyzer:
        analyzer.analyze_features(NOTHING, TEXT)
        assert again == computed - len(analyzer._constant) < computed


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    first, computed = answer()
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100] + b"x" + whole[101:]):
        path.write_bytes(damaged)
        second, again = answer()
        np.testing.assert_array_equal(first, second)
        assert again == computed
        assert path.read_bytes() == whole


def test_other_tasks_and_settings_have_files_of_their_own(tmp_path: Path) -> None:
    answer()
    answer("emotion")
    assert len(files(tmp_path)) == 2
    with Analyzer.open("tiny", adapter="onnx", threads=2) as analyzer:
        analyzer.analyze_features(NOTHING, TEXT)
    written()
    assert len(files(tmp_path)) == 3


def test_the_oldest_files_go(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / kept_prefix.FOLDER
    for number in range(kept_prefix.KEEP + 3):
        kept_prefix._write(folder / f"{number}.kv", b"x")
    assert len(files(tmp_path)) == kept_prefix.KEEP


def test_a_cache_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, computed = answer()
    (tmp_path / "file").touch()
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "file"))
    second, again = answer()
    np.testing.assert_array_equal(first, second)
    assert again == computed


def test_a_file_that_is_read_but_not_ours_to_touch_is_used_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only cache, or another process that removes the file meanwhile."""
    first, computed = answer()

    def refused(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(kept_prefix.os, "utime", refused)
    second, again = answer()
    np.testing.assert_array_equal(first, second)
    assert again < computed


def test_smaller_passes_have_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer()
    monkeypatch.setattr("mse_runtime.loaded.SMALL_PASS", 4)
    with Analyzer.open("tiny", adapter="onnx", threads=1) as analyzer:
        analyzer.shrink()
        analyzer.analyze_features(NOTHING, TEXT)
        assert len(analyzer._constant) > analyzer._backbone.result().n_batch == 4
    written()
    assert len(files(tmp_path)) == 2


def test_a_small_model_keeps_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))
    answer()
    assert files(tmp_path) == []
    with Analyzer.open("tiny", adapter="onnx", threads=1) as analyzer:
        file = replace(analyzer.bundle.backbone.gguf, size=1 << 30)
        bundle = replace(analyzer.bundle, backbone=replace(analyzer.bundle.backbone, gguf=file))
        assert kept_prefix._pays(bundle, np.arange(3, dtype=np.int32))
