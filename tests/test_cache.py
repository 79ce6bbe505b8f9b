"""The cache folder: what is remembered, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from mse_runtime import cache


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_newest_facts_are_remembered() -> None:
    for i in range(5):
        assert cache.remember("facts.json", f"k{i}", i, keep=3)
    assert cache.read_json("facts.json") == {"k2": 2, "k3": 3, "k4": 4}
    assert cache.remember("facts.json", "k2", 7, keep=3)  # new again
    assert list(cache.read_json("facts.json").items()) == [("k3", 3), ("k4", 4), ("k2", 7)]
    assert cache.remember("facts.json", "only", 1, keep=1)
    assert cache.read_json("facts.json") == {"only": 1}
    for name in ("k3", "k4", "k2"):
        assert cache.remember("facts.json", name, 1, keep=3)
    assert cache.remember("facts.json", "k4", None)
    assert cache.remember("facts.json", "never there", None)
    assert list(cache.read_json("facts.json")) == ["k3", "k2"]


def test_a_folder_that_cannot_be_written_forgets(folder: Path) -> None:
    folder.write_text("a file")
    assert not cache.remember("facts.json", "key", 1)
    assert cache.read_json("facts.json") == {}


@pytest.mark.parametrize("damaged", ["", "{", "[1]", "[" * 100_000, '{"a": 1', "\x00"])
def test_damaged_facts_are_none(folder: Path, damaged: str) -> None:
    folder.mkdir()
    (folder / "facts.json").write_text(damaged)
    assert cache.read_json("facts.json") == {}
    assert cache.remember("facts.json", "key", 1)
    assert cache.read_json("facts.json") == {"key": 1}
