"""Running a bundle over a data set: answers, the published metrics, calibration.

Published-model spec, section 8, for the metrics. Everything here is the runtime: what is measured
is what a user gets.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mse_runtime.bundle import Bundle, Task
from mse_runtime.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    probabilities,
)
from mse_runtime.datasets import DataSetInfo, Problem, Sample
from mse_runtime.errors import BackboneError, BundleError, DeviceError, MSEError, UsageError
from mse_runtime.metrics import (
    ClassReport,
    classification_metrics,
    confusion_matrix,
    per_class,
    regression_metrics,
)
from mse_runtime.readout import number_grid, polarity

if TYPE_CHECKING:
    from mse_runtime.analyzer import Analyzer

__all__ = ["POLARITY", "Report", "Scored", "choose_task", "report", "score", "store_temperature"]

POLARITY = ("negative", "neutral", "positive")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Answers to n samples. `log_scores` [n, K] are at temperature 1, over the task's labels.

    `truth` and `predicted` [n] are values on the scale or class indices of the task.
    """

    samples: tuple[Sample, ...]
    truth: Floats
    predicted: Floats
    log_scores: Floats
    problems: tuple[Problem, ...]
    seconds: float

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class Report:
    """Everything that is said about one bundle on one split.

    Calibration is over classes, or over negative, neutral and positive for a regression; `nll` is
    over the task's own labels (the numbers of the grid). Before: temperature 1.
    """

    name: str
    n: int
    metrics: dict[str, float]
    classes: tuple[ClassReport, ...]
    confusion: NDArray[np.int64]
    temperature: float
    ece: tuple[float, float]
    nll: tuple[float, float]
    seconds_per_sample: float
    gguf_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN as null."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "name": self.name,
            "n": self.n,
            "metrics": {key: number(value) for key, value in self.metrics.items()},
            "classes": [vars(row) for row in self.classes],
            "confusion": self.confusion.tolist(),
            "calibration": {
                "temperature": self.temperature,
                "ece_before": number(self.ece[0]),
                "ece_after": number(self.ece[1]),
                "nll_before": number(self.nll[0]),
                "nll_after": number(self.nll[1]),
            },
            "seconds_per_sample": self.seconds_per_sample,
            "gguf_bytes": self.gguf_bytes,
        }


def choose_task(bundle: Bundle, info: DataSetInfo, name: str | None) -> str:
    """The task to ask: as named, or the default one, or the only one of the data set's kind."""
    if name is not None:
        if name not in bundle.tasks:
            raise UsageError(
                f"The bundle {bundle.name!r} has no task {name!r}; it has "
                f"{', '.join(bundle.tasks)}."
            )
        fits = [name] if bundle.tasks[name].kind == info.kind else []
    else:
        fits = [key for key, task in bundle.tasks.items() if task.kind == info.kind]
        if bundle.default_task in fits:
            fits = [bundle.default_task]
    if len(fits) != 1:
        raise UsageError(
            f"The data set {info.name!r} is a {info.kind}, and the bundle {bundle.name!r} has "
            f"{len(fits)} tasks for that among {', '.join(bundle.tasks)}. Name one with --task."
        )
    return fits[0]


def class_indices(task: Task, info: DataSetInfo) -> list[int]:
    """For every class of the data set, its index in the task; UsageError names a stranger."""
    names = [label.name for label in task.labels]
    texts = [label.text for label in task.labels]
    found = []
    for label in info.labels:
        if label not in names and label not in texts:
            raise UsageError(
                f"The data set has the class {label!r}, which the bundle does not know; it knows "
                f"{', '.join(names)}."
            )
        found.append(names.index(label) if label in names else texts.index(label))
    return found


def score(
    bundle: Bundle,
    samples: Sequence[Sample],
    info: DataSetInfo,
    task_name: str,
    *,
    parity: Literal["published"] | None = None,
    threads: int | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Ask the bundle about every sample, one at a time. A sample that fails is a problem of its
    own; where none is left, the first one's error is raised.
    """
    from mse_runtime.analyzer import Analyzer

    task = bundle.tasks[task_name]
    classes = class_indices(task, info) if task.kind == "classification" else []
    plain = {key: replace(value, temperature=1.0) for key, value in bundle.tasks.items()}
    done: list[Sample] = []
    truth: list[float] = []
    predicted: list[float] = []
    scores: list[Floats] = []
    problems: list[Problem] = []
    first: MSEError | None = None
    started = time.perf_counter()
    with Analyzer.open(replace(bundle, tasks=plain), threads=threads) as analyzer:
        for count, sample in enumerate(samples, start=1):
            step(count, len(samples))
            if math.isnan(sample.label):
                problems.append(Problem(sample.id, "has no label"))
                continue
            try:
                value, found = _ask(analyzer, sample, task_name, task, parity)
            except (BackboneError, DeviceError):
                raise
            except MSEError as error:
                first = first or error
                problems.append(Problem(sample.id, str(error)))
                continue
            done.append(sample)
            predicted.append(value)
            scores.append(found)
            truth.append(classes[int(sample.label)] if classes else sample.label)
    if first is not None and not done:
        raise first
    if not done:
        raise UsageError(f"No sample of {info.name!r} has a label; there is nothing to evaluate.")
    return Scored(
        tuple(done),
        np.array(truth),
        np.array(predicted),
        np.stack(scores),
        tuple(problems),
        time.perf_counter() - started,
    )


def _ask(
    analyzer: Analyzer,
    sample: Sample,
    name: str,
    task: Task,
    parity: Literal["published"] | None,
) -> tuple[float, Floats]:
    if sample.held is None and sample.file is None and sample.clip is not None:
        prediction = analyzer.analyze(sample.clip, sample.text, task=name, parity=parity)
    else:
        prediction = analyzer.analyze_features(
            sample.features(), sample.text, task=name, parity=parity
        )
    scores = np.asarray(prediction.answer.log_scores, np.float64)
    if task.kind == "classification" and prediction.generated is None:
        return float(scores.argmax()), scores
    value = prediction.value
    return math.nan if value is None else float(value), scores


def label_columns(task: Task, truth: Floats) -> NDArray[np.int64]:
    """The column of `log_scores` that is each sample's true label (the nearest number)."""
    if task.kind == "classification":
        return truth.astype(np.int64)
    low, high = task.range or (-1.0, 1.0)
    grid = number_grid(low, high, task.step or 0.1)
    nearest: NDArray[np.int64] = np.abs(truth[:, None] - grid).argmin(axis=1).astype(np.int64)
    return nearest


def report(
    name: str, bundle: Bundle, task: Task, scored: Scored, temperature: float | None = None
) -> Report:
    """Metrics and calibration at `temperature` (default: the task's own)."""
    used = task.temperature if temperature is None else temperature
    columns = label_columns(task, scored.truth)
    if task.kind == "classification":
        labels: Sequence[str] = [label.name for label in task.labels]
        metrics = classification_metrics(scored.predicted, scored.truth)
        guess, true = scored.predicted, scored.truth
    else:
        labels = POLARITY
        low, high = task.range or (-1.0, 1.0)
        metrics = regression_metrics(scored.predicted, scored.truth, low, high)
        guess, true = (_side(task, values) for values in (scored.predicted, scored.truth))
    return Report(
        name=name,
        n=len(scored),
        metrics=metrics,
        classes=tuple(per_class(true, guess, labels)),
        confusion=confusion_matrix(true, guess, len(labels)),
        temperature=used,
        ece=(_ece(task, scored, 1.0), _ece(task, scored, used)),
        nll=(
            negative_log_likelihood(scored.log_scores, columns),
            negative_log_likelihood(scored.log_scores, columns, used),
        ),
        seconds_per_sample=scored.seconds / max(1, len(scored)),
        gguf_bytes=bundle.gguf_path().stat().st_size,
    )


def _side(task: Task, values: Floats) -> Floats:
    """0, 1, 2: negative, neutral, positive, as `mse-run` words a value."""
    low, high = task.range or (-1.0, 1.0)
    return polarity(values, low, high) + 1


def _ece(task: Task, scored: Scored, temperature: float) -> float:
    table = probabilities(scored.log_scores, temperature)
    if task.kind == "classification":
        return expected_calibration_error(table, scored.truth.astype(np.int64))
    low, high = task.range or (-1.0, 1.0)
    grid = number_grid(low, high, task.step or 0.1)
    columns = polarity(grid, low, high)
    sides = np.stack([table[:, columns == side].sum(axis=1) for side in (-1, 0, 1)], axis=1)
    return expected_calibration_error(sides, _side(task, scored.truth).astype(np.int64))


def store_temperature(bundle: Bundle, task_name: str, temperature: float) -> Path:
    """Write a task's temperature into the bundle's manifest, atomically; the manifest's path."""
    path = bundle.path / "manifest.json"
    partial = path.with_name(path.name + ".partial")
    if path.is_symlink():
        raise UsageError(
            f"{path} belongs to the hub's cache, which is not to be changed. Copy the bundle to a "
            "folder of its own (cp -rL) and calibrate the copy."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["tasks"][task_name]["temperature"] = round(temperature, 4)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BundleError(
            f"{path} cannot be written ({error.strerror or error}). Copy the bundle to a folder "
            "of your own and calibrate the copy."
        ) from error
    return path
