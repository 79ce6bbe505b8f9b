"""Fitting the adapter to the frozen language model, both tasks in one adapter.

Face and voice do not depend on the words, nor (but for the lips) on each other, so half of the time
a clip's face is paired with another clip's voice and a fresh sentence of the grammar, and labelled
anew: far more combinations than clips. Modality
dropout uses length 0, which is how the runtime tells the adapter that something is missing.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mse_export.adapter import Adapter
from mse_export.adapter_shapes import FUSION_WIDTH, AdapterDims
from mse_export.training.tiny.corpus import Example
from mse_export.training.tiny.lexicon import EMOTIONS
from mse_export.training.tiny.model import TinyLlama
from mse_export.training.tiny.prompter import Item, Prompter, padded
from mse_export.training.tiny.readout import expected, read_emotions, read_numbers
from mse_export.training.tiny.schedule import AdapterSchedule
from mse_export.training.tiny.world import fused_emotion, fused_sentiment

__all__ = ["Encoders", "fit", "validate", "warmed_up"]

_LOG = logging.getLogger(__name__)


def _augment(item: Item, rng: np.random.Generator) -> Item:
    """A little noise, a shifted resting level, and another start."""

    def shake(rows: NDArray[np.float32], offset: float) -> NDArray[np.float32]:
        start = int(rng.integers(0, max(1, len(rows) // 6)))
        part = rows[start:]
        shift = rng.normal(0, offset, (1, rows.shape[1]))
        noise = rng.normal(0, 0.1, part.shape)
        return np.asarray(part + shift + noise, np.float32)

    return replace(item, audio=shake(item.audio, 0.2), face=shake(item.face, 0.15))


def _with_text(item: Item, sentence: Example) -> Item:
    return replace(item, ids=sentence.ids, valence=sentence.valence, emotion=sentence.emotion)


def _with_voice(item: Item, other: Item) -> Item:
    heard = replace(
        item.media, voice=other.media.voice, voice_intensity=other.media.voice_intensity
    )
    return replace(item, audio=other.audio, media=heard)


def _new_adapter(model: TinyLlama, schedule: AdapterSchedule, widths: tuple[int, int]) -> Adapter:
    torch.manual_seed(schedule.seed)
    adapter = Adapter(
        AdapterDims(
            n_embd=model.width,
            audio_dim=widths[0],
            video_dim=widths[1],
            audio_hidden=64,
            video_hidden=64,
            n_pseudo=schedule.pseudo,
        )
    )
    # The mixer multiplies: started at one it passes the media through.
    nn.init.normal_(adapter.text_guide_mixer.text_mlp.weight, 0.0, 0.02)
    nn.init.ones_(adapter.text_guide_mixer.text_mlp.bias)
    # Pseudo tokens of the embeddings' size from the first step on.
    nn.init.normal_(adapter.mutli_scale_fusion.multi_scale_projector.weight, 0.0, 0.15)
    if schedule.single_scale:
        for name in ("scale2", "scale3"):
            for parameter in adapter.mutli_scale_fusion.get_submodule(name).parameters():
                nn.init.zeros_(parameter)
                parameter.requires_grad_(False)
    return adapter


class _Teacher(nn.Module):
    """Auxiliary heads on the two encoders, thrown away after fitting."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = [adapter]  # in a list: its parameters are not this module's
        self.face = nn.Linear(FUSION_WIDTH, 1 + len(EMOTIONS))
        self.voice = nn.Linear(FUSION_WIDTH, 1 + len(EMOTIONS))

    def loss(self, batch: Sequence[Item]) -> Tensor:
        """Valence and emotion from the face, arousal and emotion from the voice."""
        adapter, media = self.adapter[0], [i.media for i in batch]
        face, voice = padded([i.face for i in batch]), padded([i.audio for i in batch])
        seen = self.face(adapter.video_LSTM(face, torch.tensor([len(i.face) for i in batch])))
        heard = self.voice(adapter.audio_LSTM(voice, torch.tensor([len(i.audio) for i in batch])))
        return (
            functional.smooth_l1_loss(seen[:, 0], torch.tensor([m.valence / 2 for m in media]))
            + functional.smooth_l1_loss(heard[:, 0], torch.tensor([m.arousal * 2 for m in media]))
            + 0.3 * functional.cross_entropy(seen[:, 1:], torch.tensor([m.face for m in media]))
            + 0.3 * functional.cross_entropy(heard[:, 1:], torch.tensor([m.voice for m in media]))
        )


#: Weights of the teacher and the two encoders.
Encoders = list[dict[str, Tensor]]


def _warm_parts(teacher: _Teacher) -> list[nn.Module]:
    adapter = teacher.adapter[0]
    return [teacher, adapter.audio_LSTM, adapter.video_LSTM]


def _widths(training: Sequence[Item]) -> tuple[int, int]:
    return training[0].audio.shape[1], training[0].face.shape[1]


def warmed_up(model: TinyLlama, training: Sequence[Item], schedule: AdapterSchedule) -> Encoders:
    """Encoders that have learned what the actors show, before the first prompt."""
    rng, noise = random.Random(schedule.seed), np.random.default_rng(schedule.seed)
    teacher = _Teacher(_new_adapter(model, schedule, _widths(training)))
    parts = _warm_parts(teacher)
    weights = [p for part in parts for p in part.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.05)
    total = 0.0
    for step in range(schedule.warm_up):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (0.1 + 0.9 * (1 - step / schedule.warm_up))
        loss = teacher.loss([_augment(i, noise) for i in rng.choices(training, k=schedule.batch)])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            _LOG.info("encoders step %d: loss %.3f", step + 1, total / 100)
            total = 0.0
    return [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]


def fit(
    model: TinyLlama,
    processor: Any,
    training: Sequence[Item],
    fresh: Sequence[Example],
    validation: Sequence[Item],
    schedule: AdapterSchedule,
    *,
    every: int = 100,
    encoders: Encoders | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Fit an adapter, keep the best of its validations; returns it and that validation.

    `fresh` are short sentences of the grammar that clips' media are paired with. Without
    `validation` the last state is returned. `encoders` of `warmed_up` spare the warm-up.
    """
    rng, noise = random.Random(schedule.seed), np.random.default_rng(schedule.seed)
    if encoders is None:
        encoders = warmed_up(model, training, schedule)
    adapter = _new_adapter(model, schedule, _widths(training))
    prompter = Prompter(model, adapter, processor, schedule.layout, schedule.mixer)
    teacher = _Teacher(adapter)
    for part, state in zip(_warm_parts(teacher), encoders, strict=True):
        part.load_state_dict(state)
    trainable = [p for p in adapter.parameters() if p.requires_grad]
    trainable += list(teacher.parameters())
    optimiser = torch.optim.AdamW(trainable, lr=schedule.rate, weight_decay=0.01)
    with_emotion = [e for e in fresh if e.emotion is not None]
    spoken = [i for i in training if i.emotion is not None]
    best: tuple[float, dict[str, Any], dict[str, float]] | None = None
    began, total = time.monotonic(), 0.0
    for step in range(schedule.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate * min(1, (step + 1) / 30) * (0.03 + 0.97 * cosine)
        emotion = rng.random() < schedule.emotion_share
        if rng.random() < schedule.fresh_text:
            texts = rng.choices(with_emotion if emotion else fresh, k=schedule.batch)
            media = rng.choices(training, k=schedule.batch)
            chosen = [_with_text(m, t) for m, t in zip(media, texts, strict=True)]
        else:
            chosen = rng.choices(spoken if emotion else training, k=schedule.batch)
        voices = rng.choices(training, k=schedule.batch)
        chosen = [
            _with_voice(item, other) if rng.random() < schedule.fresh_voice else item
            for item, other in zip(chosen, voices, strict=True)
        ]
        batch = [_augment(item, noise) for item in chosen]
        drop = noise.random((2, len(batch)))
        both = noise.random(len(batch)) < schedule.drop_both
        audio = ~((drop[0] < schedule.drop_audio) | both)
        face = ~((drop[1] < schedule.drop_face) | both)
        answers = []
        for item, has_audio, has_face in zip(batch, audio, face, strict=True):
            seen = item.media.without(face=not has_face, voice=not has_audio)
            if emotion:
                label = fused_emotion(item.emotion or 0, item.valence, seen)
                answers.append(prompter.answers.emotion_ids[label])
            else:
                value = fused_sentiment(item.valence, seen) + rng.gauss(0, 0.1)
                answers.append(prompter.answers.number(value))
        rows, lengths, ids = prompter.rows(
            batch,
            "emotion" if emotion else "sentiment",
            answers,
            audio=audio.tolist(),
            face=face.tolist(),
        )
        first = lengths[:, None] - 1 + torch.arange(len(answers[0]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden, _ = model(rows)
            at = hidden.gather(1, first[..., None].expand(-1, -1, model.width))
            logits = model.lm_head(at)
        target = ids.gather(1, first + 1)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), target.flatten())
        full = loss + 0.3 * teacher.loss(batch)
        optimiser.zero_grad(set_to_none=True)
        full.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        total += float(loss.detach())
        done = step + 1
        if validation and (done % every == 0 or done == schedule.steps):
            found = validate(model, adapter, processor, validation, schedule)
            _LOG.info(
                "adapter step %d of %d: loss %.3f, %s, %.0f s",
                done,
                schedule.steps,
                total / every,
                found,
                time.monotonic() - began,
            )
            total = 0.0
            score = found["r"] + 0.5 * found["emotion_accuracy"]
            if best is None or score > best[0]:
                state = {k: v.clone() for k, v in adapter.state_dict().items()}
                best = (score, state, found)
    if best is None:
        return adapter.eval(), {}
    adapter.load_state_dict(best[1])
    return adapter.eval(), best[2]


@torch.no_grad()
def validate(
    model: TinyLlama,
    adapter: Adapter,
    processor: Any,
    clips: Sequence[Item],
    schedule: AdapterSchedule,
    *,
    audio: bool = True,
    face: bool = True,
    shuffle: bool = False,
) -> dict[str, float]:
    """Correlation, error, two-class accuracy and emotion accuracy against the full labels.

    `shuffle` gives every clip another person's face and voice: the control for what the media add.
    """
    prompter = Prompter(model, adapter, processor, schedule.layout, schedule.mixer)
    shown = list(clips)
    if shuffle:
        half = len(clips) // 2
        other = [*clips[half:], *clips[:half]]
        shown = [replace(c, audio=o.audio, face=o.face) for c, o in zip(clips, other, strict=True)]
    values: list[NDArray[np.float64]] = []
    hits = asked = 0
    for start in range(0, len(shown), 64):
        part = shown[start : start + 64]
        keep_audio, keep_face = [audio] * len(part), [face] * len(part)
        rows, lengths, _ = prompter.rows(part, "sentiment", audio=keep_audio, face=keep_face)
        values.append(expected(read_numbers(model, prompter.answers, rows, lengths)[0]))
        one = [i for i in part if i.emotion is not None]
        if one:
            keep_audio, keep_face = [audio] * len(one), [face] * len(one)
            rows, lengths, _ = prompter.rows(one, "emotion", audio=keep_audio, face=keep_face)
            best = read_emotions(model, prompter.answers, rows, lengths)[0].argmax(1)
            truth = [fused_emotion(i.emotion or 0, i.valence, i.media) for i in one]
            hits += int((best == np.array(truth)).sum())
            asked += len(one)
    value = np.concatenate(values)
    truth_value = np.array([fused_sentiment(i.valence, i.media) for i in clips])
    words = np.array([i.valence for i in clips])
    clear = np.abs(truth_value) > 0.05
    against = clear & (np.sign(words) != np.sign(truth_value)) & (np.abs(words) > 0.3)
    right = np.sign(value) == np.sign(truth_value)
    return {
        "r": round(float(np.corrcoef(value, truth_value)[0, 1]), 4),
        "mae": round(float(np.abs(value - truth_value).mean()), 4),
        "acc2": round(float(right[clear].mean()), 4),
        "against": round(float(right[against].mean()), 4) if against.any() else float("nan"),
        "emotion_accuracy": round(hits / max(asked, 1), 4),
    }
