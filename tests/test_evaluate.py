"""`mse-eval` on the built-in bundle and made-up features: the runtime alone, no PyTorch."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mse_runtime import evaluate
from mse_runtime.bundle import load_bundle
from mse_runtime.calibration import fit_temperature, probabilities
from mse_runtime.datasets import DataSetInfo, Sample, held_features
from mse_runtime.errors import UsageError
from mse_runtime.evaluation import (
    Scored,
    choose_task,
    class_indices,
    label_columns,
    report,
    store_temperature,
)
from mse_runtime.metrics import classification_metrics

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "mse_runtime" / "data" / "bundles" / "tiny"
EMOTIONS = ("anger", "joy", "neutral")
TEXTS = ("I am so happy today", "this makes me angry", "the table is in the room")


def data_folder(folder: Path, count: int = 12, kind: str = "classification") -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("id", "features", "text", "label", "split"))
        for i in range(count):
            np.savez(
                folder / f"{i}.npz",
                audio=rng.normal(size=(5 + i, 13)).astype(np.float32),
                video=rng.normal(size=(4, 167)).astype(np.float32),
            )
            label = EMOTIONS[i % 3] if kind == "classification" else f"{(-2.2, 0.0, 1.4)[i % 3]}"
            split = "valid" if i % 2 else "test"
            writer.writerow((f"s{i}", f"{i}.npz", TEXTS[i % 3], label, split))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("eval") / "mine")


@pytest.fixture
def own_bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


def mse_eval(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *words: str | Path,
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mse-eval", *map(str, words), "--threads", "1"])
    try:
        evaluate.main()
        code = 0
    except SystemExit as done:
        code = int(done.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


Run = tuple[pytest.CaptureFixture[str], pytest.MonkeyPatch]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return capsys, monkeypatch


def test_json_and_predictions_agree(run: Run, data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.csv"
    code, out, err = mse_eval(*run, "--data", data, "--json", "--predictions", answers)
    assert code == 0, err
    document = json.loads(out)
    assert (document["dataset"], document["split"], document["task"]) == ("mine", "test", "emotion")
    (found,) = document["runs"]
    assert found["n"] == 6
    with answers.open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["id"] for row in rows] == [f"s{i}" for i in range(0, 12, 2)]
    labels = document["labels"]
    assert [labels[int(row["truth"])] for row in rows] == [EMOTIONS[i % 3] for i in range(0, 12, 2)]
    metrics = classification_metrics(
        [float(row["predicted"]) for row in rows], [float(row["truth"]) for row in rows]
    )
    assert found["metrics"] == metrics
    for row in rows:
        chances = [float(row[f"p_{label}"]) for label in labels]
        assert sum(chances) == pytest.approx(1, abs=1e-4)
        assert int(row["predicted"]) == int(np.argmax(chances))
    assert np.sum(found["confusion"]) == 6


def test_answers_are_those_of_the_analyzer(run: Run, data: Path) -> None:
    from mse_runtime.analyzer import Analyzer
    from mse_runtime.features.extract import load_npz

    code, out, _ = mse_eval(*run, "--data", data, "--json", "--limit", "2")
    assert code == 0
    confusion = np.array(json.loads(out)["runs"][0]["confusion"])
    labels = json.loads(out)["labels"]
    expected = np.zeros_like(confusion)
    with Analyzer.open("tiny", threads=1) as analyzer:
        for i in (0, 2):
            answer = analyzer.analyze_features(
                load_npz(data / f"{i}.npz"), TEXTS[i % 3], task="emotion"
            )
            expected[labels.index(EMOTIONS[i % 3]), labels.index(answer.label)] += 1
    assert (confusion == expected).all()


def test_quantisations_in_one_table(run: Run, data: Path) -> None:
    code, out, err = mse_eval(*run, "--data", data, "--compare", "f16,q8_0,q4_0")
    assert code == 0, err
    for piece in ("weight_F1", "ECE before", "ECE after", "q8_0", "q4_0", "answers changed"):
        assert piece in out
    assert "Confusion" in out
    code, out, _ = mse_eval(*run, "--data", data, "--compare", "q8_0,q4_0", "--json")
    runs = json.loads(out)["runs"]
    sizes = {row["name"]: row["gguf_bytes"] for row in runs}
    assert sizes["q4_0"] < sizes["q8_0"] <= runs[0]["gguf_bytes"]
    assert {row["n"] for row in runs} == {6}
    code, _, err = mse_eval(*run, "--data", data, "--compare", "q5_9")
    assert code == 2
    assert "'q5_9'" in err


def test_regression_and_published_parity(run: Run, tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "scale", 6, "regression")
    code, out, err = mse_eval(*run, "--data", folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["task"] == "sentiment"
    assert "Mult_acc_7" in found["runs"][0]["metrics"]
    assert found["labels"] == ["negative", "neutral", "positive"]
    code, out, err = mse_eval(*run, "--data", folder, "--json", "--parity", "published")
    assert code == 0, err
    assert json.loads(out)["parity"] == "published"
    code, out, err = mse_eval(*run, "--data", folder)
    assert code == 0, err
    assert "Has0_acc_2" in out


def test_the_fitted_temperature_is_stored_and_used(run: Run, data: Path, own_bundle: Path) -> None:
    from mse_runtime.analyzer import Analyzer
    from mse_runtime.features.extract import load_npz

    words = ("--bundle", own_bundle, "--data", data, "--fit-temperature", "--json")
    code, out, err = mse_eval(*run, *words, "--split", "valid", "--write")
    assert code == 0, err
    assert "flatters" in err  # fitted and reported on the same split
    fitted = json.loads(out)["runs"][0]["calibration"]
    assert fitted["nll_after"] <= fitted["nll_before"] + 1e-9
    bundle = load_bundle(own_bundle)
    assert bundle.tasks["emotion"].temperature == pytest.approx(fitted["temperature"], abs=1e-4)
    assert bundle.tasks["sentiment"].temperature == load_bundle(TINY).tasks["sentiment"].temperature
    assert not list(own_bundle.glob("*.partial"))
    # From now on answers are calibrated without being asked, and so is the report.
    code, out, _ = mse_eval(*run, "--bundle", own_bundle, "--data", data, "--json")
    assert json.loads(out)["runs"][0]["calibration"]["temperature"] == pytest.approx(
        fitted["temperature"], abs=1e-4
    )
    store_temperature(bundle, "emotion", 2.5)
    features = load_npz(data / "0.npz")
    with Analyzer.open(own_bundle, threads=1) as hot, Analyzer.open(TINY, threads=1) as plain:
        warm = hot.analyze_features(features, TEXTS[0], task="emotion").probabilities
        before = plain.analyze_features(features, TEXTS[0], task="emotion").answer.log_scores
    expected = probabilities([before], 2.5)[0]
    assert list(warm.values()) == pytest.approx(list(expected), abs=1e-6)


def test_a_temperature_that_nothing_settles_is_not_stored(
    run: Run, tmp_path: Path, own_bundle: Path
) -> None:
    """Two samples, both right: the more confident the better, without end."""
    folder, answers = data_folder(tmp_path / "mine", 4), tmp_path / "answers.csv"
    _, out, _ = mse_eval(*run, "--data", folder, "--json", "--predictions", answers)
    labels = json.loads(out)["labels"]
    with answers.open() as handle:
        said = {row["id"]: labels[int(row["predicted"])] for row in csv.DictReader(handle)}
    with (folder / "manifest.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("id", "features", "text", "label", "split"))
        for name, label in said.items():
            i = int(name[1:])
            writer.writerow((name, f"{i}.npz", TEXTS[i % 3], label, "valid"))
    before = load_bundle(own_bundle).tasks["emotion"].temperature
    words = ("--bundle", own_bundle, "--data", folder, "--split", "valid")
    code, _, err = mse_eval(*run, *words, "--fit-temperature", "--write")
    assert code == 0, err
    assert "own is kept" in " ".join(err.split())
    assert load_bundle(own_bundle).tasks["emotion"].temperature == before


def test_a_scale_is_tempered_as_the_report_assumes(data: Path, own_bundle: Path) -> None:
    """One temperature over the whole distribution, not one per token of a number."""
    from mse_runtime.analyzer import Analyzer
    from mse_runtime.features.extract import load_npz

    features = load_npz(data / "0.npz")
    answers = []
    for temperature in (1.0, 2.5):
        store_temperature(load_bundle(own_bundle), "sentiment", temperature)
        with Analyzer.open(own_bundle, threads=1) as analyzer:
            answers.append(analyzer.analyze_features(features, TEXTS[0], task="sentiment"))
    plain, warm = answers
    assert warm.distribution is not None
    expected = probabilities([plain.answer.log_scores], 2.5)[0]
    assert [p for _, p in warm.distribution] == pytest.approx(list(expected), abs=1e-6)


def test_clips_are_evaluated_as_they_are(run: Run, tmp_path: Path) -> None:
    clip = ROOT / "examples" / "happy.mp4"
    if not clip.exists():
        pytest.skip("no example clip")
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    path = tmp_path / "clips.csv"
    path.write_text(
        f"clip,text,label,split\n{clip},I am happy,joy,test\nbroken.mp4,I am sad,sadness,test\n"
    )
    code, out, err = mse_eval(*run, "--data", path, "--json")
    assert code == 3
    assert json.loads(out)["runs"][0]["n"] == 1
    assert "broken" in err


def test_wrong_options(run: Run, data: Path, tmp_path: Path) -> None:
    code, _, err = mse_eval(*run, "--data", data, "--write")
    assert code == 2
    assert "--fit-temperature" in err
    code, _, err = mse_eval(*run, "--data", data, "--split", "train")
    assert code == 2
    assert "it has" in err
    code, _, err = mse_eval(*run, "--data", data, "--task", "sentiment")
    assert code == 2
    assert "is a classification" in err
    code, _, err = mse_eval(*run, "--data", tmp_path / "no")
    assert code == 3
    code, _, err = mse_eval(*run, "--data", data, "--bundle", tmp_path / "no")
    assert code == 4
    assert err.startswith("mse-eval: ")


def test_bad_samples_are_named_and_the_rest_is_evaluated(run: Run, tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "mine")
    (folder / "2.npz").write_bytes(b"nothing")
    np.savez(folder / "4.npz", audio=np.ones((3, 9), np.float32), video=np.ones((3, 167), "f4"))
    (folder / "6.npz").unlink()
    code, out, err = mse_eval(*run, "--data", folder, "--json")
    document = json.loads(out) if out else {}
    assert "6.npz" in err
    # A width that cannot fit is the data's fault only where the rest fits.
    assert code == 3
    assert document["runs"][0]["n"] == 3
    assert "s2" in err
    assert "s4" in err


def test_no_torch_is_needed(data: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['mse-eval', '--data', {str(data)!r}, '--limit', '1', '--threads', '1']\n"
        "from mse_runtime.evaluate import main\n"
        "main()\n"
        "found = {'torch', 'transformers', 'optimum', 'onnx', 'mse_export', 'sklearn'}\n"
        "assert not found & set(sys.modules), found & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MSE_CACHE": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# -- the arithmetic, without a model ---------------------------------------------------------------


def scored(truth: Sequence[float], table: Any) -> Scored:
    samples = tuple(
        Sample(str(i), "x", value, held=held_features(None, None, "", ""))
        for i, value in enumerate(truth)
    )
    scores = np.log(np.asarray(table, np.float64))
    return Scored(samples, np.array(truth), scores.argmax(1) * 1.0, scores, (), 1.0)


def test_calibration_of_a_regression_is_over_its_sides() -> None:
    bundle = load_bundle(TINY)
    task = bundle.tasks["sentiment"]
    grid = np.round(np.arange(-30, 31) * 0.1, 1)
    sure = np.where(grid > 0.5, 0.9 / 25, np.where(grid < -0.5, 0.1 / 25, 1e-9))
    found = scored([1.0, 2.0, -1.0, 0.6], [sure] * 4)
    found = replace(found, predicted=np.full(4, float(sure @ grid)))
    made = report("x", bundle, task, found, temperature=1.0)
    assert made.ece[0] == pytest.approx(0.15, abs=1e-6)  # says 0.9, is right in 3 of 4
    assert made.classes[2].recall == 1.0
    assert made.confusion[0, 2] == 1
    assert label_columns(task, np.array([-3.0, 0.04, 2.96])).tolist() == [0, 30, 60]


def test_an_overconfident_model_is_cooled() -> None:
    bundle = load_bundle(TINY)
    task = bundle.tasks["emotion"]
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 7))
    chances = probabilities(logits)
    truth = np.array([float(rng.choice(7, p=row)) for row in chances])
    found = scored(truth, probabilities(logits * 4))
    temperature = fit_temperature(found.log_scores, truth.astype(int))
    assert temperature == pytest.approx(4, rel=0.2)
    made = report("x", bundle, task, found, temperature)
    assert made.ece[1] < 0.1 < made.ece[0]
    assert made.nll[1] < made.nll[0]


def test_the_task_is_told_from_the_labels() -> None:
    bundle = load_bundle(TINY)
    info = DataSetInfo("d", "classification", "lld13/1", "face167/1", ("joy", "anger"))
    assert choose_task(bundle, info, None) == "emotion"
    names = [label.name for label in bundle.tasks["emotion"].labels]
    assert class_indices(bundle.tasks["emotion"], info) == [
        names.index("joy"),
        names.index("anger"),
    ]
    with pytest.raises(UsageError, match="'boredom'"):
        class_indices(bundle.tasks["emotion"], replace(info, labels=("boredom", "joy")))
    with pytest.raises(UsageError, match="no task 'poetry'"):
        choose_task(bundle, info, "poetry")
