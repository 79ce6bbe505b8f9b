"""The backbone against itself: every way of feeding the same sequence gives the same logits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from backbone_cases import TOLERANCE, Open, worst
from make_fixtures import ARCHES, stories_gguf, toy_gguf
from toy_vocab import spm

from mse_runtime.backbone import Backbone
from mse_runtime.errors import BackboneError

pytest_plugins = ("backbone_fixtures",)

SENTENCE = "Please give the sentiment of the film, 你好: what a surprise!"


# Rows and ids are the same thing


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_rows_give_the_logits_of_their_tokens(open_toy: Open, arch: str, kv_type: str) -> None:
    backbone = open_toy(arch, kv_type=kv_type)
    ids = backbone.tokenize(SENTENCE)
    by_ids = backbone.prefill(ids, seq=0)
    by_rows = backbone.prefill(backbone.embed(ids), seq=1)
    assert np.ptp(by_ids) > 1  # not a constant
    assert worst(by_ids, by_rows) <= TOLERANCE


@pytest.mark.parametrize("arch", ARCHES)
def test_one_batch_of_rows_is_the_token_row_token_split(open_toy: Open, arch: str) -> None:
    """What soft prompts used to need three passes for."""
    backbone = open_toy(arch)
    ids = backbone.tokenize(SENTENCE)
    pseudo = np.random.default_rng(0).standard_normal((4, backbone.n_embd)).astype(np.float32)
    backbone.prefill(ids[:7], seq=0, logits="none")
    backbone.prefill(pseudo, seq=0, logits="none")
    split = backbone.prefill(ids[7:], seq=0)
    joined = np.concatenate([backbone.embed(ids[:7]), pseudo, backbone.embed(ids[7:])])
    assert worst(split, backbone.prefill(joined, seq=1)) <= TOLERANCE
    assert worst(split, backbone.prefill(ids, seq=2)) > 0.1  # the pseudo tokens were seen


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_rows_equal_tokens_in_every_weight_type(tmp_path: Path, dtype: str) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype=dtype)
    with Backbone.open(path, kv_type="f32", threads=1, extra_bufts=False) as backbone:
        ids = backbone.tokenize(SENTENCE)
        by_ids = backbone.prefill(ids)
        backbone.clear()  # the same cells again: with other ones sums round differently
        assert worst(by_ids, backbone.prefill(backbone.embed(ids))) == 0


def test_an_architecture_without_a_test_is_compared_when_it_is_opened(
    toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma, for one, scales the embeddings of tokens but not rows."""
    from mse_runtime.gguf import Gguf

    monkeypatch.setattr("mse_runtime.backbone.model.PROVEN", ())
    with Backbone.open(toys["qwen2"], threads=1) as backbone:
        assert backbone.length() == 0
    plain = Gguf.rows
    monkeypatch.setattr(Gguf, "rows", lambda self, ids: 8 * plain(self, ids))
    with pytest.raises(BackboneError, match="differently from its tokens"):
        Backbone.open(toys["qwen2"], threads=1)


def test_seeds_and_inputs_change_the_answer(open_toy: Open, tmp_path: Path) -> None:
    first = open_toy().prefill([5, 6, 7])
    assert worst(first, open_toy().prefill([5, 6, 8])) > 0.1
    with Backbone.open(toy_gguf(tmp_path / "m.gguf", "llama", seed=1), threads=1) as other:
        assert worst(first, other.prefill([5, 6, 7])) > 0.1


@pytest.mark.parametrize("flash", [None, False])
def test_the_number_of_threads_does_not_change_the_answer(
    open_toy: Open, flash: bool | None
) -> None:
    ids = np.arange(40)
    one = open_toy("qwen2", flash_attention=flash).prefill(ids)
    assert worst(one, open_toy("qwen2", threads=2).prefill(ids)) <= TOLERANCE


def test_flash_attention_rounds_to_float16(open_toy: Open) -> None:
    """Why an exact run leaves it off: llama.cpp casts keys and values for it."""
    ids = np.arange(40)
    exact, flash = open_toy().prefill(ids), open_toy(flash_attention=True).prefill(ids)
    assert TOLERANCE < worst(exact, flash) < 0.02


# Several sequences, trees, the cache


@pytest.mark.parametrize("arch", ARCHES)
def test_several_sequences_in_one_pass(open_toy: Open, arch: str) -> None:
    backbone = open_toy(arch)
    ids = backbone.tokenize(SENTENCE)
    parts = [ids[:9], backbone.embed(ids[4:]), ids[2:5]]
    alone = [open_toy(arch).prefill(part) for part in parts]
    together = backbone.prefill_many(list(enumerate(parts)))
    assert worst(alone, together) <= TOLERANCE
    assert [backbone.length(seq) for seq in range(3)] == [9, len(ids) - 4, 3]


TOKENS, PARENTS = [10, 11, 12, 13, 14, 15, 16, 10], [-1, -1, 0, 0, 1, 2, 2, 6]


def along(tokens: list[int], parents: list[int], node: int) -> list[int]:
    """The ids from the first of the tree to `node`."""
    path: list[int] = []
    while node >= 0:
        path.insert(0, tokens[node])
        node = parents[node]
    return path


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("as_rows", [True, False])
@pytest.mark.parametrize("options", [{}, {"tree_width": 2}, {"n_outputs_max": 1, "tree_width": 1}])
def test_a_tree_is_its_paths(
    open_toy: Open, arch: str, before: int, as_rows: bool, options: dict[str, int]
) -> None:
    """Prompt and tree in one pass, against each path fed alone."""
    backbone = open_toy(arch, n_seq_max=1, **options)
    prompt = backbone.tokenize(SENTENCE)
    if before:
        backbone.prefill(prompt[:before], logits="none")
    rest = backbone.embed(prompt[before:]) if as_rows else prompt[before:]
    found = backbone.prefill_tree(rest, TOKENS, PARENTS)
    assert backbone.length() == len(prompt)
    assert found.shape == (1 + len(TOKENS), backbone.n_vocab)
    other = open_toy(arch)
    for row, path in enumerate([[], *(along(TOKENS, PARENTS, i) for i in range(len(TOKENS)))]):
        other.clear(0)
        expected = other.prefill(np.concatenate([prompt, np.array(path, np.int32)]))
        assert worst(found[row], expected) <= TOLERANCE
    # The cache is as it was: going on gives what it would have given without the tree.
    assert worst(backbone.prefill([10]), found[1]) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, {"tree_width": 2}, {"n_outputs_max": 2}])
def test_only_wanted_nodes_give_logits(open_toy: Open, options: dict[str, int]) -> None:
    wanted = np.array([True, False, False, True, False, True, False, True])
    every = open_toy().prefill_tree([5, 6, 7], TOKENS, PARENTS)
    found = open_toy(**options).prefill_tree([5, 6, 7], TOKENS, PARENTS, wanted)
    assert worst(found, every[np.append(True, wanted)]) <= TOLERANCE
    none = open_toy().prefill_tree([5, 6, 7], TOKENS, PARENTS, np.zeros(8, bool))
    assert worst(none, every[:1]) <= TOLERANCE


def test_no_tree_is_a_prefill(open_toy: Open) -> None:
    found = open_toy(tree_width=0).prefill_tree([5, 6, 7], [], [])
    assert worst(found[0], open_toy().prefill([5, 6, 7])) == 0


def test_trees_fit_again_and_again(open_toy: Open) -> None:
    """Scratch cells are given back: 60 trees of 30 nodes on 256 cells."""
    backbone = open_toy(n_seq_max=1)
    backbone.prefill(np.arange(200), logits="none")
    found = []
    for _ in range(60):
        found.append(backbone.prefill_tree([7], np.arange(30), [-1] * 30))
        backbone.truncate(0, 200)
    assert worst(found[0], found) == 0


def test_a_copied_prefix_is_a_fresh_one(open_toy: Open) -> None:
    backbone = open_toy()
    prefix, rest = np.arange(20, 50), np.arange(5, 12)
    backbone.prefill(prefix, logits="none")
    backbone.prefill([1, 2], seq=1, logits="none")  # what the copy replaces
    backbone.copy(0, 1)
    assert backbone.length(1) == 30
    after = backbone.prefill(rest, seq=1)
    backbone.clear(0)  # the copy lives on
    again = backbone.prefill([3], seq=1)
    fresh = open_toy()
    assert worst(after, fresh.prefill(np.concatenate([prefix, rest]))) <= TOLERANCE
    assert worst(again, fresh.prefill([3])) <= TOLERANCE


def test_shared_cells_count_once(open_toy: Open) -> None:
    backbone = open_toy()
    backbone.prefill(np.arange(200), logits="none")
    for dst in (1, 2):
        backbone.copy(0, dst)
        backbone.prefill(np.arange(20), seq=dst, logits="none")
    assert [backbone.length(seq) for seq in range(3)] == [200, 220, 220]


def test_truncating_is_never_having_been_there(open_toy: Open) -> None:
    backbone = open_toy()
    backbone.prefill(np.arange(30), logits="none")
    backbone.truncate(0, 10)
    expected = open_toy().prefill([*range(10), 99])
    assert worst(backbone.prefill([99]), expected) <= TOLERANCE
    backbone.truncate(0, 0)
    assert backbone.length() == 0


@pytest.mark.parametrize("flash", [True, False])
def test_a_saved_state_goes_on(open_toy: Open, flash: bool) -> None:
    one, two = open_toy(flash_attention=flash), open_toy(flash_attention=flash)
    one.prefill(np.arange(30), seq=1, logits="none")
    two.prefill([1, 2, 3], seq=2, logits="none")
    two.load_state(2, one.save_state(1))
    assert two.length(2) == 30
    assert worst(one.prefill([7], seq=1), two.prefill([7], seq=2)) == 0
    two.load_state(2, one.save_state(0))  # an empty one
    assert two.length(2) == 0


def test_room_can_be_made_without_losing_anything(open_toy: Open) -> None:
    backbone = open_toy(tree_width=1)
    backbone.prefill(np.arange(40), seq=1, logits="none")
    assert not backbone.reserve(200, 1)
    assert backbone.reserve(700, 8)
    assert backbone.n_ctx == 768
    assert backbone.length(1) == 40
    expected = open_toy().prefill([*range(40), 4])
    assert worst(backbone.prefill([4], seq=1), expected) <= TOLERANCE
    backbone.prefill(np.arange(500) % 99, seq=0, logits="none")


def test_all_logits_are_the_last_ones_of_each_prefix(open_toy: Open) -> None:
    backbone = open_toy(n_outputs_max=4)
    ids = np.arange(50, 75)
    every = backbone.prefill(ids, logits="all")
    assert every.shape == (25, backbone.n_vocab)
    other = open_toy()
    stepwise = [other.prefill([token]) for token in ids]
    assert worst(every, stepwise) <= TOLERANCE


def test_long_inputs_are_split_by_llama_cpp_itself(open_toy: Open) -> None:
    ids = np.arange(1400) % 300
    backbone = open_toy(n_ctx=1500)
    by_ids = backbone.prefill(ids, seq=0)
    backbone.clear()
    assert worst(by_ids, backbone.prefill(backbone.embed(ids))) <= TOLERANCE


# Text


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    "text",
    [
        "a </s> b",
        "<s>",
        "<unk>",
        "<|im_start|>x<|im_end|>",
        "<|endoftext|>",
        "[gMASK]sop",
        "[MASK]",
    ],
)
def test_special_spellings_stay_text(open_toy: Open, arch: str, text: str) -> None:
    backbone = open_toy(arch)
    plain = backbone.tokenize(text)
    controls = set(controls_of(backbone))
    assert not controls & set(plain.tolist())
    assert backbone.detokenize(plain) == text


@pytest.mark.parametrize(
    ("arch", "text", "count"),
    [("llama", "<s></s>", 2), ("qwen", "<|im_start|>", 1), ("qwen2", "<|im_end|><|endoftext|>", 2),
     ("chatglm", "[gMASK]sop", 2)],
)  # fmt: skip
def test_special_spellings_are_parsed_when_asked(
    open_toy: Open, arch: str, text: str, count: int
) -> None:
    backbone = open_toy(arch)
    ids = backbone.tokenize(text, special=True)
    assert len(ids) == count
    assert set(ids.tolist()) <= set(controls_of(backbone))
    assert backbone.detokenize(ids) == ""
    assert backbone.detokenize(ids, special=True) == text


def controls_of(backbone: Backbone) -> list[int]:
    from mse_runtime.gguf import Gguf

    with Gguf.open(backbone.path) as gguf:
        types = gguf.array("tokenizer.ggml.token_type")
    return [index for index, kind in enumerate(types) if kind in (2, 3)]


def test_merges_cannot_build_a_control_token(tmp_path: Path) -> None:
    """With the pieces `<s` and `s>` llama.cpp's merges reach `<s>`, the BOS. Ours must not."""
    vocab = spm(pieces=("<s", "s>", "</", "</s"))
    vocab.scores = [
        s if t != 3 else 50.0 for s, t in zip(vocab.scores or [], vocab.types, strict=True)
    ]
    path = toy_gguf(tmp_path / "m.gguf", "llama", vocab=vocab)
    with Backbone.open(path, threads=1) as backbone:
        raw = backbone._vocabulary._whole()._call(b"x<s>y</s>z", False)
        assert {1, 2} <= set(raw.tolist())  # the trap is real
        ids = backbone.tokenize("x<s>y</s>z")
        assert not {1, 2} & set(ids.tolist())
        assert backbone.detokenize(ids) == "x<s>y</s>z"


@pytest.mark.parametrize("arch", ARCHES)
def test_nothing_is_added_but_what_was_asked(open_toy: Open, arch: str) -> None:
    backbone = open_toy(arch)
    ids = backbone.tokenize("joy")
    assert backbone.tokenize("").shape == (0,)
    assert backbone.bos_id not in ids
    with_bos = backbone.tokenize("joy", bos=True)
    assert with_bos.tolist() == [backbone.bos_id, *ids.tolist()]
    assert backbone.tokenize("", bos=True).tolist() == [backbone.bos_id]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    "text", ["a\0b", "é ü 🙂", "  two  spaces ", "line\nline\ttab", "\x7f\x01"]
)
def test_any_text_survives_the_round_trip(open_toy: Open, arch: str, text: str) -> None:
    backbone = open_toy(arch)
    assert backbone.detokenize(backbone.tokenize(text)) == text


def test_a_long_text_is_tokenised(open_toy: Open) -> None:
    assert len(open_toy().tokenize("what a surprise " * 6250)) > 10_000


def test_text_that_is_none(open_toy: Open) -> None:
    backbone = open_toy()
    with pytest.raises(BackboneError, match="broken characters"):
        backbone.tokenize("a\udc80b")
    with pytest.raises(BackboneError, match="must be a str"):
        backbone.tokenize(b"bytes")  # type: ignore[arg-type]


def test_several_threads_share_one_backbone(open_toy: Open) -> None:
    backbone = open_toy()
    expected = [open_toy().prefill([seq, seq + 1]) for seq in range(3)]
    failed: list[str] = []

    def work(seq: int) -> None:
        for _ in range(30):
            backbone.clear(seq)
            if worst(backbone.prefill([seq, seq + 1], seq=seq), expected[seq]) > TOLERANCE:
                failed.append(f"sequence {seq}")

    workers = [threading.Thread(target=work, args=(seq,)) for seq in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


def test_the_same_story_by_both_paths(test_data: Callable[[str], Path], tmp_path: Path) -> None:
    """A trained model (260 k parameters): greedy, 60 tokens, ids one way and rows the other."""
    path = stories_gguf(
        tmp_path / "stories.gguf",
        test_data("models/stories260K.bin"),
        test_data("models/tok512.bin"),
    )
    with Backbone.open(path, kv_type="f32", threads=1, n_seq_max=2) as backbone:
        prompt = backbone.tokenize("Once upon a time", bos=True)
        stories = []
        for seq, as_rows in enumerate((False, True)):
            ids, logits = prompt.tolist(), None
            for _ in range(60):
                new = ids if logits is None else ids[-1:]
                logits = backbone.prefill(backbone.embed(new) if as_rows else new, seq=seq)
                ids.append(int(logits.argmax()))
            stories.append(backbone.detokenize(ids))
    assert stories[0] == stories[1]
    assert stories[0].lstrip().startswith("Once upon a time, there was a little girl named Lily.")
