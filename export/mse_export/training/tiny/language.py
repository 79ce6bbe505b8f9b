"""Training the language model: the text stage, then the slot stage, then it is frozen.

Text stage: the answer after a sentence, with two auxiliary heads (each word's valence at its last
piece, the sentence's at the last prompt token) without which nothing is learned in reasonable
time. Slot stage: the pseudo tokens' places hold noisy vectors that stand for a face and a voice,
so that the model learns to read such places at all. Fusion is thus partly the backbone's.
"""

from __future__ import annotations

import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mse_export.training.tiny.checkpoint import load_model, save_model, save_state
from mse_export.training.tiny.corpus import NO_TARGET, Example, Feed, sentences, word_examples
from mse_export.training.tiny.evidence import Evidence
from mse_export.training.tiny.language_batch import Step, prepare
from mse_export.training.tiny.language_check import validate_text
from mse_export.training.tiny.layout import Answers, Layout, Pieces
from mse_export.training.tiny.model import TinyLlama
from mse_export.training.tiny.schedule import Schedule, TinyConfig

__all__ = ["train_stage"]

_LOG = logging.getLogger(__name__)


def train_stage(
    out: Path,
    processor: Any,
    schedule: Schedule,
    config: TinyConfig,
    *,
    start: Path | None = None,
) -> TinyLlama:
    """Train (or resume) a stage; the finished model is at `out`, its state beside it meanwhile."""
    if not out.exists():
        torch.manual_seed(schedule.seed)
        model = load_model(start) if start else TinyLlama(config)
        _Stage(out, processor, schedule, model).run()
    return load_model(out)


class _Stage:
    """One stage under way."""

    def __init__(self, out: Path, processor: Any, schedule: Schedule, model: TinyLlama) -> None:
        self.out, self.processor, self.schedule, self.model = out, processor, schedule, model
        self.rng = random.Random(schedule.seed)
        model.requires_grad_(True).train()
        self.evidence = Evidence(model.width)
        self.word_head, self.value_head = nn.Linear(model.width, 1), nn.Linear(model.width, 1)
        self.parts = nn.ModuleList((model, self.evidence, self.word_head, self.value_head))
        matrices = [p for p in self.parts.parameters() if p.dim() > 1]
        vectors = [p for p in self.parts.parameters() if p.dim() < 2]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=schedule.rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.pieces, self.answers = Pieces(processor), Answers(processor)

    def run(self) -> None:
        """Every step that is left, then the finished file."""
        schedule, first = self.schedule, self._resume()
        examples = sentences(self.processor, schedule.sentences, schedule.seed + 1)
        feed = Feed(examples, schedule.batch, self.rng)
        words = word_examples(self.processor)
        began, total = time.monotonic(), 0.0
        for step in range(first, schedule.steps):
            total += self._step(step, feed, words)
            done = step + 1
            if done % 50 == 0:
                spent = time.monotonic() - began
                mean, total = total / 50, 0.0
                _LOG.info("step %d of %d: loss %.3f, %.0f s", done, schedule.steps, mean, spent)
            if done % schedule.save_every == 0 and done < schedule.steps:
                self._save(done)
        save_model(self.out, self.model)
        self._state_file.unlink(missing_ok=True)
        _LOG.info("%s", validate_text(self.model, self.processor))

    @property
    def _state_file(self) -> Path:
        return self.out.with_suffix(".state")

    def _resume(self) -> int:
        if not self._state_file.exists():
            return 0
        state = torch.load(self._state_file, weights_only=False)
        self.parts.load_state_dict(state["parts"])
        self.optimiser.load_state_dict(state["optimiser"])
        step = int(state["step"])
        self.rng.seed(self.schedule.seed + step)
        _LOG.info("resumed at step %d", step)
        return step

    def _save(self, done: int) -> None:
        state = {
            "parts": self.parts.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": done,
        }
        save_state(self._state_file, state)
        _LOG.info("%s", validate_text(self.model, self.processor))

    def _rate(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.schedule.steps))
        return self.schedule.rate * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * cosine)

    def _draw(self, step: int, feed: Feed, words: list[Example]) -> tuple[str, Step, int]:
        schedule, rng = self.schedule, self.rng
        task = "emotion" if rng.random() < schedule.emotion_share else "sentiment"
        layout: Layout = "published" if rng.random() < 0.3 else "pseudo-last"
        slots = rng.choice((1, 2, 4, 4, 8)) if schedule.slots and rng.random() > 0.2 else 0
        if task == "sentiment" and (step < schedule.word_steps or rng.random() < 0.12):
            batch = rng.choices(words, k=schedule.batch)
        else:
            batch = feed.next(task)
        return task, prepare(batch, task, layout, slots, self.pieces, self.answers, rng), slots

    def _step(self, step: int, feed: Feed, words: list[Example]) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(step)
        task, made, slots = self._draw(step, feed, words)
        rows = self._rows(made, slots)
        index = made.first[..., None].expand(-1, -1, self.model.width)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden, middle = self.model(rows)
            at = hidden.gather(1, index)
            logits = self.model.lm_head(at)
        answer = functional.cross_entropy(logits.float().flatten(0, 1), made.target.flatten())
        known = made.words > NO_TARGET / 2
        guess = self.word_head(middle.float()).squeeze(-1)
        loss = answer + functional.smooth_l1_loss(guess[known], made.words[known])
        if task == "sentiment":
            value = self.value_head(at[:, 0].float()).squeeze(-1)
            loss = loss + functional.smooth_l1_loss(value, made.value)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        self.optimiser.step()
        return float(answer.detach())

    def _rows(self, made: Step, slots: int) -> Tensor:
        rows = self.model.embed(made.ids)
        if not slots:
            return rows
        places = torch.tensor(made.slot)[:, None] + torch.arange(slots)
        filled = self.evidence(made.media, slots, self.rng)
        return rows.scatter(1, places[..., None].expand(-1, -1, self.model.width), filled)
