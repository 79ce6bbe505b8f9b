"""A token trie as sequences: which of them each node belongs to.

llama.cpp has no trees, but an entry of a batch may belong to several sequences. Give every leaf
its own sequence, let a node belong to the sequences of all leaves below it, and each token sees
exactly its ancestors; shared prefixes are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mse_runtime.backbone import checks
from mse_runtime.errors import BackboneError
from mse_runtime.records import dataclass

__all__ = ["Trie", "Wave"]


@dataclass(frozen=True)
class Wave:
    """The nodes one pass decodes: parents before children, and the leaf numbers below each."""

    nodes: list[int]
    leaves: list[list[int]]
    n_leaves: int


@dataclass(frozen=True)
class Trie:
    """Token ids [n], the node before each (-1: none), whose logits are wanted, and depths."""

    tokens: npt.NDArray[np.int32]
    parents: list[int]
    wanted: npt.NDArray[np.bool_]
    depths: npt.NDArray[np.int32]

    @classmethod
    def checked(
        cls, tokens: npt.ArrayLike, parents: npt.ArrayLike, wanted: npt.ArrayLike | None,
        n_vocab: int,
    ) -> Trie:  # fmt: skip
        """The trie, or a BackboneError unless all fits together and parents come first."""
        ids = checks.token_ids(tokens, n_vocab)
        links = checks.whole_numbers(parents, "parents").tolist()
        flags = np.ones(len(ids), np.bool_) if wanted is None else np.asarray(wanted, np.bool_)
        if len(links) != len(ids) or flags.shape != ids.shape:
            raise BackboneError(
                f"A tree of {len(ids)} tokens needs as many parents and flags, not {len(links)} "
                f"and {flags.size}."
            )
        depths = np.zeros(len(ids), np.int32)
        for node, parent in enumerate(links):
            if not -1 <= parent < node:
                raise BackboneError(
                    f"Node {node} of the tree has the parent {parent}. Give parents before "
                    "children, -1 for those that follow the inputs themselves."
                )
            depths[node] = depths[parent] + 1 if parent >= 0 else 0
        return cls(ids, links, flags, depths)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def height(self) -> int:
        """Positions from the inputs' end to the deepest node."""
        return int(self.depths.max()) + 1 if len(self) else 0

    @property
    def leaves(self) -> list[int]:
        inner = set(self.parents)
        return [node for node in range(len(self)) if node not in inner]

    @property
    def n_wanted(self) -> int:
        return int(self.wanted.sum())

    def waves(self, max_leaves: int) -> Iterator[Wave]:
        """Passes of at most `max_leaves` leaves, neighbours together; at least one pass.

        One is the common case. A node shared between passes is decoded in each of them.
        """
        leaves = self.leaves
        paths = {leaf: self._path(leaf) for leaf in leaves}
        leaves.sort(key=lambda leaf: paths[leaf])  # depth-first order keeps siblings in one pass
        for start in range(0, max(1, len(leaves)), max(1, max_leaves)):
            group = leaves[start : start + max_leaves]
            below: dict[int, list[int]] = {}
            for number, leaf in enumerate(group):
                for node in paths[leaf]:
                    below.setdefault(node, []).append(number)
            nodes = sorted(below)
            yield Wave(nodes, [below[node] for node in nodes], len(group))

    def _path(self, node: int) -> list[int]:
        """From the root's child down to `node`."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]
