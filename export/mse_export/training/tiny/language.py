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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mse_export.training.tiny.corpus import NO_TARGET, Example, Feed, sentences, word_examples
from mse_export.training.tiny.layout import Answers, Layout, Pieces, build_row
from mse_export.training.tiny.lexicon import EMOTIONS
from mse_export.training.tiny.model import TinyConfig, TinyLlama
from mse_export.training.tiny.readout import expected, read_emotions, read_numbers
from mse_export.training.tiny.tokeniser import PAD
from mse_export.training.tiny.world import Media, draw_media, fused_emotion, fused_sentiment

__all__ = ["Evidence", "Schedule", "load_model", "save_model", "train_stage", "validate_text"]

_LOG = logging.getLogger(__name__)
_LEVELS = 13


@dataclass(frozen=True)
class Schedule:
    """One stage of training."""

    steps: int
    rate: float
    batch: int = 128
    word_steps: int = 0
    """Opening steps on single words."""
    slots: bool = False
    """Whether pseudo tokens' places are there and hold evidence."""
    emotion_share: float = 0.25
    sentences: int = 200_000
    seed: int = 0
    save_every: int = 200


class Evidence(nn.Module):
    """Vectors that stand for what an adapter would write; thrown away after the slot stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.face = nn.Embedding(len(EMOTIONS), width)
        self.voice = nn.Embedding(len(EMOTIONS), width)
        self.valence = nn.Embedding(_LEVELS, width)
        self.arousal = nn.Embedding(_LEVELS, width)
        for table in (self.face, self.voice, self.valence, self.arousal):
            nn.init.normal_(table.weight, 0.0, 0.5)

    def forward(self, media: list[Media], slots: int, noise: random.Random) -> Tensor:
        """Rows [B, slots, width]: one noisy sum per clip, differently scaled in each place."""
        total = self._level(
            self.valence, [m.valence / 3 + noise.gauss(0, 0.1) for m in media], "has_face", media
        ) + self._level(
            self.arousal, [m.arousal + noise.gauss(0, 0.1) for m in media], "has_voice", media
        )
        for table, name in ((self.face, "face"), (self.voice, "voice")):
            index = torch.tensor([getattr(m, name) for m in media])
            weight = [
                getattr(m, f"{name}_intensity") if getattr(m, f"has_{name}") else 0.0 for m in media
            ]
            total = total + torch.tensor(weight)[:, None] * table(index)
        scale = 0.6 + 0.8 * torch.rand(len(media), slots, 1)
        spread = torch.randn(len(media), slots, total.shape[-1])
        return scale * total[:, None] + 0.2 * spread

    @staticmethod
    def _level(table: nn.Embedding, values: list[float], flag: str, media: list[Media]) -> Tensor:
        there = torch.tensor([float(getattr(m, flag)) for m in media])[:, None]
        place = torch.tensor(values).clamp(-1, 1).add(1).mul((_LEVELS - 1) / 2)
        low = place.floor().clamp(0, _LEVELS - 2).long()
        part = (place - low)[:, None]
        out: Tensor = there * (table(low) * (1 - part) + table(low + 1) * part)
        return out


def pad(rows: list[list[int]]) -> Tensor:
    """Right-pad rows of ids to one tensor [B, T]."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def save_model(path: Path, model: TinyLlama, **more: Any) -> None:
    """Write weights and shape, atomically."""
    state = {"config": model.config.to_dict(), "weights": model.state_dict(), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_model(path: Path) -> TinyLlama:
    """The model of a file written by `save_model`, frozen."""
    state = torch.load(path, weights_only=True)
    model = TinyLlama(TinyConfig(**state["config"]))
    model.load_state_dict(state["weights"])
    model.requires_grad_(False)
    return model.eval()


def _media(rng: random.Random, example: Example) -> Media:
    media = draw_media(rng, example.valence, example.emotion)
    x = rng.random()
    return media.without(face=x < 0.15 or x > 0.94, voice=0.15 <= x < 0.30 or x > 0.94)


@dataclass
class _Step:
    """One batch, ready for the model."""

    ids: Tensor
    slot: list[int]
    first: Tensor
    """[B, A]: positions whose next token is part of the answer."""
    target: Tensor
    words: Tensor
    value: Tensor
    media: list[Media]


def _prepare(
    batch: list[Example],
    task: str,
    layout: Layout,
    slots: int,
    pieces: Pieces,
    answers: Answers,
    rng: random.Random,
) -> _Step:
    rows, slot, last, words, values, media = [], [], [], [], [], []
    for example in batch:
        seen = _media(rng, example) if slots else Media(has_face=False, has_voice=False)
        row = build_row(pieces, example.ids, task, layout, slots)
        if task == "emotion":
            emotion = fused_emotion(example.emotion or 0, example.valence, seen)
            answer = answers.emotion_ids[emotion]
            values.append(0.0)
        else:
            value = fused_sentiment(example.valence, seen)
            answer = answers.number(value + rng.gauss(0, 0.1))
            values.append(value)
        media.append(seen)
        slot.append(row.slot)
        last.append(len(row.ids) - 1)
        words.append([NO_TARGET] * row.text + example.words)
        rows.append(row.ids + answer)
    ids = pad(rows)
    first = torch.tensor(last)[:, None] + torch.arange(len(answer))
    width = ids.shape[1]
    return _Step(
        ids=ids,
        slot=slot,
        first=first,
        target=ids.gather(1, first + 1),
        words=torch.tensor([w[:width] + [NO_TARGET] * (width - len(w)) for w in words]),
        value=torch.tensor(values),
        media=media,
    )


def _rate(schedule: Schedule, step: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return (
        schedule.rate * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / schedule.steps)))
    )


def train_stage(
    out: Path,
    processor: Any,
    schedule: Schedule,
    config: TinyConfig,
    *,
    start: Path | None = None,
) -> TinyLlama:
    """Train (or resume) a stage; the finished model is at `out`, its state beside it meanwhile."""
    if out.exists():
        return load_model(out)
    torch.manual_seed(schedule.seed)
    rng = random.Random(schedule.seed)
    model = load_model(start) if start else TinyLlama(config)
    model.requires_grad_(True).train()
    evidence = Evidence(model.width)
    word_head, value_head = nn.Linear(model.width, 1), nn.Linear(model.width, 1)
    parts = nn.ModuleList((model, evidence, word_head, value_head))
    matrices = [p for p in parts.parameters() if p.dim() > 1]
    vectors = [p for p in parts.parameters() if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    state_file, first = out.with_suffix(".state"), 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=False)
        parts.load_state_dict(state["parts"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
        rng.seed(schedule.seed + first)
        _LOG.info("resumed at step %d", first)
    pieces, answers = Pieces(processor), Answers(processor)
    feed = Feed(sentences(processor, schedule.sentences, schedule.seed + 1), schedule.batch, rng)
    words = word_examples(processor)
    began, total = time.monotonic(), 0.0
    for step in range(first, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = _rate(schedule, step)
        task = "emotion" if rng.random() < schedule.emotion_share else "sentiment"
        layout: Layout = "published" if rng.random() < 0.3 else "pseudo-last"
        slots = rng.choice((1, 2, 4, 4, 8)) if schedule.slots and rng.random() > 0.2 else 0
        if task == "sentiment" and (step < schedule.word_steps or rng.random() < 0.12):
            batch = rng.choices(words, k=schedule.batch)
        else:
            batch = feed.next(task)
        made = _prepare(batch, task, layout, slots, pieces, answers, rng)
        rows = model.embed(made.ids)
        if slots:
            places = torch.tensor(made.slot)[:, None] + torch.arange(slots)
            filled = evidence(made.media, slots, rng)
            rows = rows.scatter(1, places[..., None].expand(-1, -1, model.width), filled)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden, middle = model(rows)
            at = hidden.gather(1, made.first[..., None].expand(-1, -1, model.width))
            logits = model.lm_head(at)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), made.target.flatten())
        known = made.words > NO_TARGET / 2
        guess = word_head(middle.float()).squeeze(-1)
        full = loss + functional.smooth_l1_loss(guess[known], made.words[known])
        if task == "sentiment":
            value = value_head(at[:, 0].float()).squeeze(-1)
            full = full + functional.smooth_l1_loss(value, made.value)
        optimiser.zero_grad(set_to_none=True)
        full.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimiser.step()
        total += float(loss.detach())
        done = step + 1
        if done % 50 == 0:
            _LOG.info(
                "step %d of %d: loss %.3f, %.0f s",
                done,
                schedule.steps,
                total / 50,
                time.monotonic() - began,
            )
            total = 0.0
        if done % schedule.save_every == 0 and done < schedule.steps:
            state = {"parts": parts.state_dict(), "optimiser": optimiser.state_dict(), "step": done}
            partial = state_file.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(state_file)
            save_model(out.with_suffix(".latest"), model)
            _LOG.info("%s", validate_text(model, processor))
    save_model(out, model)
    state_file.unlink(missing_ok=True)
    _LOG.info("%s", validate_text(model, processor))
    return load_model(out)


def validate_text(
    model: TinyLlama, processor: Any, *, count: int = 600, seed: int = 990_001
) -> dict[str, float]:
    """On unseen sentences: correlation and error of the expected value, emotion accuracy."""
    found = sentences(processor, count, seed)
    pieces, answers = Pieces(processor), Answers(processor)
    guess, truth = [], list[float]()
    hits, asked = 0, 0
    ordered = sorted(found, key=lambda e: len(e.ids))
    for k in range(0, len(ordered), 100):
        part = ordered[k : k + 100]
        rows = [build_row(pieces, e.ids, "sentiment", "pseudo-last", 0).ids for e in part]
        lengths = torch.tensor([len(r) for r in rows])
        with torch.no_grad():
            prompt = model.embed(pad(rows))
        guess.append(expected(read_numbers(model, answers, prompt, lengths)[0]))
        truth.extend(e.valence for e in part)
        one = [e for e in part if e.emotion is not None]
        rows = [build_row(pieces, e.ids, "emotion", "pseudo-last", 0).ids for e in one]
        lengths = torch.tensor([len(r) for r in rows])
        with torch.no_grad():
            prompt = model.embed(pad(rows))
        best = read_emotions(model, answers, prompt, lengths)[0].argmax(1)
        hits += int((best == np.array([e.emotion for e in one])).sum())
        asked += len(one)
    value, real = np.concatenate(guess), np.array(truth)
    return {
        "r": round(float(np.corrcoef(value, real)[0, 1]), 4),
        "mae": round(float(np.abs(value - real).mean()), 4),
        "emotion_accuracy": round(hits / max(asked, 1), 4),
    }


def small(schedule: Schedule) -> Schedule:
    """The same stage at the scale of a smoke test."""
    return replace(schedule, steps=12, batch=16, sentences=600, word_steps=2, save_every=100)
