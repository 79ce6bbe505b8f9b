"""Training: whole runs, and what can go wrong in the middle of one."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from training_cases import (  # noqa: E402
    EMOTIONS,
    Told,
    arguments,
    emotional_data,
)

from mse_export import profiles  # noqa: E402
from mse_export.checkpoint import read_checkpoint  # noqa: E402
from mse_export.training import trainer as trainer_room  # noqa: E402
from mse_export.training.about import profile_from_metadata  # noqa: E402
from mse_export.training.progress import Reporter  # noqa: E402
from mse_export.training.run import Arguments, train  # noqa: E402
from mse_export.training.state import RunFolder, write_checkpoint  # noqa: E402
from mse_runtime.errors import (  # noqa: E402
    DeviceError,
    MSEError,
    UsageError,
)

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_learns_and_says_what_it_was(llama: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine.safetensors"
    told = Told()
    (result,) = train(arguments(llama, data, output, epochs=6, lr=1e-2), told())
    losses = [row["train_loss"] for row in result.outcome.history]
    assert losses[-1] < losses[0] - 0.5  # as far as a random language model can be steered
    assert set(result.test) == {"acc", "weight_F1"}
    checkpoint = read_checkpoint(output)
    profile = profile_from_metadata(checkpoint.metadata)
    assert profile is not None
    assert [label.name for label in profile.tasks["emotion"].labels] == list(EMOTIONS)
    mean = profile.features.audio.mean
    assert mean is not None
    assert mean[2] == pytest.approx(4.0, abs=0.3)  # the training split's statistics
    assert checkpoint.metadata["training"]["status"] == "trained"
    with (tmp_path / "mine.safetensors.train" / "curves.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(len(losses))]
    assert (tmp_path / "mine.safetensors.train" / "curves.png").stat().st_size > 5000
    assert "6 valid" in told.lines[0]


def test_a_published_pickle_in_the_published_layout(llama: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def table(count: int) -> dict[str, Any]:
        audio = rng.normal(size=(count, 9, 74)).astype(np.float32)
        audio[0, 0, 0] = -np.inf  # MOSEI has them; the published loader blanks them
        return {
            "raw_text": [f"it was {i} times good" for i in range(count)],
            "audio": audio,
            "vision": rng.normal(size=(count, 5, 35)).astype(np.float32),
            "audio_lengths": rng.integers(1, 10, count),
            "vision_lengths": rng.integers(1, 6, count),
            "regression_labels": rng.uniform(-3, 3, count).astype(np.float32),
            "id": [f"v{rng.integers(10**9)}" for _ in range(count)],
        }

    pickled = tmp_path / "unaligned_50.pkl"
    pickled.write_bytes(pickle.dumps({"train": table(12), "valid": table(4), "test": table(4)}))
    told = Told()
    output = tmp_path / "mosei.safetensors"
    plain = Arguments(str(llama), "mosei", pickled, output, "published", epochs=1, parity=True)
    (result,) = train(plain, told())
    assert "llama/mosei: batch 8, lr 5e-05" in told.text
    assert 0 <= result.test["Has0_acc_2"] <= 1
    checkpoint = read_checkpoint(output)
    profile = profile_from_metadata(checkpoint.metadata)
    assert profile is not None
    expected = profiles.published("llama", "mosei", 0)
    assert profile.tasks == expected.tasks
    assert (profile.text, profile.features) == (expected.text, expected.features)
    assert (checkpoint.dims.audio_hidden, checkpoint.dims.video_hidden) == (64, 32)


def test_regression_on_the_built_in_backbone(tmp_path: Path) -> None:
    def numbers(i: int, arrays: dict[str, Any], row: dict[str, str]) -> None:
        row["label"] = f"{(-2.4, 0.3, 2.1)[i % 3]}"

    folder = emotional_data(tmp_path / "data", 15, change=numbers)
    told = Told()
    (result,) = train(arguments("tiny", folder, tmp_path / "t.pth", epochs=1), told())
    assert result.outcome.metric == "MAE"
    assert set(result.test) >= {"MAE", "Corr", "Mult_acc_7"}
    state = torch.load(tmp_path / "t.pth", weights_only=True)
    assert all(name.startswith("Model.") for name in state)  # the published format
    about = json.loads((tmp_path / "t.json").read_text("utf-8"))
    assert about["profile"]["layout"] == "pseudo-last"


def test_several_seeds_keep_the_best(llama: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    results = train(arguments(llama, data, output, epochs=1, seeds=(1, 2)), Told()())
    best = max(results, key=lambda r: r.outcome.best)
    assert output.read_bytes() == best.checkpoint.read_bytes()
    first, second = (read_checkpoint(r.checkpoint).state for r in results)
    name = "audio_LSTM.linear.weight"
    assert not torch.equal(first[name], second[name])


def test_a_killed_run_goes_on_to_the_same_numbers(llama: Path, data: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    recipe = {"epochs": 4, "early_stop": 9}
    (straight,) = train(arguments(llama, data, whole, **recipe), Told()())

    class Killed(BaseException):
        pass

    class Killer(Told):
        def __call__(self) -> Reporter:
            return Reporter(self.lines.append, self.step)

        def step(self, what: str, done: int, total: int) -> None:
            if what == "epoch" and done == 2 and any("epoch   2" in t for t in self.lines):
                raise Killed  # in the middle of the third epoch

    with pytest.raises(Killed):
        train(arguments(llama, data, broken, **recipe), Killer()())
    assert not list(broken.parent.rglob("*.partial"))
    read_checkpoint(broken)  # the best of two epochs is there and whole
    told = Told()
    (resumed,) = train(arguments(llama, data, broken, **recipe), told())
    assert "Going on after epoch 2" in told.text
    assert [row["train_loss"] for row in resumed.outcome.history] == [
        row["train_loss"] for row in straight.outcome.history
    ]
    a, b = read_checkpoint(whole).state, read_checkpoint(broken).state
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Once more: nothing is left to do, nothing changes.
    (again,) = train(arguments(llama, data, broken, **recipe), told())
    assert again.outcome.epochs == 4
    with pytest.raises(UsageError, match=r"seed = 1111, not 7.*--fresh"):
        train(arguments(llama, data, broken, seeds=(7,), **recipe), told())
    train(arguments(llama, data, broken, seeds=(7,), fresh=True, epochs=1), told())


def test_out_of_memory_in_the_middle(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First activations are recomputed, then fewer samples at a time; the result stays the same."""
    (plain,) = train(arguments(llama, data, tmp_path / "a.safetensors"), Told()())
    real = trainer_room.loss_sum

    def scarce(frozen: Any, adapter: Any, batch: Any) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(frozen, adapter, batch)

    monkeypatch.setattr(trainer_room, "loss_sum", scarce)
    told = Told()
    (scarcely,) = train(arguments(llama, data, tmp_path / "b.safetensors"), told())
    assert "activations are recomputed" in told.text
    assert "2 samples at a time" in told.text
    for a, b in zip(plain.outcome.history, scarcely.outcome.history, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)

    calls = 0

    def never_after_one_epoch(frozen: Any, adapter: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 TB")
        return real(frozen, adapter, batch)

    monkeypatch.setattr(trainer_room, "loss_sum", never_after_one_epoch)
    with pytest.raises(DeviceError, match=r"state of epoch 1 is kept.*4bit"):
        train(arguments(llama, data, tmp_path / "c.safetensors"), Told()())
    monkeypatch.setattr(trainer_room, "loss_sum", real)
    told = Told()
    train(arguments(llama, data, tmp_path / "c.safetensors"), told())
    assert "Going on after epoch 1" in told.text


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk."""
    resource = pytest.importorskip("resource")
    folder, output = RunFolder(tmp_path / "m.safetensors"), tmp_path / "m.safetensors"
    folder.make()
    folder.save_state({"settings": {}, "step": 1})
    write_checkpoint(output, {"a": torch.zeros(3)}, {"training": {}})
    before = output.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(MSEError, match=r"state.pt cannot be written.*kept"):
            folder.save_state({"settings": {}, "weights": torch.zeros(1 << 18)})
        with pytest.raises(MSEError, match=r"m.safetensors cannot be written"):
            write_checkpoint(output, {"a": torch.zeros(1 << 18)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert output.read_bytes() == before
    state = folder.load_state({})
    assert state is not None
    assert state["step"] == 1
    assert not list(tmp_path.rglob("*.partial"))
    (folder.state).write_bytes(b"half a file")
    with pytest.raises(UsageError, match=r"damaged.*--fresh"):
        folder.load_state({})


def test_another_runtime_error_is_not_taken_for_memory(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(trainer_room, "loss_sum", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train(arguments(llama, data, tmp_path / "a.safetensors"), Told()())


def test_divergence_is_named(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer_room.loss_sum
    monkeypatch.setattr(trainer_room, "loss_sum", lambda *a: real(*a) * float("nan"))
    with pytest.raises(MSEError, match=r"diverged.*lower --lr"):
        train(arguments(llama, data, tmp_path / "a.safetensors"), Told()())
