"""Reading answers from the torch model: the number trie and the emotion names, batched.

The runtime's readout walks the same trie through llama.cpp; this one serves training-time
validation, where a thousand prompts are read at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mse_export.training.tiny.layout import Answers
from mse_export.training.tiny.model import TinyLlama

__all__ = ["expected", "read_emotions", "read_numbers"]

_SCALE = np.arange(-30, 31, dtype=np.float64) / 10


class _Trie:
    """The 61 numbers as nodes of (token, parent); every answer has four tokens."""

    def __init__(self, answers: Answers) -> None:
        self.nodes: list[tuple[int, int]] = []
        index: dict[tuple[int, ...], int] = {}
        self.paths: list[list[int]] = []
        for ids in answers.number_ids:
            path = []
            for depth in range(1, len(ids)):
                key = tuple(ids[:depth])
                if key not in index:
                    parent = index.get(key[:-1], -1)
                    index[key] = len(self.nodes)
                    self.nodes.append((ids[depth - 1], parent))
                path.append(index[key])
            self.paths.append(path)
        # Children by node (-1 is the root), for the softmax over what may follow.
        self.children: dict[int, list[int]] = {}
        for ids, path in zip(answers.number_ids, self.paths, strict=True):
            for depth, token in enumerate(ids):
                node = -1 if depth == 0 else path[depth - 1]
                self.children.setdefault(node, [])
                if token not in self.children[node]:
                    self.children[node].append(token)


@torch.no_grad()
def read_numbers(
    model: TinyLlama,
    answers: Answers,
    rows: Tensor,
    lengths: Tensor,
    temperatures: Sequence[float] = (1.0,),
) -> NDArray[np.float64]:
    """Probabilities of -3.0..+3.0, float64 [temperatures, B, 61], after prompts `rows` [B, T, D].

    `lengths` [B]: the prompt's own length in each row; what follows is padding. A temperature
    divides the log-probabilities of whole numbers, as in the runtime.
    """
    trie = _Trie(answers)
    batch, length, _ = rows.shape
    count = len(trie.nodes)
    tokens = torch.tensor([token for token, _ in trie.nodes])
    depth: list[int] = []
    ancestor = torch.zeros(count, count, dtype=torch.bool)
    for node, (_, parent) in enumerate(trie.nodes):
        depth.append(0 if parent < 0 else depth[parent] + 1)
        ancestor[node, node] = True
        if parent >= 0:
            ancestor[node] |= ancestor[parent]
    tail = model.embed(tokens)[None].expand(batch, -1, -1)
    positions = torch.cat(
        (torch.arange(length)[None].expand(batch, -1), lengths[:, None] + torch.tensor(depth)), 1
    )
    allowed = torch.zeros(batch, length + count, length + count, dtype=torch.bool)
    allowed[:, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[:, length:, :length] = (torch.arange(length)[None] < lengths[:, None])[:, None]
    allowed[:, length:, length:] = ancestor
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = model(torch.cat((rows, tail.to(rows.dtype)), 1), positions, allowed)
    hidden = hidden.float()
    last = hidden[torch.arange(batch), lengths - 1]
    weight = model.lm_head.weight
    raw = {
        node: (last if node < 0 else hidden[:, length + node]) @ weight[options].T
        for node, options in trie.children.items()
    }
    scores = _numbers(trie, answers, raw)
    return np.stack([(scores / t).softmax(-1).numpy() for t in temperatures])


def _numbers(trie: _Trie, answers: Answers, raw: dict[int, Tensor]) -> Tensor:
    """Log-probabilities of the 61 numbers, float64 [B, 61]."""
    after: dict[tuple[int, int], Tensor] = {}
    for node, options in trie.children.items():
        logs = raw[node].log_softmax(-1)
        for k, token in enumerate(options):
            after[node, token] = logs[:, k]
    total = torch.stack(
        [
            torch.stack(
                [after[-1 if d == 0 else path[d - 1], token] for d, token in enumerate(ids)]
            ).sum(0)
            for ids, path in zip(answers.number_ids, trie.paths, strict=True)
        ],
        1,
    )
    return total.double()


def expected(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected value, float64 [B], of distributions over the 61 numbers."""
    return np.asarray(probabilities @ _SCALE, dtype=np.float64)


@torch.no_grad()
def read_emotions(
    model: TinyLlama,
    answers: Answers,
    rows: Tensor,
    lengths: Tensor,
    temperatures: Sequence[float] = (1.0,),
) -> NDArray[np.float64]:
    """Probabilities of the emotions, [temperatures, B, 7], after prompts `rows` [B, T, D]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = model(rows)
    last = hidden.float()[torch.arange(rows.shape[0]), lengths - 1]
    options = [ids[0] for ids in answers.emotion_ids]
    logits = last @ model.lm_head.weight[options].T
    return np.stack([(logits.double() / t).softmax(-1).numpy() for t in temperatures])
