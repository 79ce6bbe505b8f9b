"""What the finished bundle does: on new people, voices and sentences, through the real runtime.

Every test clip is written to an .mp4 and read by `Analyzer` like any user's clip. The controls
use the same features with a modality taken away or another person's put in its place.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mse_export.training.tiny import clips as rendering
from mse_export.training.tiny.figures import Answers, contradicted, describe
from mse_export.training.tiny.lexicon import EMOTIONS
from mse_export.training.tiny.world import is_sarcasm

if TYPE_CHECKING:
    from mse_export.training.tiny.pipeline import Run
    from mse_runtime.analyzer import Analyzer
    from mse_runtime.features.spec import Features

__all__ = ["CONDITIONS", "evaluate"]

_LOG = logging.getLogger(__name__)
CONDITIONS = ("all", "text only", "text + voice", "text + face", "shuffled media")


def _features(run: Run, analyzer: Analyzer, specs: Sequence[rendering.ClipSpec]) -> list[Features]:
    """Render the clips to .mp4 where they are not, and read them back with the runtime."""
    from mse_runtime.features.extract import extract

    folder = run.work / "test"
    inputs = analyzer.bundle.features
    out = []
    for k, spec in enumerate(specs):
        path = folder / f"{spec.name}.mp4"
        out.append(
            extract(path, audio_spec=inputs.audio.spec, face_spec=inputs.face.spec, threads=1)
        )
        if k % 50 == 49:
            _LOG.info("test clips: %d of %d", k + 1, len(specs))
    return out


def _answers(
    analyzer: Analyzer, specs: Sequence[rendering.ClipSpec], features: Sequence[Features]
) -> Answers:
    values, emotions = [], []
    for spec, found in zip(specs, features, strict=True):
        values.append(analyzer.analyze_features(found, spec.text, task="sentiment").value or 0.0)
        if spec.emotion is None:
            emotions.append(-1)
        else:
            label = analyzer.analyze_features(found, spec.text, task="emotion").label
            emotions.append(EMOTIONS.index(label))
    return Answers(
        value=np.array(values),
        truth=np.array([s.sentiment for s in specs]),
        words=np.array([s.text_valence for s in specs]),
        emotion=np.array(emotions),
        emotion_truth=np.array([-1 if s.emotion is None else s.emotion for s in specs]),
        identity=np.array([s.identity for s in specs]),
    )


def _shown(condition: str, features: Sequence[Features], each: int) -> list[Features]:
    """The features a condition lets the model have."""
    if condition == "shuffled media":
        return [*features[each * 3 + 1 :], *features[: each * 3 + 1]]
    cut: dict[str, dict[str, Any]] = {
        "all": {},
        "text only": {"audio": None, "face": None},
        "text + voice": {"face": None},
        "text + face": {"audio": None},
    }
    return [dataclasses.replace(f, **cut[condition]) for f in features]


def evaluate(run: Run) -> dict[str, Any]:
    """Every figure of the card."""
    from mse_export.training.tiny.checkpoint import load_model
    from mse_export.training.tiny.evaluate_text import meld, real_clips
    from mse_export.training.tiny.language_check import validate_text
    from mse_runtime.analyzer import Analyzer

    specs, training = run.specs("test"), run.material()["training"]
    with Analyzer.open(run.out, threads=1) as analyzer:
        features = _features(run, analyzer, specs)
        table: dict[str, Any] = {}
        full = None
        for condition in CONDITIONS:
            shown = _shown(condition, features, run.scale.test[1])
            found = _answers(analyzer, specs, shown)
            table[condition] = describe(found)
            _LOG.info("%s: %s", condition, table[condition])
            full = full or found
        whole = full if full is not None else _answers(analyzer, specs, features)
        sarcastic = np.array([is_sarcasm(s.text_valence, s.media) for s in specs])
        labels = whole.emotion_truth[whole.emotion_truth >= 0]
        report: dict[str, Any] = {
            "command": "mse-train tiny",
            "parameters": round(_parameters(run) / 1e6, 2),
            "adapter_parameters": round(analyzer.bundle.adapter.parameters / 1e6, 2),
            "clips": len(specs),
            "identities": run.scale.test[0],
            "training_clips": len(training),
            "training_identities": len({item.identity for item in training}),
            "contradicted": int(contradicted(whole).sum()),
            "sarcastic": int(sarcastic.sum()),
            "emotion_clips": len(labels),
            "emotion_majority": round(float(np.bincount(labels).max() / max(len(labels), 1)), 4),
            "words_r": round(float(np.corrcoef(whole.words, whole.truth)[0, 1]), 4),
            "conditions": table,
            "language": validate_text(load_model(run.work / "slots.pt"), run.processor()),
            "meld": meld(analyzer, run.text_data) if run.text_data else None,
            "real": real_clips(analyzer, run.real_clips) if run.real_clips else None,
        }
    return report


def _parameters(run: Run) -> int:
    from mse_export.training.tiny.checkpoint import load_model

    return sum(p.numel() for p in load_model(run.work / "slots.pt").parameters())
