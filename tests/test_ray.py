"""The batch on a real local Ray: two workers, one of them killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'mse-runtime[ray]')")
pytest.importorskip("ray.data", reason="Ray Data is not installed (mse-runtime[ray])")

from mse_runtime import Analyzer  # noqa: E402
from mse_runtime.errors import BundleError, UsageError  # noqa: E402
from mse_runtime.ray import predict  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "examples" / "smile.mp4"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray with room for two workers. Its folder's path has to be short: it holds sockets."""
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "export", "kernels"))
    cache = str(tmp_path_factory.mktemp("cache"))
    ray.init(
        num_cpus=3, num_gpus=0, include_dashboard=False, log_to_driver=False,
        object_store_memory=100 << 20, configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "MSE_CACHE": cache}},
    )  # fmt: skip
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = 120  # both workers are there before the first row
    yield
    ray.shutdown()


@pytest.fixture
def features(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "f.npz",
        audio=rng.normal(size=(40, 13)).astype(np.float32),
        video=rng.normal(size=(10, 167)).astype(np.float32),
    )
    return tmp_path / "f.npz"


def workers() -> set[int]:
    """Process ids of Ray's workers that hold a bundle."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Worker" in "".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_loses_and_repeats_no_row(features: Path) -> None:
    rows = [
        {"id": f"r{i}", "features": features.name, "text": f"This is sentence number {i}."}
        for i in range(200)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=40)
    answered = iter(predict(dataset, workers=2, batch_size=5, folder=features.parent).iter_rows())
    found = [next(answered)]
    before = workers()
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    seen: set[int] = set()
    for row in answered:
        found.append(row)
        if not len(found) % 10:
            seen |= workers()
    assert seen - before, "no worker was started in place of the dead one: it died too late"
    assert Counter(row["id"] for row in found) == Counter(row["id"] for row in rows)
    assert not any(row["error"] for row in found)
    with Analyzer.open("tiny", threads=1) as analyzer:  # the answers of one process
        from mse_runtime.features.npz import load_npz

        by_id = {row["id"]: row for row in found}
        for row in rows[::40]:
            alone = analyzer.analyze_features(load_npz(features), row["text"]).to_dict()
            assert by_id[row["id"]]["value"] == pytest.approx(alone["value"], abs=1e-3)
            found_there = json.loads(by_id[row["id"]]["result"])["probabilities"]
            assert found_there == pytest.approx(alone["probabilities"], abs=1e-3)


@pytest.mark.usefixtures("cluster")
def test_errors_are_rows_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    given: list[dict[str, Any]] = [
        {"id": "clip", "clip": str(CLIP), "text": "I love it.", "start": 0.5, "end": 1.5},
        {"id": "missing", "clip": "missing.mp4", "text": "hello"},
        {"id": "no clip", "clip": None, "text": "hello"},
        {"id": "broken", "clip": "text.mp4", "text": "hello"},
        {"id": "no text", "clip": str(CLIP), "text": None},
        {"id": "no task", "clip": str(CLIP), "text": "hello", "task": "nothing", "end": 0.5},
        {"id": "emotion", "clip": str(CLIP), "text": "hello", "task": "emotion", "end": 0.5},
        {"id": None, "clip": str(CLIP), "text": "hello", "end": 0.5},
    ]
    names = ("id", "clip", "text", "task", "start", "end")
    rows = [{name: row.get(name) for name in names} for row in given]
    answered = predict(
        ray.data.from_items(rows), workers=1, folder=tmp_path, fps=2.0, batch_size=3
    ).take_all()
    by_id = {row["id"]: row for row in answered}
    assert set(by_id) == {row["id"] or "" for row in rows}
    failed = {name for name, row in by_id.items() if row["error"]}
    assert failed == {"missing", "no clip", "broken", "no text", "no task"}
    for name, row in by_id.items():
        document = json.loads(row["result"])
        assert document["id"] == name
        assert ("error" in document) == (name in failed)
        assert (row["label"] is None) == (name in failed)
    assert by_id["emotion"]["task"] == "emotion"
    assert by_id["missing"]["clip"] == str(tmp_path / "missing.mp4")


@pytest.mark.usefixtures("cluster")
def test_what_no_row_can_mend_is_said_at_once() -> None:
    good = ray.data.from_items([{"id": "a", "clip": "a.mp4", "text": "hello"}])
    with pytest.raises(UsageError, match="needs the columns id, text"):
        predict(ray.data.from_items([{"clip": "a.mp4", "text": "hello"}]))
    with pytest.raises(UsageError, match="has no task 'nothing'"):
        predict(good, task="nothing")
    with pytest.raises(BundleError):
        predict(good, "no-such-bundle")


@pytest.mark.parametrize("options", [{"num_cpus": 0}, {"num_cpus": 0.5}, {"workers": 0}])
def test_counts_that_no_worker_could_start_with(options: dict[str, Any]) -> None:
    dataset: Any = None  # refused before it is looked at
    with pytest.raises(UsageError, match=f"{next(iter(options))} must be a whole number"):
        predict(dataset, **options)
