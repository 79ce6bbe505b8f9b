"""What is computed from a batch: the loss of the answer tokens, and scores of all answers.

Published-model spec, sections 3 and 6: the answer's tokens follow the prompt as embeddings, and
the loss is the cross-entropy of those tokens alone, averaged over the answer tokens of the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mse_export.training.examples import IGNORE, Batch
from mse_export.training.frozen import Frozen
from mse_runtime.labels import LabelTrie

__all__ = ["assemble", "loss_sum", "score_answers"]


def assemble(frozen: Frozen, adapter: nn.Module, batch: Batch) -> Tensor:
    """Embedding rows [B, L, D] with the pseudo tokens in their place; gradients reach the adapter.

    `batch` lies on the backbone's device already.
    """
    with torch.autocast(frozen.device.type, enabled=False):  # the adapter is float32 always
        pseudo = adapter(
            batch.audio,
            batch.audio_len,
            batch.face,
            batch.face_len,
            frozen.embed(batch.text),
            batch.text_len,
        )
    rows = frozen.embed(batch.ids)
    columns = batch.slot[:, None] + torch.arange(pseudo.shape[1], device=rows.device)
    index = columns[..., None].expand(-1, -1, rows.shape[2])
    return rows.scatter(1, index, pseudo.float())


def loss_sum(frozen: Frozen, adapter: nn.Module, batch: Batch) -> Tensor:
    """Summed cross-entropy of the answer tokens; divide by `batch.n_targets` for the mean."""
    logits = frozen.logits(assemble(frozen, adapter, batch), batch.places)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


@torch.no_grad()
def score_answers(
    frozen: Frozen, adapter: nn.Module, batch: Batch, trie: LabelTrie
) -> NDArray[np.float64]:
    """Log-probability of every label [B, n_labels], as the runtime's readout gives them.

    Prompt and trie go through the model in one pass; a node sees the prompt and its own ancestors.
    """
    rows = assemble(frozen, adapter, batch)
    device = rows.device
    added = trie.tokens.astype(np.int64)
    starts = batch.ends
    length = int(starts.max()) + len(added)
    if length > rows.shape[1]:
        rows = nn.functional.pad(rows, (0, 0, 0, length - rows.shape[1]))
    rows = rows[:, :length].clone()
    if len(added):
        columns = starts[:, None] + torch.arange(len(added), device=device)
        extra = frozen.embed(torch.from_numpy(added)).expand(len(batch), -1, -1)
        rows = rows.scatter(1, columns[..., None].expand(-1, -1, rows.shape[2]), extra)
    wanted = torch.from_numpy(np.append(0, 1 + np.flatnonzero(trie.branches))).to(device)
    places = (starts - 1)[:, None] + wanted
    mask, position_ids = None, None
    if len(added):
        mask, position_ids = _tree_mask(trie, starts, length)
    logits = frozen.logits(rows, places, mask=mask, position_ids=position_ids).cpu().numpy()
    return np.stack([trie.log_probabilities(found[:, trie.candidates]) for found in logits])


def _tree_mask(trie: LabelTrie, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Attention [B, 1, L, L] and positions [B, L] for trie nodes laid out from `starts` [B] on."""
    device = starts.device
    n = len(trie.tokens)
    sees = np.eye(n, dtype=np.bool_)
    depth = np.zeros(n, np.int64)
    for node, parent in enumerate(trie.parents):
        if parent >= 0:
            sees[node] |= sees[parent]
            depth[node] = depth[parent] + 1
    tree, deep = torch.from_numpy(sees).to(device), torch.from_numpy(depth).to(device)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = mask.expand(len(starts), -1, -1).clone()
    positions = torch.arange(length, device=device).expand(len(starts), -1).clone()
    for i, start in enumerate(starts.tolist()):
        mask[i, start : start + n, start : start + n] = tree
        positions[i, start : start + n] = start + deep
    return mask[:, None], positions
