"""`mse-run` as a person runs it: output streams, exit codes, one-paragraph errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import mse_runtime

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "examples" / "happy.mp4"
TEXT = "Thank you so much for everything."
TINY = ROOT / "mse_runtime" / "data" / "bundles" / "tiny"


def mse_run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mse_runtime.cli", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "100"}, timeout=120,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one-paragraph error of a run that had to fail with `code`."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    message = done.stderr.strip()
    assert message.startswith(("mse-run: ", "Usage: ")), message
    assert "\n\n" not in message
    return message


def test_json_follows_the_published_schema() -> None:
    done = mse_run(CLIP, TEXT, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    schema = json.loads((ROOT / "mse_runtime/data/result.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document["text"] == TEXT
    assert document["bundle"]["name"] == "tiny"


def test_people_read_the_answer_first() -> None:
    done = mse_run(CLIP, TEXT, "--task", "emotion")
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split()
    names = ["neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"]
    percents = [float(word.rstrip("%")) for word in shown if word.endswith("%")]
    assert all(name in shown for name in names)
    assert shown[0] == names[percents.index(max(percents))]
    assert sum(percents) == pytest.approx(100, abs=0.5)
    assert "peak" in done.stdout


def test_features_file_gives_the_answer_of_the_clip(tmp_path: Path) -> None:
    features = tmp_path / "f.npz"
    done = mse_run(CLIP, "--features-only", "-o", features)
    assert done.returncode == 0, done.stderr
    assert "lld13" in done.stdout
    from_file = json.loads(mse_run("--features", features, TEXT, "--jsonl").stdout)
    from_clip = json.loads(mse_run(CLIP, TEXT, "--jsonl").stdout)
    assert from_file["value"] == pytest.approx(from_clip["value"], abs=1e-4)


def test_plan_alone_and_beside_the_measurement() -> None:
    alone = mse_run("--plan")
    assert alone.returncode == 0, alone.stderr
    assert "RAM" in alone.stdout
    beside = mse_run(CLIP, TEXT, "--plan", "--json")
    assert "measured" in beside.stderr
    assert "llama.cpp took" in beside.stderr
    json.loads(beside.stdout)


def test_explain_features_lists_every_column() -> None:
    done = mse_run("--explain-features")
    assert done.returncode == 0
    for name in ("lld13/1", "face167/1", "hammarbergIndex", "proxy"):
        assert name in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch", "l.csv", "-o", "o.jsonl", "--json"),
        ("--batch", "l.csv", "-o", "o.jsonl", "--start", "1"),
        (CLIP, TEXT, "-o", "x.json"),
        ("--features", "f.npz", TEXT, "--fps", "5"),
        (CLIP, TEXT, "--json", "--jsonl"),
        ("--explain-features", "--plan"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments: tuple[str, ...]) -> None:
    refused(mse_run(*arguments), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (CLIP,),
        (CLIP, TEXT, "more"),
        (CLIP, ""),
        (CLIP, TEXT, "--task", "x"),
        ("--features", "f"),
        (CLIP, TEXT, "--plot", "no/such/folder/a.png"),
        (CLIP, TEXT, "--plot", "a.gif"),
        (CLIP, "--features-only", "-o", "no/such/folder/f.npz"),
        (CLIP, "--features-only", "-o", "f.zip"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    refused(mse_run(*arguments), 2)


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    clip, listing, other = tmp_path / "c.npz", tmp_path / "c.csv", tmp_path / "other.csv"
    clip.write_bytes(CLIP.read_bytes())
    listing.write_text(f"clip,text,label\n{CLIP},hello,joy\n")
    other.write_text("mine\n")
    before = [path.read_bytes() for path in (clip, listing, other)]
    assert "what is read" in refused(mse_run(clip, "--features-only", "-o", clip), 2)
    assert "what is read" in refused(mse_run("--batch", listing, "-o", listing), 2)
    assert "not written for this list" in refused(mse_run("--batch", listing, "-o", other), 2)
    assert [path.read_bytes() for path in (clip, listing, other)] == before


def test_broken_utf8_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mse_runtime.cli", str(CLIP), b"caf\xe9 \xff"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert "UTF-8" in refused(done, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_answer_that_cannot_be_written() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mse_runtime.cli", str(CLIP), TEXT, "--jsonl"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 5
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_media(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 50)
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name in ("missing.mp4", "empty.mp4", "text.mp4", "folder.mp4"):
        message = refused(mse_run(tmp_path / name, TEXT, cwd=tmp_path), 3)
        assert name in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "code"),
    [({"x": np.zeros(3)}, 3), ({"audio": np.zeros((3, 2), np.float32)}, 4), (None, 3)],
)
def test_bad_feature_files(
    content: dict[str, np.ndarray] | None, code: int, tmp_path: Path
) -> None:
    path = tmp_path / "f.npz"
    if content is None:
        path.write_bytes(b"PK nonsense")
    else:
        np.savez(path, **content)
    assert refused(mse_run("--features", path, TEXT), code)


def test_bad_bundles(tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(TINY, folder)
        return folder

    missing_onnx = broken("missing-onnx")
    (missing_onnx / "adapter.onnx").unlink()
    truncated = broken("truncated")
    os.truncate(truncated / "backbone.gguf", 1000)
    wrong_types = broken("wrong-types")
    manifest = json.loads((wrong_types / "manifest.json").read_text("utf-8"))
    manifest["adapter"]["n_pseudo"] = "four"
    (wrong_types / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    (tmp_path / "empty").mkdir()
    messages = [
        refused(mse_run(CLIP, TEXT, "--bundle", tmp_path / name), 4)
        for name in ("missing-onnx", "truncated", "wrong-types", "empty")
    ]
    assert len(set(messages)) == 4
    assert "n_pseudo" in messages[2]


def test_require_gpu_fails_where_none_is_used() -> None:
    done = mse_run(CLIP, TEXT, "--require-gpu")
    if done.returncode == 0:
        pytest.skip("this machine has a GPU that llama.cpp uses")
    refused(done, 5)


def test_every_clip_at_hand_gets_an_answer(test_data) -> None:  # type: ignore[no-untyped-def]
    clips = sorted(p for p in test_data("clips").iterdir() if p.suffix in (".mp4", ".mov"))
    assert clips
    for clip in clips:
        done = mse_run(clip, TEXT, "--jsonl")
        assert done.returncode == 0, (clip.name, done.stderr)
        assert -3 <= json.loads(done.stdout)["value"] <= 3


def test_help_shows_examples_and_exit_codes() -> None:
    done = mse_run("--help")
    assert "Examples" in done.stdout
    assert "130 interrupted" in done.stdout


def test_messages_name_the_mistake(tmp_path: Path) -> None:
    missing = tmp_path / "none.npz"
    assert "clip first" in refused(mse_run(TEXT, CLIP), 2)
    assert "Check the path" in refused(mse_run("word " * 100, TEXT * 20), 3)
    assert "not both" in refused(mse_run(CLIP, TEXT, "--features", missing), 2)
    assert "There is no feature file" in refused(mse_run("--features", missing, TEXT), 3)
    semicolons = tmp_path / "list.csv"
    semicolons.write_text("clip;text\na.mp4;hi\n")
    done = mse_run("--batch", semicolons, "-o", tmp_path / "out.jsonl")
    assert "separated by commas" in refused(done, 2)


def test_version_needs_no_installed_package() -> None:
    done = mse_run("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"mse-run, version {mse_runtime.__version__}"
