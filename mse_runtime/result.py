"""The result of one utterance and its JSON form (schema: `data/result.schema.json`)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mse_runtime.readout import intensity
from mse_runtime.records import dataclass

if TYPE_CHECKING:
    from mse_runtime.parity import Generated
    from mse_runtime.readout import Answer

__all__ = ["SCHEMA", "Prediction", "Stopwatch"]

SCHEMA = "mse-runtime/result/1"


class Stopwatch:
    """Milliseconds by stage, and since the watch was made. Stages may overlap in time."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.stages: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds * 1e3

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - before)

    def total(self) -> float:
        return (time.perf_counter() - self.started) * 1e3


@dataclass(frozen=True)
class Prediction:
    """One utterance's answer with everything needed to judge it.

    `timing_ms` holds decode, features, adapter, prefill, readout, load and total; decode, features
    and load run side by side, so the stages add up to more than the total. `memory_mb` holds the
    peak RSS, with that of a process beside that read the clip, and the VRAM in use.
    """

    task: str
    answer: Answer
    text: str
    clip: str | None
    warnings: tuple[str, ...]
    timing_ms: dict[str, float]
    memory_mb: dict[str, float | None]
    backend: dict[str, Any]
    bundle: dict[str, Any]
    generated: Generated | None = None

    @property
    def value(self) -> float | None:
        """Expected value of a regression task, or the published parser's number under parity."""
        return self.generated.value if self.generated else self.answer.value

    @property
    def label(self) -> str:
        """The most probable class, the value in words, or the class that generation named."""
        if self.generated and self.answer.distribution and self.value is not None:
            top = max(abs(number) for number, _ in self.answer.distribution)
            return intensity(self.value, top) if math.isfinite(self.value) else "no number"
        if self.generated and self.value is not None:
            names = list(self.answer.probabilities)
            known = self.value.is_integer() and 0 <= self.value < len(names)
            return names[int(self.value)] if known else f"none of the classes ({self.value:g})"
        return self.answer.label

    @property
    def probabilities(self) -> dict[str, float]:
        return self.answer.probabilities

    @property
    def distribution(self) -> tuple[tuple[float, float], ...] | None:
        return self.answer.distribution

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `mse-run --json`."""
        answer = self.answer
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "task": self.task,
            "value": _round(self.value),
            "label": self.label,
            "mode": _round(answer.mode),
            "std": _round(answer.std),
            "probabilities": {name: _round(p) for name, p in answer.probabilities.items()},
            "distribution": answer.distribution
            and [[number, _round(p)] for number, p in answer.distribution],
            "text": self.text,
            "clip": self.clip,
            "warnings": list(self.warnings),
            "timing_ms": {stage: round(ms, 2) for stage, ms in self.timing_ms.items()},
            "memory_mb": {k: v if v is None else round(v, 1) for k, v in self.memory_mb.items()},
            "backend": self.backend,
            "bundle": self.bundle,
        }
        if self.generated:
            document["generated"] = {
                "ids": list(self.generated.ids),
                "text": self.generated.text,
                "value": _round(self.generated.value),
            }
        return document


def _round(number: float | None) -> float | None:
    """Six decimals are plenty; JSON has no infinities."""
    return None if number is None or not math.isfinite(number) else round(number, 6)
