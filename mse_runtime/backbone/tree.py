"""A token trie as sequences: which of them each node belongs to.

llama.cpp has no trees, but an entry of a batch may belong to several sequences. Give every leaf
its own sequence, let a node belong to the sequences of all leaves below it, and each token sees
exactly its ancestors; shared prefixes are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mse_runtime.errors import BackboneError

__all__ = ["Wave", "check_parents", "waves"]


@dataclass(frozen=True)
class Wave:
    """The nodes one pass decodes: parents before children, and the leaf numbers below each."""

    nodes: list[int]
    leaves: list[list[int]]
    n_leaves: int


def check_parents(parents: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Depths int32 [n] (0 for children of the root); BackboneError unless parents come first."""
    depths = np.zeros(len(parents), np.int32)
    for node, parent in enumerate(parents.tolist()):
        if not -1 <= parent < node:
            raise BackboneError(
                f"decode_tree: node {node} has the parent {parent}. Give parents before children, "
                "-1 for those that follow the sequence itself."
            )
        depths[node] = depths[parent] + 1 if parent >= 0 else 0
    return depths


def waves(parents: Sequence[int], max_leaves: int) -> Iterator[Wave]:
    """Split a trie into passes of at most `max_leaves` leaves, neighbours together.

    One pass is the common case. A node shared between passes is decoded in each of them.
    """
    n = len(parents)
    inner = {parent for parent in parents if parent >= 0}
    leaves = [node for node in range(n) if node not in inner]
    paths = {leaf: _path(parents, leaf) for leaf in leaves}
    leaves.sort(key=lambda leaf: paths[leaf])  # depth-first order keeps siblings in one pass
    for start in range(0, len(leaves), max_leaves):
        group = leaves[start : start + max_leaves]
        below: dict[int, list[int]] = {}
        for number, leaf in enumerate(group):
            for node in paths[leaf]:
                below.setdefault(node, []).append(number)
        nodes = sorted(below)
        yield Wave(nodes, [below[node] for node in nodes], len(group))


def _path(parents: Sequence[int], node: int) -> list[int]:
    """From the root's child down to `node`."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]
