"""Training: bad data, `mse-train prepare` and the commands."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from training_cases import (  # noqa: E402
    Told,
    arguments,
    emotional_data,
    environment,
)

from mse_export.training.cli import main  # noqa: E402
from mse_export.training.frozen import open_frozen  # noqa: E402
from mse_export.training.run import train  # noqa: E402
from mse_runtime.errors import (  # noqa: E402
    BackboneError,
    DeviceError,
    MediaError,
    UsageError,
)

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent


def spoil(i: int, arrays: dict[str, Any], row: dict[str, str]) -> None:
    if i == 1:
        arrays["audio"][2, 5] = np.nan
    if i == 4:
        arrays["video"] = arrays["video"][:, :9]
    if i == 7:
        row["features"] = "gone.npz"
    if i == 10:
        row["label"] = ""


def test_bad_rows_are_named_and_may_be_left_out(llama: Path, tmp_path: Path) -> None:
    folder = emotional_data(tmp_path / "data", change=spoil)
    output = tmp_path / "m.safetensors"
    with pytest.raises(MediaError) as caught:
        train(arguments(llama, folder, output), Told()())
    said = str(caught.value)
    for piece in (
        "4 of the data set's rows",
        "c1: audio features hold NaN or infinity in 1 of",
        "c4: face features have 9 columns, face167/1 has 167",
        "gone.npz",
        "c10: has no label",
        "--skip-bad",
    ):
        assert piece in said
    told = Told()
    (result,) = train(arguments(llama, folder, output, epochs=1, skip_bad=True), told())
    assert "They are left out" in told.text
    assert result.outcome.epochs == 1
    with (tmp_path / "m.safetensors.train" / "problems.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 4


def test_a_label_out_of_range(llama: Path, tmp_path: Path) -> None:
    def numbers(i: int, arrays: dict[str, Any], row: dict[str, str]) -> None:
        row["label"] = "4.5" if i == 3 else "1.5"

    folder = emotional_data(tmp_path / "data", 15, change=numbers)
    with pytest.raises(MediaError, match=r"line 5: the label 4.5 is out of range -3 to 3"):
        train(arguments(llama, folder, tmp_path / "m.safetensors"), Told()())


def test_a_class_nobody_teaches(llama: Path, tmp_path: Path) -> None:
    def only_valid(i: int, arrays: dict[str, Any], row: dict[str, str]) -> None:
        if row["label"] == "joy" and row["split"] == "train":
            row["label"] = "anger"

    folder = emotional_data(tmp_path / "data", change=only_valid)
    with pytest.raises(UsageError, match=r"class 'joy': has no sample"):
        train(arguments(llama, folder, tmp_path / "m.safetensors"), Told()())


def test_foreign_backbones(tmp_path: Path, data: Path) -> None:
    with pytest.raises(BackboneError, match="no Hugging Face folder"):
        open_frozen(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BackboneError, match="cannot be opened"):
        open_frozen(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen", "hidden_size": 8}')
    with pytest.raises(BackboneError, match=r"no \*\.safetensors"):
        open_frozen(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="--device cuda"):
            train(arguments("tiny", data, tmp_path / "m", device="cuda"), Told()())


def command(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mse_export.training.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env=environment(),
    )


def clips_csv(folder: Path, extra: list[dict[str, str]] = []) -> Path:  # noqa: B006 - read only
    """A CSV of the repository's example clip, three times, and of `extra` rows."""
    clip = ROOT / "examples" / "happy.mp4"
    if not clip.exists():
        pytest.skip("no example clip")
    rows = [
        {"clip": str(clip), "text": "a", "label": "1.5", "start": "0", "end": f"{0.6 + i / 10}"}
        for i in range(3)
    ]
    rows = [{"id": f"r{i}", **row} for i, row in enumerate(rows)] + extra
    path = folder / "clips.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["id", "clip", "text", "label", "start", "end"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_prepare_names_bad_clips_and_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"this is no film")
    bad = [
        {"id": "b1", "clip": "bad.mp4", "text": "x", "label": "0"},
        {"id": "b2", "clip": "gone.mp4", "text": "x", "label": "0"},
        {"id": "b3", "clip": "bad.mp4", "text": "x", "label": "9"},
    ]
    path = clips_csv(tmp_path, bad)
    done = command("prepare", path, "-o", tmp_path / "data", "--jobs", "2", "--range", "-3,3")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "3 clips" in done.stdout
    for piece in ("gone.mp4", "b1", "out of range"):
        assert piece in done.stderr
    from mse_runtime.datasets import load_dataset

    found = load_dataset(tmp_path / "data")
    assert sum(map(len, found.splits.values())) == 3
    assert not found.problems
    sample = next(rows for rows in found.splits.values() if rows)[0]
    assert sample.features().audio is not None


def test_prepare_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = clips_csv(tmp_path)
    out = tmp_path / "data"
    running = subprocess.Popen(
        [sys.executable, "-m", "mse_export.training.cli", "prepare", path, "-o", out, "--jobs=1"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    waited = time.monotonic()
    while not list(out.glob("features/*.npz")) and time.monotonic() - waited < 60:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("features/*.npz")}
    assert kept
    done = command("prepare", path, "-o", out, "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert f"3 clips (" in done.stdout  # noqa: F541
    assert f"{3 - len(kept)} of them new" in done.stdout
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items())


@pytest.mark.parametrize("moment", [0.0, 0.4, 1.5])
def test_prepare_ends_at_ctrl_c_whenever_it_comes(moment: float, tmp_path: Path) -> None:
    """Also while its processes are still importing; what is done is kept."""
    psutil = pytest.importorskip("psutil")
    clip = ROOT / "examples" / "happy.mp4"
    with (tmp_path / "clips.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("clip", "text", "label", "start"))
        writer.writerows((clip, "I am happy", "1", i * 0.01) for i in range(200))
    command = [sys.executable, "-m", "mse_export.training.cli", "prepare", "clips.csv", "-o", "out"]
    process = subprocess.Popen(
        [*command, "--jobs=2", "--range=-3,3"],
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not psutil.Process(process.pid).children():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said


def test_the_command_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--backbone", "tiny", "--dataset", "mine", "--data", data, "--epochs", "1", "--json"]
    words += ["-o", tmp_path / "m.safetensors"]
    monkeypatch.setattr(sys, "argv", ["mse-train", *map(str, words)])
    main()
    out, err = capsys.readouterr()
    assert json.loads(out)["runs"][0]["epochs"] == 1
    assert "epoch   1" in err
    assert err.startswith("mse-train: loading PyTorch")  # seconds pass before the first epoch


def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mse-train", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().err

    code, said = refused("--backbone", "tiny")
    assert code == 2
    assert "Missing --dataset, --data, -o" in said
    code, said = refused(
        "--backbone", "tiny", "--dataset", "x", "--data", tmp_path / "no", "-o", tmp_path / "m"
    )
    assert code == 3
    assert said.startswith("mse-train: There is no data set at")
    code, said = refused("prepare", tmp_path / "no.csv", "-o", tmp_path / "d")
    assert code == 3
    assert "cannot be read" in said
    code, said = refused("prepare", tmp_path / "no.csv", "-o", tmp_path / "d", "--range", "3")
    assert code == 2
    assert refused("--layout", "sideways")[0] == 2
