"""The same trie after each of several sequences, in one pass."""

from __future__ import annotations

import numpy as np
import pytest
from backbone_cases import TOLERANCE, Open, worst
from make_fixtures import ARCHES

from mse_runtime.errors import BackboneError

pytest_plugins = ("backbone_fixtures",)

TOKENS, PARENTS = [10, 11, 12, 13, 14, 15], [-1, -1, 0, 0, 1, 3]
WANTED = [True, False, True, True, False, True]
PREFIX, ENDS = [1, 2, 3], {0: [20, 21, 22, 23], 2: [30], 1: [40, 41]}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("candidates", [None, [3, 300, 17]])
@pytest.mark.parametrize("options", [{}, {"tree_width": 3}, {"n_outputs_max": 4, "tree_width": 3}])
def test_several_trees_are_each_alone(
    open_toy: Open, arch: str, options: dict[str, int], candidates: list[int] | None
) -> None:
    backbone = open_toy(arch, n_seq_max=4, **options)

    def begin() -> None:
        backbone.clear()
        backbone.prefill(PREFIX, seq=3, logits="none")
        for seq in range(3):
            backbone.copy(3, seq)

    begin()
    alone = [
        backbone.prefill_tree(ids, TOKENS, PARENTS, WANTED, candidates=candidates, seq=seq)
        for seq, ids in ENDS.items()
    ]
    begin()
    rows = [(seq, backbone.embed(ids) if seq else ids) for seq, ids in ENDS.items()]
    found = backbone.prefill_trees(rows, TOKENS, PARENTS, WANTED, candidates=candidates)
    assert found.shape == (3, 1 + sum(WANTED), len(candidates or range(backbone.n_vocab)))
    assert worst(found, alone) <= TOLERANCE
    assert np.ptp(found[:, 0], axis=0).max() > 1e-3  # the sequences differ
    for seq, ids in ENDS.items():
        assert backbone.length(seq) == len(PREFIX) + len(ids)


def test_what_fails_leaves_every_sequence_as_it_was(open_toy: Open) -> None:
    backbone = open_toy(n_ctx=256, n_seq_max=3, tree_width=2)
    for seq in range(3):
        backbone.prefill([5, 6], seq=seq, logits="none")
    for attempt, message in (
        (lambda: backbone.prefill_trees([(0, [1]), (1, [2]), (2, [3])], [1], [-1]), "do not fit"),
        (lambda: backbone.prefill_trees([(0, [1]), (0, [2])], [1], [-1]), "occurs twice"),
        (lambda: backbone.prefill_trees([(0, [1]), (1, [1] * 255)], [1], [-1]), "do not fit"),
        (lambda: backbone.prefill_trees([(0, [1]), (7, [1])], [1], [-1]), "no sequence 7"),
        (lambda: backbone.prefill_trees([], [1], [-1]), "no sequence"),
        (lambda: backbone.prefill_trees([(0, [1] * 200), (1, [1] * 100)], [1], [-1]), "no room"),
    ):
        with pytest.raises(BackboneError, match=message):
            attempt()
        assert [backbone.length(seq) for seq in range(3)] == [2, 2, 2]


def test_room_for_more_sequences_is_made_once(open_toy: Open) -> None:
    backbone = open_toy(n_ctx=256, tree_width=2, kv_type="f32")
    first = backbone.prefill(PREFIX)
    assert backbone.reserve(400, 12, n_seq_max=4, n_outputs=40)
    assert (backbone.n_ctx, backbone.n_seq_max) == (512, 4)
    assert backbone.length(0) == len(PREFIX)
    assert not backbone.reserve(400, 12, n_seq_max=4, n_outputs=40)
    backbone.prefill_trees([(seq, [7]) for seq in range(4)], TOKENS, PARENTS)
    backbone.clear()
    assert worst(backbone.prefill(PREFIX), first) <= TOLERANCE
    with pytest.raises(BackboneError, match="n_seq_max"):
        backbone.reserve(256, n_seq_max=500)
