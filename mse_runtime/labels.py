"""A trie over tokenised labels: the set of answers a task can give.

Scoring a known set needs logits only where the trie branches; tokens in between, and those that
every label starts with, cost positions but no decision. The last token of a label is never fed.
Labels that are a prefix of another cannot be told apart this way and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import BundleError
from mse_runtime.records import dataclass

__all__ = ["LabelTrie"]

Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]
ROOT = -1


@dataclass
class _Node:
    """One token of the trie; `children` maps a token id to a node's number."""

    token: int
    parent: int
    children: dict[int, int] = field(default_factory=dict)
    label: int | None = None


@dataclass(frozen=True)
class LabelTrie:
    """A trie over token sequences.

    `tokens` [n] and `parents` [n] describe the nodes that have to be fed to score the labels (-1:
    the end of the prompt), parents before children, and `branches` [n] those whose logits decide
    something: exactly what `Backbone.prefill_tree` takes. `n_paths` counts the leaves.
    `candidates` [m] are the token ids that occur after some branch, rising: the only columns of
    the logits that matter.
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]
    branches: NDArray[np.bool_]
    candidates: NDArray[np.int32]
    n_labels: int
    n_paths: int
    _steps: tuple[tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]], ...]

    @classmethod
    def build(cls, labels: Sequence[Sequence[int]]) -> LabelTrie:
        """The trie of `labels`: non-empty sequences of token ids, prefix-free and distinct."""
        nodes = _grow(labels)
        inner = _inner(nodes)
        place = {number: i for i, number in enumerate(inner)} | {0: ROOT}
        branches = [number for number in inner if len(nodes[number].children) > 1]
        # Row 0 of the logits is the prompt's; it decides nothing where all labels begin alike.
        deciding = [(0, 0)] if len(nodes[0].children) > 1 else []
        deciding += [(row, number) for row, number in enumerate(branches, 1)]
        candidates = sorted({token for _, number in deciding for token in nodes[number].children})
        column = {token: i for i, token in enumerate(candidates)}
        steps = tuple(
            (
                row,
                tuple(column[token] for token in nodes[number].children),
                tuple(tuple(_labels_under(nodes, c)) for c in nodes[number].children.values()),
            )
            for row, number in deciding
        )
        leaves = [n for n in inner if not any(c in place for c in nodes[n].children.values())]
        return cls(
            tokens=np.array([nodes[n].token for n in inner], np.int32),
            parents=np.array([place[nodes[n].parent] for n in inner], np.int32),
            branches=np.array([len(nodes[n].children) > 1 for n in inner], np.bool_),
            candidates=np.array(candidates, np.int32),
            n_labels=len(labels),
            n_paths=len(leaves),
            _steps=steps,
        )

    def log_probabilities(self, logits: Logits) -> Probabilities:
        """Log-probability of every label [n_labels], normalised over the labels.

        `logits` [1 + k, m] of the `candidates`: after the prompt, then after each of the k
        `branches`. At each branch the softmax runs over the branch's tokens alone.
        """
        scores = np.zeros(self.n_labels)
        for row, columns, under in self._steps:
            values = logits[row][list(columns)].astype(np.float64)
            values -= np.logaddexp.reduce(values)
            for value, labels in zip(values, under, strict=True):
                scores[list(labels)] += value
        return scores


def _grow(labels: Sequence[Sequence[int]]) -> list[_Node]:
    nodes = [_Node(token=-1, parent=ROOT)]
    for index, ids in enumerate(labels):
        at = 0
        for token in ids:
            if (other := nodes[at].label) is not None:
                raise _not_prefix_free(labels, index, other)
            if token not in nodes[at].children:
                nodes[at].children[int(token)] = len(nodes)
                nodes.append(_Node(token=int(token), parent=at))
            at = nodes[at].children[token]
        if at == 0:
            raise BundleError(f"Label number {index} has no token under this bundle's tokeniser.")
        if nodes[at].label is not None or nodes[at].children:
            raise _not_prefix_free(labels, index, next(_labels_under(nodes, at)))
        nodes[at].label = index
    return nodes


def _not_prefix_free(labels: Sequence[Sequence[int]], one: int, other: int) -> BundleError:
    return BundleError(
        f"The labels number {one} and {other} have token sequences of which one starts with the "
        f"other ({list(labels[one])} and {list(labels[other])}), so they cannot be scored. Change "
        "the labels' texts in the bundle's manifest."
    )


def _inner(nodes: list[_Node]) -> list[int]:
    """Nodes that lead to a later branch or are one, breadth first."""
    needed: set[int] = set()
    for number, node in enumerate(nodes):
        if len(node.children) > 1:
            at = number
            while at and at not in needed:
                needed.add(at)
                at = nodes[at].parent
    queue, order = [0], []
    for number in queue:
        below = [child for child in nodes[number].children.values() if child in needed]
        queue.extend(below)
        order.extend(below)
    return order


def _labels_under(nodes: list[_Node], number: int) -> Iterator[int]:
    node = nodes[number]
    if node.label is not None:
        yield node.label
    for child in node.children.values():
        yield from _labels_under(nodes, child)
