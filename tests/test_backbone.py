"""The backbone against itself: every way of feeding the same sequence gives the same logits."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_fixtures import ARCHES, stories_gguf, toy_gguf
from toy_vocab import spm

from mse_runtime.backbone import Backbone
from mse_runtime.errors import BackboneError

TOLERANCE = 1e-4
SENTENCE = "Please give the sentiment of the film, 你好: what a surprise!"

Open = Callable[..., Backbone]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("toys")
    return {arch: toy_gguf(folder / f"{arch}.gguf", arch) for arch in ARCHES}


@pytest.fixture
def open_toy(toys: dict[str, Path]) -> Iterator[Open]:
    opened: list[Backbone] = []

    def start(arch: str = "llama", **options: Any) -> Backbone:
        defaults: dict[str, Any] = {"kv_type": "f32", "threads": 1, "n_seq_max": 3, "n_ctx": 256}
        opened.append(Backbone.open(toys[arch], **(defaults | options)))
        return opened[-1]

    yield start
    for backbone in opened:
        backbone.close()


def worst(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


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


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("options", [{}, {"tree_width": 2}, {"n_outputs_max": 1, "tree_width": 1}])
def test_a_tree_is_its_paths(open_toy: Open, arch: str, options: dict[str, int]) -> None:
    backbone = open_toy(arch, n_seq_max=1, **options)
    prompt = backbone.tokenize(SENTENCE)
    backbone.prefill(prompt, logits="none")
    tokens = [10, 11, 12, 13, 14, 15, 16, 10]
    parents = [-1, -1, 0, 0, 1, 2, 2, 6]
    found = backbone.decode_tree(tokens, parents)
    assert backbone.length() == len(prompt)
    other = open_toy(arch)
    for node in range(len(tokens)):
        path, at = [], node
        while at >= 0:
            path.append(tokens[at])
            at = parents[at]
        other.clear(0)
        expected = other.prefill(np.concatenate([prompt, path[::-1]]))
        assert worst(found[node], expected) <= TOLERANCE
    # The cache is as it was: going on gives what it would have given without the tree.
    assert worst(backbone.prefill([10]), found[0]) <= TOLERANCE


def test_trees_fit_again_and_again(open_toy: Open) -> None:
    """Scratch cells are given back: 60 trees of 30 nodes on 256 cells."""
    backbone = open_toy(n_seq_max=1)
    backbone.prefill(np.arange(200), logits="none")
    first = backbone.decode_tree(np.arange(30), [-1] * 30)
    for _ in range(60):
        again = backbone.decode_tree(np.arange(30), [-1] * 30)
    assert worst(first, again) == 0


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
        raw = backbone._speller._call(b"x<s>y</s>z", False)
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


# Misuse: an error instead of a dead process, and the cache as it was


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "at least one"),
        ([-1], "0 .. 513"),
        ([514], "0 .. 513"),
        ([1 << 40], "0 .. 513"),
        ([0.5], "whole-number ids"),
        ([True, False], "whole-number ids"),
        (["a"], "whole-number ids"),
        ([[1, 2], [3]], "A batch must be"),
        (np.zeros((2, 63), np.float32), "floats \\[n, 64\\]"),
        (np.zeros((2, 64), np.int32), "floats \\[n, 64\\]"),
        (np.zeros((0, 64), np.float32), "at least one"),
        (np.zeros((1, 2, 64), np.float32), "floats \\[n, 64\\]"),
        (np.full((2, 64), np.nan, np.float32), "row 0 holds NaN"),
        (np.array([[0.0] * 64, [1e300] * 64]), "row 1 holds NaN or infinity"),
        (np.arange(257), "do not fit"),
    ],
)
def test_refused_batches(open_toy: Open, inputs: Any, message: str) -> None:
    backbone = open_toy()
    backbone.prefill([1, 2, 3], logits="none")
    for attempt in (
        lambda: backbone.prefill(inputs),
        lambda: backbone.prefill_many([(1, [4]), (0, inputs)]),
    ):
        with pytest.raises(BackboneError, match=message):
            attempt()
    assert [backbone.length(seq) for seq in range(3)] == [3, 0, 0]
    assert worst(backbone.prefill([4]), open_toy().prefill([1, 2, 3, 4])) <= TOLERANCE


def test_a_full_cache(open_toy: Open) -> None:
    backbone = open_toy()
    backbone.prefill(np.arange(200), seq=0, logits="none")
    with pytest.raises(BackboneError, match="no room for 100 more"):
        backbone.prefill(np.arange(100), seq=1)
    assert [backbone.length(seq) for seq in range(2)] == [200, 0]
    with pytest.raises(BackboneError, match="do not fit"):
        backbone.decode_tree(np.arange(57), np.arange(57) - 1)
    backbone.prefill(np.arange(50), seq=1, logits="none")
    with pytest.raises(BackboneError, match="no room"):
        backbone.decode_tree(np.arange(7), [-1] * 7)
    assert [backbone.length(seq) for seq in range(2)] == [200, 50]
    backbone.prefill(np.arange(6), seq=1)


@pytest.mark.parametrize("seq", [-1, 3, 1.0, "0", True, 1 << 40])
def test_sequences_that_do_not_exist(open_toy: Open, seq: Any) -> None:
    backbone = open_toy()
    saved = backbone.save_state(0)
    for attempt in (
        lambda: backbone.prefill([1], seq=seq),
        lambda: backbone.prefill_many([(seq, [1])]),
        lambda: backbone.decode_tree([1], [-1], seq=seq),
        lambda: backbone.length(seq),
        lambda: backbone.clear(seq),
        lambda: backbone.copy(0, seq),
        lambda: backbone.truncate(seq, 0),
        lambda: backbone.save_state(seq),
        lambda: backbone.load_state(seq, saved),
    ):
        with pytest.raises(BackboneError, match="sequence"):
            attempt()


def test_other_arguments_that_make_no_sense(open_toy: Open) -> None:
    backbone = open_toy()
    backbone.prefill([1, 2], logits="none")
    for attempt, message in (
        (lambda: backbone.prefill([1], logits="first"), "logits must be"),  # type: ignore[call-overload]
        (lambda: backbone.prefill_many([]), "no sequence"),
        (lambda: backbone.prefill_many([(0, [1]), (0, [2])]), "occurs twice"),
        (lambda: backbone.decode_tree([1, 2], [-1]), "2 tokens but 1 parents"),
        (lambda: backbone.decode_tree([1, 2], [1, -1]), "parents before children"),
        (lambda: backbone.decode_tree([1], [-2]), "parents before children"),
        (lambda: backbone.decode_tree([999999], [-1]), "0 .. 513"),
        (lambda: backbone.truncate(0, 3), "cannot be cut"),
        (lambda: backbone.truncate(0, -1), "cannot be cut"),
        (lambda: backbone.detokenize([-5]), "0 .. 513"),
        (lambda: backbone.embed([514]), "0 .. 513"),
    ):
        with pytest.raises(BackboneError, match=message):
            attempt()
    assert backbone.decode_tree([], []).shape == (0, backbone.n_vocab)


@pytest.mark.parametrize(
    "options",
    [{"n_ctx": 0}, {"n_ctx": -5}, {"n_ctx": 1 << 30}, {"n_seq_max": 0}, {"n_seq_max": 257},
     {"threads": 0}, {"threads": 1 << 20}, {"kv_type": "q3"}, {"n_outputs_max": 0},
     {"tree_width": 400}, {"n_gpu_layers": -2}, {"n_ctx": 1.5}],
)  # fmt: skip
def test_options_that_make_no_sense(open_toy: Open, options: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match=next(iter(options))):
        open_toy(**options)


def test_damaged_and_foreign_states(open_toy: Open) -> None:
    backbone = open_toy()
    backbone.prefill(np.arange(20), logits="none")
    saved = backbone.save_state(0)
    flipped = bytearray(saved)
    flipped[200] ^= 1
    for bad in (b"", b"x" * 100, saved[:-1], saved + b"x", bytes(flipped), "text"):
        with pytest.raises(BackboneError, match="state"):
            backbone.load_state(1, bad)  # type: ignore[arg-type]
    for other in (open_toy("chatglm"), open_toy(kv_type="f16"), open_toy(flash_attention=True)):
        with pytest.raises(BackboneError, match="another model"):
            other.load_state(0, saved)
    backbone.prefill(np.arange(200), seq=1, logits="none")
    backbone.clear(0)
    backbone.prefill(np.arange(50), seq=2, logits="none")
    with pytest.raises(BackboneError, match="no room"):
        backbone.load_state(0, saved)
    assert [backbone.length(seq) for seq in range(3)] == [0, 200, 50]


def test_use_after_close(open_toy: Open) -> None:
    backbone = open_toy()
    saved = backbone.save_state(0)
    backbone.close()
    backbone.close()
    for attempt in (
        lambda: backbone.prefill([1]),
        lambda: backbone.prefill_many([(0, [1])]),
        lambda: backbone.decode_tree([1], [-1]),
        lambda: backbone.tokenize("a"),
        lambda: backbone.detokenize([5]),
        lambda: backbone.embed([1]),
        backbone.length,
        backbone.clear,
        lambda: backbone.copy(0, 1),
        lambda: backbone.truncate(0, 0),
        backbone.save_state,
        lambda: backbone.load_state(0, saved),
        lambda: backbone.reserve(1000),
    ):
        with pytest.raises(BackboneError, match="closed"):
            attempt()


def test_models_that_cannot_be_loaded(tmp_path: Path, toys: dict[str, Path]) -> None:
    whole = toys["llama"].read_bytes()
    foreign = whole.replace(b"llama", b"gguff")  # an architecture nobody has heard of
    missing = whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_op")
    for name, data, message in (
        ("unknown", foreign, "cannot load"),
        ("missing", missing, "cannot load.*ffn_up"),
        ("cut", whole[:-1000], "damaged or cut short"),
        ("text", b"once upon a time", "not a GGUF file"),
        ("empty", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BackboneError, match=message):
            Backbone.open(tmp_path / name, threads=1)
    with pytest.raises(BackboneError, match="does not exist"):
        Backbone.open(tmp_path / "nothing.gguf")


def test_progress_is_told_and_may_stop_the_load(toys: dict[str, Path]) -> None:
    seen: list[float] = []
    Backbone.open(toys["llama"], threads=1, progress=seen.append).close()
    assert seen[-1] == 1.0
    assert seen == sorted(seen)

    def stop(_fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Backbone.open(toys["llama"], threads=1, progress=stop)


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


def test_what_is_told_about_the_run(open_toy: Open) -> None:
    backbone = open_toy("chatglm")
    assert (backbone.arch, backbone.n_embd, backbone.n_layer, backbone.n_ctx) == (
        "chatglm", 64, 2, 256,
    )  # fmt: skip
    info = backbone.info
    assert info["device"] == "cpu"
    assert info["threads"] == 1
    assert any("KV" in name for name in info["buffers_mib"])


def test_importing_is_light_and_llama_cpp_stays_whole(toys: dict[str, Path]) -> None:
    """Opening leaves llama.cpp's log off stderr; the real package can still be imported."""
    code = (
        "import sys\n"
        "from mse_runtime.backbone import Backbone\n"
        "assert 'llama_cpp' not in sys.modules and 'gguf' not in sys.modules\n"
        f"backbone = Backbone.open({str(toys['llama'])!r}, threads=1)\n"
        "assert 'jinja2' not in sys.modules and 'gguf' not in sys.modules\n"
        "import llama_cpp\n"
        "assert llama_cpp.Llama and llama_cpp.llama_cpp is sys.modules['llama_cpp.llama_cpp']\n"
        "backbone.prefill([1, 2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


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


def _patched(data: bytes, key: bytes, value: bytes) -> bytes:
    at = data.index(key) + len(key) + 4  # the value's type comes first
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("embedding_length", struct.pack("<I", 32), "embedding table is 64 wide"),
        ("block_count", struct.pack("<I", 0), "0 layers"),
        ("block_count", struct.pack("<I", 1 << 20), "1048576 layers"),
        ("attention.head_count", struct.pack("<I", 0), "0 query heads"),
        ("attention.head_count_kv", struct.pack("<I", 3), "cannot share 3"),
        ("attention.head_count_kv", struct.pack("<I", 1610612740), "cannot share"),
        ("rope.dimension_count", struct.pack("<I", 8), "8 of 16 dimensions"),
        ("rope.dimension_count", struct.pack("<I", 0), "0 of 16 dimensions"),
        ("attention.layer_norm_rms_epsilon", struct.pack("<f", float("nan")), "epsilon is nan"),
    ],
)
def test_headers_that_would_kill_llama_cpp(
    tmp_path: Path, toys: dict[str, Path], key: str, value: bytes, message: str
) -> None:
    data = _patched(toys["llama"].read_bytes(), f"llama.{key}".encode(), value)
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(BackboneError, match=message):
        Backbone.open(tmp_path / "bad.gguf", threads=1)


def test_a_vocabulary_with_a_token_twice(tmp_path: Path, toys: dict[str, Path]) -> None:
    for twin in (b"<0x0B>", b"<0x0A\0"):  # the second is a twin to C strings alone
        data = toys["llama"].read_bytes().replace(b"<0x0C>", twin)
        data = data.replace(b"<0x0D>", b"<0x0A\0") if b"\0" in twin else data
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(BackboneError, match="a token twice"):
            Backbone.open(tmp_path / "bad.gguf", threads=1)
