"""Several clips of a batch in one pass: their answers, how many are chosen, what goes wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mse_runtime import Analyzer, cache
from mse_runtime.batch import together
from mse_runtime.batch.journal import Journal
from mse_runtime.batch.rows import Row, read_rows
from mse_runtime.batch.run import answers, run
from mse_runtime.batch.together import SIZES, TRIES, GroupSize
from mse_runtime.errors import BackboneError, DecodeError, UsageError
from mse_runtime.features.npz import load_npz
from mse_runtime.features.pool import FeaturePool
from mse_runtime.features.spec import Features

TOLERANCE = 5e-4  # of a probability (docs/reliability.md)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def analyzer() -> Iterator[Analyzer]:
    with Analyzer.open("tiny", threads=1, adapter="onnx") as opened:
        yield opened


@pytest.fixture(scope="module")
def pool() -> Iterator[FeaturePool]:
    with FeaturePool(1, timeout=60, memory_mb=2048) as made:
        yield made


def make_rows(folder: Path, count: int, widths: dict[int, int] | None = None) -> list[Row]:
    """Rows of random features; `widths` gives some of them sound features of another width."""
    table = [["id", "features", "text", "task"]]
    for i in range(count):
        rng = np.random.default_rng(i)
        audio = rng.normal(size=(20 + i, (widths or {}).get(i, 13))).astype(np.float32)
        face = rng.normal(size=(10, 167)).astype(np.float32)
        np.savez(folder / f"{i}.npz", audio=audio, video=face)
        text = f"This is sentence number {i}" + " and it goes on" * (i % 4)
        table.append([f"r{i}", f"{i}.npz", text, "emotion" if i % 5 == 3 else ""])
    with (folder / "list.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(table)
    return read_rows(folder / "list.csv")


def answered(analyzer: Analyzer, rows: list[Row], pool: FeaturePool, out: Path) -> list[Any]:
    with Journal(out, rows) as journal:
        run(analyzer, rows, journal, pool)
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def alone(analyzer: Analyzer, row: Row) -> dict[str, float]:
    found = analyzer.analyze_features(load_npz(row.source), row.text, task=row.task)
    return found.answer.probabilities


@pytest.mark.parametrize("layout", ["own", "published"])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_many_are_each_alone(
    analyzer: Analyzer, tmp_path: Path, count: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "published":  # most of the prompt behind the pseudo tokens
        monkeypatch.setattr("mse_runtime.analyzer._constant", lambda prompt: prompt.early[:0])
    rows = make_rows(tmp_path, count)
    clips = [(load_npz(row.source), row.text, row.id) for row in rows]
    for task in analyzer.bundle.tasks:
        found = analyzer.analyze_many(clips, task=task)
        assert [prediction.clip for prediction in found] == [row.id for row in rows]
        for prediction, (features, text, _) in zip(found, clips, strict=True):
            expected = analyzer.analyze_features(features, text, task=task)
            assert prediction.answer.probabilities == pytest.approx(
                expected.answer.probabilities, abs=TOLERANCE
            )
            assert prediction.to_dict().keys() == expected.to_dict().keys()
    backbone = analyzer._backbone.result()
    assert [backbone.length(seq) for seq in range(1, backbone.n_seq_max)] == [0] * (
        backbone.n_seq_max - 1
    )


def test_more_than_fit_into_a_pass_take_several(
    analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(tmp_path, 7)
    clips: list[tuple[Features, str, str | None]] = [
        (load_npz(row.source), row.text, None) for row in rows
    ]
    whole = analyzer.analyze_many(clips)
    counts: list[int] = []
    one_pass = analyzer._answer_together

    def counted(name: str, task: Any, some: Any) -> Any:
        counts.append(len(some))
        return one_pass(name, task, some)

    monkeypatch.setattr(analyzer, "_answer_together", counted)
    monkeypatch.setattr("mse_runtime.analyzer.PASS", 3 * analyzer.new_positions(rows[3].text))
    cut = analyzer.analyze_many(clips)
    assert sum(counts) == 7
    assert max(counts) >= 3
    assert len(counts) >= 3
    for one, other in zip(cut, whole, strict=True):
        assert one.value == pytest.approx(other.value, abs=0.01)


def test_a_group_does_not_wait_for_slow_features(
    analyzer: Analyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows in hand when somebody presses Ctrl-C are those whose features are there."""
    rows = make_rows(tmp_path, 6)
    never: Future[Features] = Future()
    features = [load_npz(row.source) for row in rows]

    def slow(row: Row, *_: Any) -> Future[Features]:
        if row.index == 3:
            return never
        ready: Future[Features] = Future()
        ready.set_result(features[row.index])
        return ready

    monkeypatch.setattr("mse_runtime.batch.run._features", slow)
    size = GroupSize(fake())
    monkeypatch.setattr(GroupSize, "next", 4)
    pool: Any = SimpleNamespace(workers=1)
    groups = answers(analyzer, rows, pool, size=size)
    assert [entry["id"] for entry in next(groups)] == ["r0", "r1", "r2"]
    never.set_result(features[3])
    assert [entry["id"] for entry in next(groups)] == ["r3", "r4", "r5"]


def test_rows_that_fail_now_and_then_do_not_end_the_groups(
    analyzer: Analyzer, pool: FeaturePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backbone may refuse one row's pseudo tokens: that says nothing about the others."""
    rows = make_rows(tmp_path, 12)
    bad = {rows[2].text, rows[6].text, rows[10].text}
    usual, sizes = analyzer._answer_together, []

    def refusing(name: str, task: Any, clips: Any) -> Any:
        if bad & {text for _, text, _ in clips}:
            raise BackboneError("Embedding row 0 holds NaN (simulated)")
        sizes.append(len(clips))
        return usual(name, task, clips)

    monkeypatch.setattr(analyzer, "_answer_together", refusing)
    monkeypatch.setattr(GroupSize, "next", 2)
    found = answered(analyzer, rows, pool, tmp_path / "out.jsonl")
    assert not any("error" in entry for entry in found)  # alone, each of them is answered
    assert sizes == [2, 1, 2, 1, 1]  # pairs but for refused ones and those of two tasks


def test_nothing_and_nonsense(analyzer: Analyzer, tmp_path: Path) -> None:
    assert analyzer.analyze_many([]) == []
    features = load_npz(make_rows(tmp_path, 1)[0].source)
    with pytest.raises(UsageError, match="empty"):
        analyzer.analyze_many([(features, "hello", None), (features, " ", None)])
    with pytest.raises(UsageError, match="no task"):
        analyzer.analyze_many([(features, "hello", None)], task="other")


def test_a_batch_tries_all_sizes_and_answers_as_one_by_one(
    analyzer: Analyzer, pool: FeaturePool, tmp_path: Path
) -> None:
    rows = make_rows(tmp_path, sum(SIZES) * TRIES + 3)
    found = answered(analyzer, rows, pool, tmp_path / "out.jsonl")
    assert [entry["id"] for entry in found] == [row.id for row in rows]
    assert [entry["task"] for entry in found[:4]] == ["sentiment"] * 3 + ["emotion"]
    for entry, row in zip(found, rows, strict=True):
        assert entry["probabilities"] == pytest.approx(alone(analyzer, row), abs=TOLERANCE)
    (chosen,) = cache.read_json(together.FILE).values()
    assert chosen in SIZES
    assert GroupSize(analyzer).next == chosen


def test_a_row_that_fails_does_not_take_its_group_along(
    analyzer: Analyzer, pool: FeaturePool, tmp_path: Path
) -> None:
    rows = make_rows(tmp_path, 12, widths={5: 12, 6: 12})
    (tmp_path / "9.npz").unlink()
    found = answered(analyzer, rows, pool, tmp_path / "out.jsonl")
    assert [i for i, entry in enumerate(found) if "error" in entry] == [5, 6, 9]
    for i in (4, 7, 8, 10, 11):
        assert found[i]["probabilities"] == pytest.approx(alone(analyzer, rows[i]), abs=TOLERANCE)


@pytest.mark.parametrize(("error", "tries"), [(DecodeError, 1), (BackboneError, 2)])
def test_no_memory_for_a_group_is_no_rows_fault(
    analyzer: Analyzer, pool: FeaturePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: type[Exception], tries: int,
) -> None:  # fmt: skip
    rows, calls = make_rows(tmp_path, 6), []

    def short(*_args: Any, **_kwargs: Any) -> Any:
        calls.append(1)
        raise error("no (simulated)")

    monkeypatch.setattr(analyzer, "_answer_together", short)
    found = answered(analyzer, rows, pool, tmp_path / "out.jsonl")
    assert not any("error" in entry for entry in found)
    assert len(calls) == tries  # afterwards clip by clip
    assert cache.read_json(together.FILE) == {}


def fake(low_memory: bool = False, offloaded: int = 0) -> Any:
    info = dict.fromkeys(("build", "device", "threads", "product"), 1)
    info["offloaded_layers"] = offloaded
    bundle = SimpleNamespace(
        tasks={}, backbone=SimpleNamespace(gguf=SimpleNamespace(sha256="0" * 64))
    )
    plan = SimpleNamespace(ram=1_000_000)
    return SimpleNamespace(bundle=bundle, backbone_info=info, low_memory=low_memory, plan=plan)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0, 2: 0.99, 4: 0.98, 8: 0.97}, 1),  # not worth it
        ({1: 1.0, 2: 0.6, 4: 0.41, 8: 0.4}, 4),
        ({1: 1.0, 2: 0.9, 4: 0.6, 8: 0.3}, 8),
        ({1: 0.2, 2: 0.9, 4: 0.6, 8: 0.3}, 1),
    ],
)
def test_the_smallest_size_that_is_about_the_fastest(
    seconds: dict[int, float], chosen: int
) -> None:
    size, tried = GroupSize(fake()), []
    for turn in range(len(SIZES) * TRIES):
        tried.append(size.next)
        slow = 10.0 if turn < len(SIZES) else 1.0  # room is made in the first turn
        size.took(size.next, slow * seconds[size.next])
    assert sorted(tried) == sorted(SIZES * TRIES)
    assert size.next == chosen
    size.took(1, 1e-9)
    assert size.next == chosen
    assert GroupSize(fake()).next == chosen  # remembered
    assert GroupSize(fake(low_memory=True)).next == 1
    assert GroupSize(fake(offloaded=3)).next == 1


def test_little_memory_means_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mse_runtime.memory.available", lambda: 200_000)
    assert {GroupSize(fake()).next for _ in range(9)} == {1}
    monkeypatch.setattr("mse_runtime.memory.available", lambda: 0)  # the system does not say
    cache.write_json(together.FILE, {together._key(fake()): 8})
    assert GroupSize(fake()).next == 8


def test_what_was_remembered_may_be_anything() -> None:
    for nonsense in ("8", 3, None, [4], {"a": 1}, 1e9):
        cache.write_json(together.FILE, {together._key(fake()): nonsense})
        assert GroupSize(fake()).next in SIZES
