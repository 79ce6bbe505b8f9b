"""The published JSON Schema of results: valid itself, accepts real results, refuses others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import mse_runtime

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads(
    (Path(mse_runtime.__file__).parent / "data" / "result.schema.json").read_text("utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

CLASSES: dict[str, Any] = {
    "schema": "mse-runtime/result/1",
    "task": "emotion",
    "value": None,
    "label": "joy",
    "mode": None,
    "std": None,
    "probabilities": {"joy": 0.75, "anger": 0.25},
    "distribution": None,
    "text": "well done",
    "clip": None,
    "warnings": [],
    "timing_ms": {"adapter": 1.0, "prefill": 20, "total": 21.5},
    "memory_mb": {"peak_rss": 120.5, "vram": None},
    "backend": {"adapter": "onnx", "backbone": {"libs": "x"}},
    "bundle": {"name": "tiny", "version": "0.1.0", "trained": False},
}
NUMBERS = CLASSES | {
    "task": "sentiment",
    "value": 1.2,
    "label": "weakly positive",
    "mode": 1.1,
    "std": 0.4,
    "probabilities": {"negative": 0.1, "neutral": 0.1, "positive": 0.8},
    "distribution": [[-3.0, 0.25], [3.0, 0.75]],
    "generated": {"ids": [1, 2], "text": "1.2", "value": 1.2},
}


def test_the_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("document", [CLASSES, NUMBERS])
def test_results_are_accepted(document: dict[str, Any]) -> None:
    VALIDATOR.validate(document)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "mse-runtime/result/2"),
        ("task", ""),
        ("value", "1.2"),
        ("label", None),
        ("probabilities", {"joy": 1.5, "anger": 0.0}),
        ("probabilities", {"joy": 1.0}),
        ("distribution", [[1.0]]),
        ("distribution", [[1.0, 0.5, 0.5], [2.0, 0.5]]),
        ("std", -1),
        ("text", ""),
        ("clip", 3),
        ("warnings", [1]),
        ("timing_ms", {"adapter": 1.0}),
        ("timing_ms", {"total": -1}),
        ("memory_mb", {"peak_rss": 1}),
        ("backend", {}),
        ("bundle", {"name": "tiny", "version": "1"}),
        ("generated", {"ids": ["1"], "text": ""}),
        ("something", 1),
    ],
)
def test_others_are_refused(key: str, value: Any) -> None:
    document = copy.deepcopy(NUMBERS)
    document[key] = value
    assert not VALIDATOR.is_valid(document)


@pytest.mark.parametrize("key", SCHEMA["required"])
def test_required_keys(key: str) -> None:
    document = copy.deepcopy(NUMBERS)
    del document[key]
    assert not VALIDATOR.is_valid(document)


def test_a_prediction_follows_it() -> None:
    np = pytest.importorskip("numpy")
    from mse_runtime.readout import Answer
    from mse_runtime.result import Prediction

    for distribution, value in ((((-1.0, 0.5), (1.0, 0.5)), 0.0), (None, None)):
        answer = Answer(
            value=value,
            label="neutral",
            probabilities={"a": 0.5, "b": 0.5},
            log_scores=np.log([0.5, 0.5]),
            mode=value,
            std=None if value is None else 1.0,
            distribution=distribution,
        )
        prediction = Prediction(
            task="t",
            answer=answer,
            text="x",
            clip=None,
            warnings=("careful",),
            timing_ms={"total": 3.14159},
            memory_mb={"peak_rss": 1.25, "vram": None},
            backend={"adapter": "onnx"},
            bundle={"name": "b", "version": "1", "trained": True},
        )
        VALIDATOR.validate(json.loads(json.dumps(prediction.to_dict())))
