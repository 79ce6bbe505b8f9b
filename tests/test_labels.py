"""The label trie: every label's probability from as few logits as possible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mse_runtime.errors import BundleError
from mse_runtime.labels import LabelTrie

VOCAB = 12


def logits_after(ids: tuple[int, ...]) -> np.ndarray:
    """A toy language model: logits that depend on the whole context."""
    seed = hash(ids) % (1 << 32)
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 3


def context(trie: LabelTrie, node: int) -> tuple[int, ...]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, int(trie.tokens[node]))
        node = int(trie.parents[node])
    return tuple(path)


def score(trie: LabelTrie) -> np.ndarray:
    wanted = [-1, *np.flatnonzero(trie.branches)]
    logits = np.stack([logits_after(context(trie, i)) for i in wanted])
    return trie.log_probabilities(logits[:, trie.candidates])


def by_hand(labels: list[list[int]]) -> list[float]:
    """Each label alone: at every step a softmax over the tokens some label continues with."""
    result = []
    for label in labels:
        total = 0.0
        for k, token in enumerate(label):
            options = sorted({other[k] for other in labels if other[:k] == label[:k]})
            values = logits_after(tuple(label[:k]))[options].astype(np.float64)
            total += values[options.index(token)] - np.logaddexp.reduce(values)
        result.append(total)
    return result


def prefix_free(labels: list[list[int]]) -> bool:
    return all(
        a is b or a != b[: len(a)]
        for i, a in enumerate(labels)
        for b in labels[:i] + labels[i + 1 :]
    )


label_sets = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), min_size=1, max_size=12
)


@given(label_sets)
def test_trie_equals_scoring_each_label_alone(labels: list[list[int]]) -> None:
    if not prefix_free(labels):
        with pytest.raises(BundleError):
            LabelTrie.build(labels)
        return
    trie = LabelTrie.build(labels)
    found = score(trie)
    np.testing.assert_allclose(found, by_hand(labels), atol=1e-9)
    assert np.exp(found).sum() == pytest.approx(1.0)
    assert all(parent < i for i, parent in enumerate(trie.parents))


def test_forced_tokens_are_fed_and_decide_nothing() -> None:
    # "▁ ▁ 0", "▁ ▁ 1": the blanks are forced; only the logits after the second are asked for.
    trie = LabelTrie.build([[5, 6, 0], [5, 6, 1], [5, 6, 2]])
    assert trie.tokens.tolist() == [5, 6]
    assert trie.parents.tolist() == [-1, 0]
    assert trie.branches.tolist() == [False, True]


def test_a_single_label_needs_nothing() -> None:
    trie = LabelTrie.build([[5, 6, 7]])
    assert len(trie.tokens) == 0
    assert score(trie).tolist() == [0.0]


def test_numbers_share_their_beginnings() -> None:
    # sign, digit, point, digit: one node per sign, digit and point, none for the last digit.
    labels = [
        [sign, whole, 10, tenth] for sign in (8, 9) for whole in (0, 1) for tenth in (0, 1, 2)
    ]
    trie = LabelTrie.build(labels)
    assert len(trie.tokens) == 2 + 4 + 4
    assert trie.branches.sum() == 2 + 4  # a digit decides nothing: the point follows
    assert trie.n_paths == 4
    assert trie.n_labels == 12


def test_a_label_without_tokens_is_refused() -> None:
    with pytest.raises(BundleError, match="no token"):
        LabelTrie.build([[1], []])
