"""What the finished bundle does: on new people, voices and sentences, through the real runtime.

Every test clip is written to an .mp4 and read by `Analyzer` like any user's clip. The controls
use the same features with a modality taken away, made average, or another person's instead.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mse_export.training.tiny import clips as rendering
from mse_export.training.tiny.figures import Answers, contradicted, describe
from mse_export.training.tiny.lexicon import EMOTIONS
from mse_export.training.tiny.workspace import Run
from mse_export.training.tiny.world import is_sarcasm

if TYPE_CHECKING:
    from mse_runtime.analyzer import Analyzer
    from mse_runtime.features.spec import Features, FeatureTrack

__all__ = ["CONDITIONS", "evaluate", "examine"]

_LOG = logging.getLogger(__name__)
#: Row of the card -> what is taken away from the whole clip.
CONDITIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "text only (both media missing)": {"audio": None, "face": None},
    "text + voice": {"face": None},
    "text + face": {"audio": None},
}
AVERAGE, SHUFFLED, SPEECHLESS = "text + average media", "shuffled media", 'media only (text "...")'


def _features(
    analyzer: Analyzer, specs: Sequence[rendering.ClipSpec], folder: Path
) -> list[Features]:
    """Read the clips' files as the runtime does."""
    from mse_runtime.features.extract import extract

    inputs = analyzer.bundle.features
    out = []
    for k, spec in enumerate(specs):
        path = folder / f"{spec.name}.mp4"
        out.append(
            extract(path, audio_spec=inputs.audio.spec, face_spec=inputs.face.spec, threads=1)
        )
        if k % 50 == 49:
            _LOG.info("%s: %d of %d clips read", folder.name, k + 1, len(specs))
    return out


def _answers(
    analyzer: Analyzer,
    specs: Sequence[rendering.ClipSpec],
    features: Sequence[Features],
    *,
    speechless: bool = False,
) -> Answers:
    values, emotions = [], []
    for spec, found in zip(specs, features, strict=True):
        text = "..." if speechless else spec.text
        values.append(analyzer.analyze_features(found, text, task="sentiment").value or 0.0)
        if spec.emotion is None:
            emotions.append(-1)
        else:
            label = analyzer.analyze_features(found, text, task="emotion").label
            emotions.append(EMOTIONS.index(label))
    return Answers(
        value=np.array(values),
        truth=np.array([s.sentiment for s in specs]),
        words=np.array([s.text_valence for s in specs]),
        emotion=np.array(emotions),
        emotion_truth=np.array([-1 if s.emotion is None else s.emotion for s in specs]),
        identity=np.array([s.identity for s in specs]),
    )


def _average(analyzer: Analyzer, found: Features) -> Features:
    """The same with every valid row replaced by the training clips' mean."""
    inputs = analyzer.bundle.features

    def flat(track: FeatureTrack | None, mean: Sequence[float] | None) -> FeatureTrack | None:
        if track is None or mean is None:
            return None
        rows = np.where(track.valid[:, None], np.asarray(mean, np.float32), 0.0)
        return dataclasses.replace(track, values=rows.astype(np.float32))

    return dataclasses.replace(
        found, audio=flat(found.audio, inputs.audio.mean), face=flat(found.face, inputs.face.mean)
    )


def _table(
    analyzer: Analyzer,
    specs: Sequence[rendering.ClipSpec],
    features: Sequence[Features],
    each: int,
    *,
    controls: bool,
) -> tuple[dict[str, Any], Answers]:
    """Figures by condition, and the answers to whole clips; `each` clips stand side by side."""
    shift = each * 3 + 1
    shown = {
        name: [dataclasses.replace(f, **cut) for f in features] for name, cut in CONDITIONS.items()
    }
    if controls:
        shown[AVERAGE] = [_average(analyzer, f) for f in features]
        shown[SHUFFLED] = [*features[shift:], *features[:shift]]
        shown[SPEECHLESS] = list(features)
    answers = {
        name: _answers(analyzer, specs, given, speechless=name == SPEECHLESS)
        for name, given in shown.items()
    }
    table = {name: describe(found) for name, found in answers.items()}
    for name, row in table.items():
        _LOG.info("%s: %s", name, row)
    return table, answers["all"]


def _about(specs: Sequence[rendering.ClipSpec], whole: Answers) -> dict[str, Any]:
    """What the clips of a test set are."""
    labels = whole.emotion_truth[whole.emotion_truth >= 0]
    return {
        "clips": len(specs),
        "identities": len({s.identity for s in specs}),
        "contradicted": int(contradicted(whole).sum()),
        "sarcastic": sum(is_sarcasm(s.text_valence, s.media) for s in specs),
        "emotion_clips": len(labels),
        "emotion_majority": round(float(np.bincount(labels).max() / max(len(labels), 1)), 4),
        "words_r": round(float(np.corrcoef(whole.words, whole.truth)[0, 1]), 4),
    }


def examine(run: Run, analyzer: Analyzer, split: str) -> dict[str, Any]:
    """Figures on one set of test clips; the controls only on the first."""
    specs = run.specs(split)
    features = _features(analyzer, specs, run.work / split)
    each = run.scale.test[1]
    table, whole = _table(analyzer, specs, features, each, controls=split == "test")
    about = {**_about(specs, whole), "strength": specs[0].strength}
    return {**about, "conditions": table}


def evaluate(run: Run) -> dict[str, Any]:
    """Every figure of the card."""
    from mse_export.training.tiny.checkpoint import load_model
    from mse_export.training.tiny.evaluate_text import meld, real_clips
    from mse_export.training.tiny.language_check import validate_text
    from mse_runtime.analyzer import Analyzer

    training = run.material()["training"]
    with Analyzer.open(run.out, threads=1) as analyzer:
        report: dict[str, Any] = {
            "command": "mse-train tiny",
            "parameters": round(_parameters(run) / 1e6, 2),
            "adapter_parameters": round(analyzer.bundle.adapter.parameters / 1e6, 2),
            "vocabulary": run.scale.model.vocab,
            "training_clips": len(training),
            "training_identities": len({item.identity for item in training}),
        }
        for split in ("test", "portrait", "faint"):
            report[split] = examine(run, analyzer, split)
        report["language"] = validate_text(load_model(run.work / "slots.pt"), run.processor())
        report["meld"] = meld(analyzer, run.text_data) if run.text_data else None
        report["real"] = real_clips(analyzer, run.real_clips) if run.real_clips else None
    return report


def _parameters(run: Run) -> int:
    from mse_export.training.tiny.checkpoint import load_model

    return sum(p.numel() for p in load_model(run.work / "slots.pt").parameters())
