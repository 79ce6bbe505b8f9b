"""The built-in bundle as it is shipped, and the command that makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mse_runtime.analyzer import Analyzer
from mse_runtime.bundle import load_bundle

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "mse_runtime" / "data" / "bundles" / "tiny"
EXAMPLES = ROOT / "examples"
MEETING = "The meeting is on Monday at ten."
GOOD_DAY = "It was a good day and I like the new house."


def test_the_bundle_is_small_whole_and_has_a_card() -> None:
    bundle = load_bundle(TINY)
    files = [p for p in TINY.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12_000_000
    assert set(bundle.tasks) == {"sentiment", "emotion"}
    assert {p.name for p in files} == {
        "manifest.json",
        "adapter.onnx",
        "adapter.safetensors",
        "backbone.gguf",
        "README.md",
    }


def test_examples_are_small() -> None:
    clips = sorted(EXAMPLES.glob("*.mp4"))
    assert len(clips) >= 3
    assert all(c.stat().st_size < 200_000 for c in clips)


@pytest.fixture(scope="module")
def analyzer() -> Iterator[Analyzer]:
    with Analyzer.open(TINY, threads=1) as opened:
        if not opened.bundle.trained:
            pytest.skip("the built-in bundle is not trained yet")
        yield opened


def value(analyzer: Analyzer, clip: str, text: str) -> float:
    found = analyzer.analyze(EXAMPLES / f"{clip}.mp4", text, task="sentiment").value
    assert found is not None
    return float(found)


def test_a_smile_and_a_frown_come_out_apart(analyzer: Analyzer) -> None:
    assert value(analyzer, "smile", MEETING) > value(analyzer, "frown", MEETING) + 0.5


def test_a_lively_and_a_dull_voice_come_out_apart(analyzer: Analyzer) -> None:
    assert value(analyzer, "lively", GOOD_DAY) > value(analyzer, "dull", GOOD_DAY) + 0.15


def test_words_count(analyzer: Analyzer) -> None:
    good = value(analyzer, "lively", "I love this, it is wonderful!")
    assert good > value(analyzer, "lively", "I hate this, it is terrible!") + 0.5


def test_the_examples_are_what_they_are_called(analyzer: Analyzer) -> None:
    happy = "I am really happy with how this turned out. Thank you so much for everything."
    sad = "I do not want to talk about it. It was a terrible day."
    assert value(analyzer, "happy", happy) > 0.5
    assert value(analyzer, "sad", sad) < -0.5
    assert analyzer.analyze(EXAMPLES / "happy.mp4", happy, task="emotion").label == "joy"
    # Which negative emotion it is, the drawn face often does not tell.
    chances = analyzer.analyze(EXAMPLES / "sad.mp4", sad, task="emotion").probabilities
    assert sum(chances[name] for name in ("sadness", "anger", "fear", "disgust")) > 0.5


def test_a_missing_modality_is_no_error(analyzer: Analyzer) -> None:
    from mse_runtime.features.extract import extract

    found = extract(EXAMPLES / "happy.mp4", threads=1)
    for cut in ({"audio": None}, {"face": None}, {"audio": None, "face": None}):
        answer = analyzer.analyze_features(dataclasses.replace(found, **cut), "It is good.")
        assert np.isfinite(answer.value)


def test_the_command_goes_through_every_stage(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("vaderSentiment")
    import shutil

    if shutil.which("espeak-ng") is None:
        pytest.skip("no espeak-ng")
    from click.testing import CliRunner

    from mse_export.training.tiny.cli import tiny

    out, work = tmp_path / "bundle", tmp_path / "work"
    arguments = ["--scale", "small", "-o", str(out), "--work", str(work)]
    # Killed after a stage, it goes on from there.
    first = CliRunner().invoke(tiny, [*arguments, "--until", "slots"], catch_exceptions=False)
    assert first.exit_code == 0
    before = (work / "slots.pt").read_bytes()
    result = CliRunner().invoke(tiny, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert (work / "slots.pt").read_bytes() == before
    bundle = load_bundle(out)
    assert not bundle.trained
    assert "untrained" in bundle.training.note or "mean nothing" in bundle.training.note
    card = (out / "README.md").read_text(encoding="utf-8")
    parts = ("| text only (both media missing) |", "held-out generator", "who show less", "Time: ")
    for part in parts:
        assert part in card
    assert "Ablations: not run" in card
    again = CliRunner().invoke(tiny, [*arguments, "--until", "ablate"], catch_exceptions=False)
    assert again.exit_code == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| no TGM |" in card
    assert "Ablations: not run" not in card
