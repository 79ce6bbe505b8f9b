"""Samples as token ids around the place of the pseudo tokens, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mse_export.training.features import FeatureStore
from mse_runtime.bundle import Task, TextInput
from mse_runtime.datasets import Sample
from mse_runtime.prompt import Prompt, Tokenizer, build

__all__ = ["Batch", "Example", "answer_text", "buckets", "collate", "encode"]

IGNORE = -100
POOL = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class Example:
    """One sample, tokenised: prompt, and the ids of the right answer."""

    sample: Sample
    prompt: Prompt
    answer: NDArray[np.int32]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """B examples. `ids` [B, L] has zeros where the pseudo tokens go, from column `slot` [B] on.

    `targets` [B, k] are answer ids, IGNORE where an answer is shorter; `places` [B, k] the
    positions whose logits predict them. `ends` [B] count prompt and pseudo tokens; `labels` [B] are
    the samples' own.
    """

    ids: Tensor
    slot: Tensor
    ends: Tensor
    targets: Tensor
    places: Tensor
    audio: Tensor
    audio_len: Tensor
    face: Tensor
    face_len: Tensor
    text: Tensor
    text_len: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Tensor] = {k: v.to(device) for k, v in vars(self).items()}
        return Batch(**moved)


def answer_text(task: Task, label: float, *, exact: bool = False) -> str:
    """The text that is trained for `label` (published-model spec, section 6).

    `exact` formats the number as it is, as the published code does (a tiny negative gives "-0.0");
    otherwise it is rounded to the task's grid, which is what the readout scores.
    """
    if task.kind == "classification":
        return task.labels[int(label)].text
    if exact:
        return (task.number_format or "{:.1f}").format(label)
    low, _ = task.range or (-1.0, 1.0)
    step = task.step or 0.1
    return task.number_text(low + step * round((label - low) / step))


def encode(
    samples: Sequence[Sample],
    task: Task,
    rule: TextInput,
    tokenizer: Tokenizer,
    n_pseudo: int,
    *,
    exact: bool = False,
) -> list[Example]:
    """Tokenise prompts and answers with the runtime's own prompt builder."""
    known: dict[str, NDArray[np.int32]] = {}
    found = []
    for sample in samples:
        text = answer_text(task, sample.label, exact=exact)
        if text not in known:
            known[text] = tokenizer.tokenize(text)
        prompt = build(tokenizer, task.prompt, rule, sample.text, n_pseudo)
        found.append(Example(sample, prompt, known[text]))
    return found


def buckets(lengths: Sequence[int], size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Shuffled batches of indices in which the lengths are alike: less padding, still random.

    The order is shuffled, pools of batches are sorted by length, and the batches shuffled again.
    Every index comes exactly once.
    """
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda i: lengths[i])
        batches += [list(map(int, pool[i : i + size])) for i in range(0, len(pool), size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def collate(examples: Sequence[Example], store: FeatureStore) -> Batch:
    """Pad a list of examples at the end; causal attention never sees the padding."""
    k = max(len(e.answer) for e in examples)
    rows, places, targets = [], [], []
    for e in examples:
        pseudo = np.zeros(e.prompt.n_pseudo, np.int32)
        rows.append(np.concatenate([e.prompt.early, pseudo, e.prompt.late, e.answer]))
        first = len(e.prompt) - 1
        n = len(e.answer)
        places.append(np.minimum(np.arange(first, first + k), first + n - 1))
        targets.append(np.concatenate([e.answer, np.full(k - n, IGNORE)]))
    prepared = [store.get(e.sample) for e in examples]
    audio, audio_len = _pad([p.audio for p in prepared]), [p.audio_len for p in prepared]
    face, face_len = _pad([p.face for p in prepared]), [p.face_len for p in prepared]
    texts = [e.prompt.text_ids for e in examples]
    return Batch(
        ids=torch.from_numpy(_pad(rows).astype(np.int64)),
        slot=torch.tensor([len(e.prompt.early) for e in examples]),
        ends=torch.tensor([len(e.prompt) for e in examples]),
        targets=torch.from_numpy(np.stack(targets).astype(np.int64)),
        places=torch.from_numpy(np.stack(places).astype(np.int64)),
        audio=torch.from_numpy(audio),
        audio_len=torch.tensor(audio_len),
        face=torch.from_numpy(face),
        face_len=torch.tensor(face_len),
        text=torch.from_numpy(_pad(texts).astype(np.int64)),
        text_len=torch.tensor([len(ids) for ids in texts]),
        labels=torch.tensor([e.sample.label for e in examples], dtype=torch.float64),
    )


def _pad(arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    """Stack arrays [T_i, ...] to [B, max T, ...], zeros at the end."""
    longest = max(len(a) for a in arrays)
    out = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out
