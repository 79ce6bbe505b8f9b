"""What a pass leaves out and what it takes in: the vocabulary's logits, rows that fill it up."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from backbone_cases import TOLERANCE, Open, worst
from hypothesis import given
from hypothesis import strategies as st
from make_fixtures import ARCHES, toy_gguf

from mse_runtime.backbone import Backbone, head
from mse_runtime.backbone.batch import Entries, fillers
from mse_runtime.backbone.file_checks import check_file, repacking_pays
from mse_runtime.errors import BackboneError
from mse_runtime.gguf import Gguf, TensorInfo

pytest_plugins = ("backbone_fixtures",)

TOKENS, PARENTS = [10, 11, 12, 13, 14, 15, 16, 10], [-1, -1, 0, 0, 1, 2, 2, 6]
ONLY = [3, 300, 17, 17]
IDS = np.arange(20, 60)


def taken(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each tapped pass gave, as they come."""
    rows: list[int] = []
    disarm = backbone._tap.disarm

    def watched() -> Any:
        found = disarm()
        rows.append(len(found))
        return found

    monkeypatch.setattr(backbone._tap, "disarm", watched)
    return rows


# Candidates


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("options", [{}, {"tree_width": 2}, {"n_outputs_max": 3, "tree_width": 2}])
def test_candidates_are_columns_of_all_logits(
    open_toy: Open, arch: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mse_kernels.tap")
    backbone = open_toy(arch, **options)
    if backbone._tap is None:
        pytest.skip("the kernel library was not built")
    rows = taken(backbone, monkeypatch)
    every = backbone.prefill_tree(IDS, TOKENS, PARENTS)
    assert rows == []
    backbone.clear()
    found = backbone.prefill_tree(IDS, TOKENS, PARENTS, candidates=ONLY)
    assert sum(rows) >= 1 + len(TOKENS)
    assert found.shape == (1 + len(TOKENS), len(ONLY))
    assert worst(found, every[:, ONLY]) <= TOLERANCE
    assert np.ptp(found) > 1
    # A pass that ends early leaves the cache as a whole one does, and later ones whole.
    assert backbone.length() == len(IDS)
    assert worst(backbone.prefill([10]), every[1]) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("repacked", [False, True])
def test_candidates_in_every_weight_type(tmp_path: Path, dtype: str, repacked: bool) -> None:
    """llama.cpp rounds the hidden states to the precision of the weights' own products."""
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype=dtype)
    with Backbone.open(path, kv_type="f32", threads=1, extra_bufts=repacked) as backbone:
        every = backbone.prefill_tree(IDS, TOKENS, PARENTS)
        backbone.clear()
        found = backbone.prefill_tree(IDS, TOKENS, PARENTS, candidates=ONLY)
    assert worst(found, every[:, ONLY]) <= 0.02 * np.abs(every).max()


def test_no_node_is_wanted(open_toy: Open) -> None:
    backbone = open_toy()
    found = backbone.prefill_tree(IDS, [7], [-1], [False], candidates=ONLY)
    backbone.clear()
    assert worst(found[0], backbone.prefill(IDS)[ONLY]) <= TOLERANCE
    assert backbone.prefill_tree([1], [], [], candidates=[]).shape == (1, 0)


@pytest.mark.parametrize("reason", ["long", "rounded", "no kernels", "other graph", "no room"])
def test_where_the_pass_cannot_end_early_all_logits_are_cut(
    open_toy: Open, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "no kernels":
        monkeypatch.setattr("mse_runtime.backbone.loading.make_tap", lambda *_: None)
    if reason == "other graph":
        monkeypatch.setattr(head, "ARCHITECTURES", frozenset({"qwen2"}))
    ids = np.arange(600) % 500 if reason == "long" else IDS
    table = "bf16" if reason == "rounded" else "exact"
    backbone = open_toy(n_ctx=1024, rope_table=table)
    if reason == "no room":
        pytest.importorskip("mse_kernels.tap")
        if backbone._tap is None:
            pytest.skip("the kernel library was not built")
        backbone._tap._struct.capacity = 100
    found = backbone.prefill_tree(ids, TOKENS, PARENTS, candidates=ONLY)
    backbone.clear()
    every = backbone.prefill_tree(ids, TOKENS, PARENTS)
    assert worst(found, every[:, ONLY]) == 0


def test_what_follows_the_output_matrix_is_not_left_out(
    toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mse_runtime.gguf import Gguf

    with Gguf.open(toys["llama"]) as found:
        assert head.Head(found).plain
        for key in ("llama.logit_scale", "llama.final_logit_softcapping"):
            monkeypatch.setitem(found.metadata, key, 30.0)
            assert not head.Head(found).plain
            monkeypatch.delitem(found.metadata, key)
        monkeypatch.setitem(found.tensors, "output.bias", found.tensors["output.weight"])
        assert not head.Head(found).plain


def test_candidates_that_do_not_exist(open_toy: Open) -> None:
    with pytest.raises(BackboneError, match=r"0 \.\. 513"):
        open_toy().prefill_tree(IDS, [1], [-1], candidates=[514])


def test_a_failed_pass_leaves_the_tap_off(open_toy: Open) -> None:
    backbone = open_toy(n_seq_max=2)
    if backbone._tap is None:
        pytest.skip("the kernel library was not built")
    backbone.prefill(np.arange(120), seq=1, logits="none")
    with pytest.raises(BackboneError, match="no room"):
        backbone.prefill_tree(np.arange(140), [1], [-1], candidates=ONLY)
    assert not backbone._tap._struct.armed
    assert backbone.prefill(IDS).shape == (backbone.n_vocab,)


# Rows that fill a pass up


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows filled each pass up, of models opened from now on: as where weights are
    repacked, whatever the layout is here."""
    counts: list[int] = []
    fill = Entries.filled

    def counted(entries: Entries, count: int, sequence: int) -> Entries:
        counts.append(count)
        return fill(entries, count, sequence)

    monkeypatch.setattr(Entries, "filled", counted)
    opened = Backbone.open.__func__  # type: ignore[attr-defined]

    def repacked(cls: type[Backbone], *args: Any, **options: Any) -> Backbone:
        backbone: Backbone = opened(cls, *args, **options)
        backbone.info["repacked"] = backbone.info["extra_bufts"]
        return backbone

    monkeypatch.setattr(Backbone, "open", classmethod(repacked))
    return counts


@given(st.integers(1, 4096))
def test_fillers_are_few_and_end_on_whole_tiles(n: int) -> None:
    more = fillers(n)
    assert 0 <= more <= 3
    assert (n + more) % 4 == 0 or (more == 0 and n % 4 == 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 13, 14, 15])
def test_repacked_weights_are_filled_up_without_a_trace(
    tmp_path: Path, n: int, filled: list[int]
) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    options: dict[str, Any] = {"kv_type": "f32", "threads": 1, "n_seq_max": 2}
    ids = np.arange(20, 20 + n)

    def answers(backbone: Backbone) -> list[Any]:
        found = [backbone.prefill(ids), backbone.prefill_tree(ids, TOKENS, PARENTS)]
        assert backbone.length() == 2 * n
        found.append(backbone.prefill_many([(0, [30]), (1, ids)]))
        assert [backbone.length(seq) for seq in (0, 1)] == [2 * n + 1, n]
        return found

    with Backbone.open(path, extra_bufts=True, **options) as backbone:
        assert not backbone.info["mapped"]
        found = answers(backbone)
        backbone.clear()
        again = answers(backbone)
    assert filled or n == 4
    filled.clear()
    with Backbone.open(path, extra_bufts=False, **options) as plain:
        for one, two, expected in zip(found, again, answers(plain), strict=True):
            assert worst(one, two) == 0
            # The two kernels round activations differently.
            assert worst(one, expected) <= 0.02 * np.abs(expected).max()
    assert not filled


def test_a_full_cache_is_not_filled_beyond_its_end(tmp_path: Path, filled: list[int]) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    with Backbone.open(path, extra_bufts=True, threads=1, n_ctx=256, n_seq_max=2) as backbone:
        backbone.prefill(np.arange(100), seq=1, logits="none")
        backbone.prefill(np.arange(99), logits="none")
        backbone.prefill(np.arange(54), logits="none")
        backbone.prefill(np.arange(3))
        assert [backbone.length(seq) for seq in (0, 1)] == [156, 100]
        assert filled


@pytest.mark.parametrize("positions", [10, 16])
def test_a_pass_is_not_filled_beyond_what_llama_cpp_takes(
    tmp_path: Path, positions: int, filled: list[int]
) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    with Backbone.open(path, extra_bufts=True, threads=1, kv_type="f32") as backbone:
        expected = backbone.prefill(np.arange(30))
        assert filled
        backbone.shrink(positions)
        assert worst(backbone.prefill(np.arange(30)), expected) <= 0.02 * np.abs(expected).max()


def test_a_tree_of_several_passes_may_end_in_the_last_cell(
    tmp_path: Path, filled: list[int]
) -> None:
    """Its nodes are in the cache while the next pass runs: no room to fill that one up."""
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    with Backbone.open(path, extra_bufts=True, threads=1, n_ctx=256) as backbone:
        backbone.prefill(np.arange(190), logits="none")
        for length in (64, 65):
            nodes = np.arange(length)
            found = backbone.prefill_tree([1], nodes, nodes - 1, nodes % 2 == 0)
            assert np.isfinite(found).all()
            backbone.truncate(0, 190)
    assert filled


# Which weights are repacked at all


@pytest.mark.parametrize(
    ("types", "amx", "x86", "mapped", "pays"),
    [
        ({"Q4_0": 90, "Q6_K": 10}, False, True, (), True),
        ({"Q4_0": 90, "Q6_K": 10}, False, True, ("Q4_0",), False),
        ({"Q4_0": 90, "experts": 10}, False, True, ("Q4_0",), True),
        ({"Q4_0": 40, "IQ4_NL": 60}, False, True, ("Q4_0",), True),
        ({"Q4_0": 100}, False, True, ("Q4_0",), False),
        ({"Q4_K": 60, "Q6_K": 40}, False, True, (), False),
        ({"Q2_K": 90, "IQ4_NL": 10}, False, True, (), False),
        ({"Q8_0": 100}, False, True, (), False),
        ({"Q4_K": 60, "Q6_K": 40}, True, True, (), True),
        ({"Q4_K": 60, "Q6_K": 40}, True, True, ("Q4_K", "Q6_K"), False),
        ({"Q4_K": 60, "Q2_K": 40}, True, True, ("Q4_K", "Q6_K"), True),
        ({"Q4_K": 60, "experts": 40}, True, True, ("Q4_K", "Q6_K"), True),
        ({"Q8_0": 100}, False, False, (), True),
        ({"F16": 100}, False, False, (), False),
    ],
)
def test_repacking_pays_for_some_types_on_some_processors(
    types: dict[str, int],
    amx: bool,
    x86: bool,
    mapped: tuple[str, ...],
    pays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mse_runtime.cpu.has_amx", lambda: amx)
    monkeypatch.setattr("mse_runtime.cpu.is_x86", lambda: x86)
    monkeypatch.setattr("mse_runtime.backbone.library.mapped_types", lambda: mapped)
    tensors = {
        f"blk.{i}.{kind}": TensorInfo(f"blk.{i}.{kind}", (8, 256), kind, 0, size)
        if kind != "experts"
        else TensorInfo(f"blk.{i}.{kind}", (4, 8, 256), "Q4_K", 0, size)
        for i, (kind, size) in enumerate(types.items())
    }
    tensors["token_embd.weight"] = TensorInfo("token_embd.weight", (8, 256), "Q4_0", 0, 900)
    assert repacking_pays(SimpleNamespace(tensors=tensors)) is pays  # type: ignore[arg-type]


def test_a_vocabulary_is_looked_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama")
    looked = []
    check = Gguf.has_repeats
    monkeypatch.setattr(Gguf, "has_repeats", lambda *args: looked.append(1) or check(*args))

    def checked() -> int:
        with Gguf.open(path) as gguf:
            check_file(gguf)
        return len(looked)

    assert [checked(), checked()] == [1, 2]  # just written: a change might not show
    monkeypatch.setattr("mse_runtime.gguf._SETTLED", -1.0)
    assert [checked(), checked()] == [3, 3]
    os.utime(path, (1e9, 2e9))
    assert checked() == 4
