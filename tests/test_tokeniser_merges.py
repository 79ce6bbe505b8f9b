"""User text whose pieces merge into a control token is split as SentencePiece itself splits it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_fixtures import toy_gguf
from toy_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, Vocab

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("llama_cpp")

from mse_runtime.backbone import Backbone  # noqa: E402

CONTROLS = ("[gMASK]", "sop", "eop", "the film")
TEXT = "drop the top, stop and hop to the shop; a sad open sea, films so far: the end of a heap. "
WORDS = ("sop", "eop", "op", "s", "e", "so", "drop", "shop", " ", "  ", "the film", "▁", "是", "\n",
         "😀", "<s>", "<unk>", "[gMASK]", "<0x41>", "films", ",", "\0", "x")  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    """A byte-pair model with the pieces `op`, `so`, `▁the`, but none of the control tokens."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]),
        model_writer=written,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.fixture(scope="module")
def backbone(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    ids = range(model.get_piece_size())
    types = [
        BYTE if model.is_byte(i)
        else UNKNOWN if model.is_unknown(i)
        else CONTROL if model.is_control(i)
        else NORMAL
        for i in ids
    ]  # fmt: skip
    vocab = Vocab(
        "llama",
        "default",
        [model.id_to_piece(i) for i in ids] + [c.replace(" ", "▁") for c in CONTROLS],
        types + [CONTROL] * len(CONTROLS),
        [model.get_score(i) for i in ids] + [0.0] * len(CONTROLS),
        special={"bos": 1, "eos": 2, "unknown": 0},
    )
    path = toy_gguf(tmp_path_factory.mktemp("merges") / "m.gguf", "llama", vocab=vocab)
    with Backbone.open(path, n_ctx=256, threads=1) as opened:
        yield opened


def test_the_trap_is_real(model: Any, backbone: Backbone) -> None:
    """llama.cpp alone answers with the control token, and so would split the neighbours wrongly."""
    raw = backbone._vocabulary._whole()._call(b"a sop", False).tolist()
    assert model.get_piece_size() + CONTROLS.index("sop") in raw
    assert backbone.tokenize("a sop").tolist() == model.encode("a sop")
    assert "op" in model.encode("a sop", out_type=str)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join))
def test_ids_are_sentencepieces(model: Any, backbone: Backbone, text: str) -> None:
    assert backbone.tokenize(text).tolist() == model.encode(text)
