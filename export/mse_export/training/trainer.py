"""The loop: train an epoch, validate, keep the best, write the state, stop in time.

Published-model spec, section 7. A run goes on from its last whole epoch and ends with the very
numbers an uninterrupted one would have: the order of samples depends on seed and epoch alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mse_export.adapter import Adapter
from mse_export.training.examples import Example, buckets, collate
from mse_export.training.features import FeatureStore
from mse_export.training.frozen import Frozen
from mse_export.training.objective import loss_sum, score_answers
from mse_export.training.recipe import Recipe
from mse_export.training.state import RunFolder
from mse_runtime.bundle import Task
from mse_runtime.errors import DeviceError, MSEError
from mse_runtime.labels import LabelTrie
from mse_runtime.metrics import classification_metrics, regression_metrics
from mse_runtime.readout import Readout

__all__ = ["Outcome", "Trainer"]

IMPROVEMENT = 1e-6
VALIDATION_BATCH = 16
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `stopped` says why it ended."""

    epochs: int
    best_epoch: int
    metric: str
    best: float
    stopped: str
    history: tuple[Row, ...] = field(repr=False, default=())


class Trainer:
    """Trains `adapter` in place against a frozen language model.

    `save_best(state, row)` is called with the adapter's state whenever the validation metric
    improves; `report(row)` after every epoch; `progress(done, total)` after every step.
    """

    def __init__(
        self,
        frozen: Frozen,
        adapter: Adapter,
        task: Task,
        store: FeatureStore,
        recipe: Recipe,
        folder: RunFolder,
        *,
        seed: int = 1111,
        autocast: torch.dtype | None = None,
        checkpointing: bool = False,
        micro_batch: int | None = None,
        save_best: Callable[[Mapping[str, Tensor], Row], None] = lambda state, row: None,
        report: Callable[[Row], None] = lambda row: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.frozen, self.adapter, self.task, self.store = frozen, adapter, task, store
        self.recipe, self.folder, self.seed = recipe, folder, seed
        self.device = frozen.device
        self.metric = "MAE" if task.kind == "regression" else "weight_F1"
        self._sign = -1.0 if self.metric == "MAE" else 1.0
        self._readout = Readout.build(task, frozen.tokenizer)
        self._autocast = autocast
        self._micro = micro_batch or recipe.batch
        self._checkpointing = checkpointing
        frozen.checkpointing(checkpointing)
        self._optimizer = torch.optim.AdamW(
            adapter.parameters(), lr=recipe.lr, eps=recipe.eps, weight_decay=recipe.weight_decay
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=autocast is torch.float16)
        self._save_best, self._report = save_best, report
        self._progress, self._warn = progress, warn
        self._best = -math.inf
        self._best_epoch = 0
        self._best_state: dict[str, Tensor] = {}
        self._step_count = 0
        self.history: list[Row] = []

    @property
    def trie(self) -> LabelTrie:
        return self._readout.trie

    def run(
        self,
        train: Sequence[Example],
        valid: Sequence[Example],
        settings: Mapping[str, Any],
    ) -> Outcome:
        """Train until early stopping or `max_epochs`; the adapter then holds the best state."""
        self._restore(settings)
        stopped = self._why_stop()
        while stopped is None:
            row = self._epoch(len(self.history) + 1, train, valid)
            self.history.append(row)
            score = self._sign * row[self.metric]
            better = score - self._best >= IMPROVEMENT or not self._best_state
            if better:
                self._best, self._best_epoch = score, row["epoch"]
                self._best_state = {k: v.clone() for k, v in self.adapter.state_dict().items()}
                self._save_best(self._best_state, row)
            self.folder.save_state(self._state(settings))
            self.folder.write_curves(self.history)
            self._report(row | {"best": better})
            stopped = self._why_stop()
        self.adapter.load_state_dict(self._best_state)
        return Outcome(
            len(self.history),
            self._best_epoch,
            self.metric,
            self._sign * self._best,
            stopped,
            tuple(self.history),
        )

    def validate(self, examples: Sequence[Example]) -> dict[str, float]:
        """The published metrics of the adapter as it is, by the runtime's readout."""
        predicted: list[float] = []
        order = sorted(range(len(examples)), key=lambda i: examples[i].length)
        size = max(1, min(self._micro, VALIDATION_BATCH))
        self.adapter.eval()
        while len(predicted) < len(order):
            start = len(predicted)
            chosen = [examples[i] for i in order[start : start + size]]
            try:
                predicted += self._answers(chosen)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
                size = (size + 1) // 2
        truth = [examples[i].sample.label for i in order]
        if self.task.kind == "classification":
            return classification_metrics(predicted, truth)
        low, high = self.task.range or (-1.0, 1.0)
        return regression_metrics(predicted, truth, low, high)

    def _answers(self, examples: Sequence[Example]) -> list[float]:
        batch = collate(examples, self.store).to(self.device)
        with self._precision():
            scores = score_answers(self.frozen, self.adapter, batch, self.trie)
        return [self._value(row) for row in scores]

    def _value(self, scores: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        if self.task.kind == "classification":
            return float(scores.argmax())
        value = self._readout.answer(scores).value
        return math.nan if value is None else value

    # -- one epoch -------------------------------------------------------------------------------

    def _epoch(self, epoch: int, train: Sequence[Example], valid: Sequence[Example]) -> Row:
        started = time.monotonic()
        rng = np.random.default_rng([self.seed, epoch])
        lengths = [e.length + len(e.sample.text) for e in train]
        batches = list(buckets(lengths, self.recipe.batch, rng))
        total, tokens = 0.0, 0
        for done, indices in enumerate(batches, start=1):
            loss, count = self._step([train[i] for i in indices], len(batches))
            total, tokens = total + loss, tokens + count
            self._progress(done, len(batches))
        metrics = self.validate(valid)
        return {
            "epoch": epoch,
            "step": self._step_count,
            "lr": self._optimizer.param_groups[0]["lr"],
            "train_loss": total / max(1, tokens),
            **metrics,
            "micro_batch": self._micro,
            "checkpointing": self._checkpointing,
            "seconds": round(time.monotonic() - started, 2),
        }

    def _step(self, examples: Sequence[Example], per_epoch: int) -> tuple[float, int]:
        """One optimiser step; summed loss and number of answer tokens.

        A step that runs out of memory is repeated with less at a time: the gradients are summed
        over parts, so the result stays the same.
        """
        rate = self.recipe.rate(self._step_count, per_epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        while True:
            try:
                loss, tokens = self._gradients(examples)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._need_less_memory(error)
        if not math.isfinite(loss):
            raise MSEError(
                f"The loss became {loss} in step {self._step_count}: training diverged. The state "
                f"of epoch {len(self.history)} is kept in {self.folder.path}; start again with a "
                "lower --lr, or --precision fp32."
            )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._step_count += 1
        return loss, tokens

    def _gradients(self, examples: Sequence[Example]) -> tuple[float, int]:
        self.adapter.train()
        self._optimizer.zero_grad(set_to_none=True)
        parts = [examples[i : i + self._micro] for i in range(0, len(examples), self._micro)]
        tokens = sum(len(e.answer) for e in examples)
        total = 0.0
        for part in parts:
            batch = collate(part, self.store).to(self.device)
            with self._precision():
                loss = loss_sum(self.frozen, self.adapter, batch)
            scaled: Any = self._scaler.scale(loss / tokens)
            scaled.backward()
            total += float(loss.detach())
        return total, tokens

    def _need_less_memory(self, error: BaseException) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._checkpointing:
            self._checkpointing = True
            self.frozen.checkpointing(True)
            self._warn("Out of memory: activations are recomputed from now on (slower).")
        elif self._micro > 1:
            self._micro = (self._micro + 1) // 2
            self._warn(f"Out of memory: {self._micro} samples at a time from now on (slower).")
        else:
            raise DeviceError(
                f"Out of memory with one sample at a time ({str(error).splitlines()[0]}). The "
                f"state of epoch {len(self.history)} is kept in {self.folder.path}: run the same "
                "command where more memory is free, or with --precision bf16 or --4bit."
            ) from error

    def _precision(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)

    # -- going on --------------------------------------------------------------------------------

    def _why_stop(self) -> str | None:
        done = len(self.history)
        if done >= self.recipe.max_epochs:
            return f"{done} epochs were asked for"
        if done and done - self._best_epoch >= self.recipe.early_stop:
            return f"no better {self.metric} for {self.recipe.early_stop} epochs"
        return None

    def _state(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "settings": dict(settings),
            "adapter": self.adapter.state_dict(),
            "best_adapter": self._best_state,
            "best": self._best,
            "best_epoch": self._best_epoch,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "step": self._step_count,
            "history": self.history,
            "micro_batch": self._micro,
            "checkpointing": self._checkpointing,
        }

    def _restore(self, settings: Mapping[str, Any]) -> None:
        state = self.folder.load_state(settings)
        if state is None:
            return
        self.adapter.load_state_dict(state["adapter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._best_state = state["best_adapter"]
        self._best, self._best_epoch = state["best"], state["best_epoch"]
        self._step_count, self.history = state["step"], state["history"]
        self._micro = min(self._micro, state["micro_batch"])
        if state["checkpointing"] and not self._checkpointing:
            self._checkpointing = True
            self.frozen.checkpointing(True)
        self._warn(f"Going on after epoch {len(self.history)} ({self.folder.path}).")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is the GPU's or the machine's lack of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text
