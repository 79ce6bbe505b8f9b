"""From logits to an answer: a distribution over the task's labels.

The label set of a task is known, so nothing is generated to classify: the labels' tokens form a
trie (`labels`) whose nodes go through the model in the same pass as the prompt's end
(`Backbone.prefill_tree`). Regression walks the trie of the printable numbers and reports the
expected value, the arg max and the standard deviation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mse_runtime.labels import LabelTrie
from mse_runtime.prompt import Tokenizer
from mse_runtime.records import dataclass

if TYPE_CHECKING:
    from mse_runtime.bundle import Task

__all__ = ["Answer", "Readout", "intensity", "label_texts", "number_grid", "polarity"]

Logits = NDArray[np.float32]

# Seven-step wording of the MOSI/MOSEI annotation scheme (Zadeh et al. 2016), for -3..3.
INTENSITY = (
    "strongly negative",
    "negative",
    "weakly negative",
    "neutral",
    "weakly positive",
    "positive",
    "strongly positive",
)


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Classification: `label` is the most probable class, `probabilities` has one entry per class.
    Regression: `value` is the expected value, `mode` the most probable number, `std` the
    distribution's standard deviation, `distribution` [(number, probability)] in rising order;
    `label` words the value and `probabilities` sums the numbers that are worded as negative,
    neutral (within a sixth of the scale's end) and positive.
    `log_scores` [n_labels] are the labels' log-probabilities before the temperature, in order.
    """

    value: float | None
    label: str
    probabilities: dict[str, float]
    log_scores: NDArray[np.float64]
    mode: float | None = None
    std: float | None = None
    distribution: tuple[tuple[float, float], ...] | None = None


def number_grid(low: float, high: float, step: float) -> NDArray[np.float64]:
    """All numbers a regression task can answer, rising."""
    count = round((high - low) / step)
    return np.round(low + step * np.arange(count + 1), 10) + 0.0  # no negative zero


def label_texts(task: Task) -> list[str]:
    """The texts whose tokens are scored, in the order of the answer's labels."""
    if task.kind == "classification":
        return [label.text for label in task.labels]
    low, high = task.range or (-1.0, 1.0)
    return [task.number_text(number) for number in number_grid(low, high, task.step or 0.1)]


@dataclass(frozen=True)
class Readout:
    """A task's label trie, ready to score."""

    task: Task
    trie: LabelTrie

    @classmethod
    def build(cls, task: Task, tokenizer: Tokenizer) -> Readout:
        """Tokenise the task's labels as the training does: each text alone, no BOS."""
        return cls(
            task, LabelTrie.build([list(tokenizer.tokenize(text)) for text in label_texts(task)])
        )

    def score(self, logits: Logits, temperature: float | None = None) -> Answer:
        """The answer from the logits [1 + k, m] of the trie's `candidates`.

        Row 0 is after the prompt, the others after each branch.
        `temperature` overrides the calibrated one of the task.
        """
        return self.answer(self.trie.log_probabilities(logits), temperature)

    def answer(self, log_scores: NDArray[np.float64], temperature: float | None = None) -> Answer:
        """The answer for log-probabilities over the labels.

        The temperature acts on the labels as a whole, as it was fitted (Guo et al. 2017), not on
        each token of a number.
        """
        tempered = log_scores / (self.task.temperature if temperature is None else temperature)
        weights = np.exp(tempered - tempered.max())
        weights /= weights.sum()
        if self.task.kind == "classification":
            names = [label.name for label in self.task.labels]
            best = int(weights.argmax())
            table = dict(zip(names, map(float, weights), strict=True))
            return Answer(None, names[best], table, log_scores)
        low, high = self.task.range or (-1.0, 1.0)
        grid = number_grid(low, high, self.task.step or 0.1)
        mean = float(weights @ grid)
        return Answer(
            value=mean,
            label=intensity(mean, max(abs(low), abs(high))),
            probabilities={
                name: float(weights[polarity(grid, low, high) == side].sum())
                for side, name in ((-1, "negative"), (0, "neutral"), (1, "positive"))
            },
            log_scores=log_scores,
            mode=float(grid[weights.argmax()]),
            std=float(np.sqrt(weights @ (grid - mean) ** 2)),
            distribution=tuple(zip(map(float, grid), map(float, weights), strict=True)),
        )


def polarity(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """-1, 0 or 1 for each value: neutral is what `intensity` words as neutral."""
    top = max(abs(low), abs(high))
    return np.sign(np.round(np.round(values, 10) / top * 3))


def intensity(value: float, top: float) -> str:
    """The word for `value` on a scale from -top to top."""
    return INTENSITY[int(np.clip(np.round(value / top * 3), -3, 3)) + 3]
