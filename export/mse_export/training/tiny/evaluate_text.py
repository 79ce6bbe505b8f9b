"""Figures on other people's data, where one has it: MELD's test utterances, clips of real people.

Neither was used in training. MELD is text only, with thresholds tuned on its dev split.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mse_export.training.tiny.lexicon import EMOTIONS, vader
from mse_runtime.errors import MediaError
from mse_runtime.metrics import weighted_f1

if TYPE_CHECKING:
    from mse_runtime.analyzer import Analyzer

__all__ = ["meld", "real_clips"]

_LOG = logging.getLogger(__name__)
_CLASSES = ("negative", "neutral", "positive")
Floats = NDArray[np.float64]


def _read(path: Path) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # The files come with Windows' punctuation as control characters.
    texts = [
        r["Utterance"].replace("\x92", "’").replace("\x85", "…").replace("\x97", "—") for r in rows
    ]
    sentiment = np.array([_CLASSES.index(r["Sentiment"]) for r in rows])
    emotion = np.array([EMOTIONS.index(r["Emotion"]) for r in rows])
    return texts, sentiment, emotion


def _classes(values: Floats, low: float, high: float) -> NDArray[np.int64]:
    return np.where(values > high, 2, np.where(values < low, 0, 1)).astype(np.int64)


def tune(values: Floats, truth: NDArray[np.int64]) -> tuple[float, float]:
    """The two thresholds with the best weighted F1."""
    grid = np.unique(np.quantile(values, np.linspace(0, 1, 61)))
    best, found = -1.0, (0.0, 0.0)
    for low in grid:
        for high in grid[grid >= low]:
            score = weighted_f1(truth, _classes(values, low, high))
            if score > best:
                best, found = score, (float(low), float(high))
    return found


def _scores(truth: NDArray[np.int64], guess: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy and weighted F1 with a bootstrap interval over utterances."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(300):
        index = rng.integers(0, len(truth), len(truth))
        drawn.append(weighted_f1(truth[index], guess[index]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "accuracy": round(float((truth == guess).mean()), 4),
        "weighted_f1": round(weighted_f1(truth, guess), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def _ask(analyzer: Analyzer, texts: Sequence[str], task: str) -> list[Any]:
    from mse_runtime.features.spec import Features

    nothing = Features(None, None, 0.0)
    return [analyzer.analyze_features(nothing, text or ".", task=task) for text in texts]


def meld(analyzer: Analyzer, folder: Path) -> dict[str, Any]:
    """Three-class sentiment on MELD's test utterances, text only, beside majority and VADER."""
    dev, dev_truth, _ = _read(folder / "dev_sent_emo.csv")
    test, truth, emotion = _read(folder / "test_sent_emo.csv")
    out: dict[str, Any] = {"utterances": len(test)}
    value_dev = np.array([p.value for p in _ask(analyzer, dev, "sentiment")])
    value = np.array([p.value for p in _ask(analyzer, test, "sentiment")])
    score = vader().score
    vader_dev, vader_test = np.array([score(t) for t in dev]), np.array([score(t) for t in test])
    for name, tuning, testing in (
        ("tiny", value_dev, value),
        ("VADER", vader_dev, vader_test),
    ):
        low, high = tune(tuning, dev_truth)
        out[name] = {**_scores(truth, _classes(testing, low, high)), "thresholds": [low, high]}
        out[f"{name}, fixed"] = _scores(truth, _classes(testing, -0.15, 0.15))
    out["majority"] = _scores(truth, np.full(len(truth), 1))
    out["r_with_vader"] = round(float(np.corrcoef(value, vader_test)[0, 1]), 4)
    labels = [EMOTIONS.index(p.label) for p in _ask(analyzer, test, "emotion")]
    out["emotion"] = _scores(emotion, np.array(labels))
    out["emotion, majority"] = _scores(emotion, np.zeros(len(emotion), np.int64))
    _LOG.info("MELD: %s", out)
    return out


def real_clips(analyzer: Analyzer, folder: Path) -> list[dict[str, Any]]:
    """What the bundle says about clips, without a transcript's help ("..."), as it is."""
    out: list[dict[str, Any]] = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".mp4", ".mov", ".webm")):
        try:
            value = analyzer.analyze(path, "...", task="sentiment")
            emotion = analyzer.analyze(path, "...", task="emotion")
        except MediaError as error:
            out.append({"clip": path.name, "error": str(error)})
            continue
        best = max(emotion.probabilities.items(), key=lambda pair: pair[1])
        out.append(
            {
                "clip": path.name,
                "value": round(float(value.value or 0.0), 2),
                "std": round(float(value.answer.std or 0.0), 2),
                "emotion": best[0],
                "probability": round(best[1], 2),
                "warnings": len(value.warnings),
            }
        )
    return out
