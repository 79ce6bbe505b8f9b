"""Prompts as data: pieces, truncation, pads, and what can be prefilled early."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mse_runtime.bundle import Segment, TextInput
from mse_runtime.errors import BundleError, UsageError
from mse_runtime.prompt import Prompt, build, check_text, tokenize_text

PSEUDO, TEXT = Segment(slot="pseudo"), Segment(slot="text")


@dataclass
class ByteTokenizer:
    """One id per UTF-8 byte, BOS 256; `<s>` is special only where it is asked for."""

    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> np.ndarray:
        ids = [256] if bos else []
        for i, part in enumerate(text.split("<s>") if special else [text]):
            ids += ([256] if i else []) + list(part.encode())
        return np.array(ids, np.int32)


def embed(ids: np.ndarray) -> np.ndarray:
    return np.repeat(ids[:, None], 4, axis=1).astype(np.float32)


def prompt(segments: tuple[Segment, ...], text: str = "ab", pad: str = "none") -> Prompt:
    return build(ByteTokenizer(), segments, TextInput(6, pad, 0, False), text, 3)


def test_published_llama_layout() -> None:
    built = prompt(
        (
            Segment(text="", bos=True),
            Segment(text="<M>", bos=True),
            PSEUDO,
            TEXT,
            Segment(text="</M>"),
            Segment(text="Rate:"),
        ),
        pad="left",
    )
    rows = built.rows(embed, np.full((3, 4), -1, np.float32))[:, 0]
    expected = [256, 256, *b"<M>", -1, -1, -1, 0, 0, 0, 0, *b"ab", *b"</M>", *b"Rate:"]
    assert rows.tolist() == expected
    assert len(built) == len(expected)
    assert built.n_constant == 5


def test_pseudo_last_keeps_task_and_text_early() -> None:
    built = prompt((Segment(text="Rate:", bos=True), TEXT, PSEUDO, Segment(text="is")))
    assert built.early.tolist() == [256, *b"Rate:", *b"ab"]
    assert built.late.tolist() == list(b"is")
    assert built.n_constant == 6


@given(st.text(min_size=0, max_size=40), st.sampled_from(["left", "none"]))
def test_text_ids_are_cut_and_padded(text: str, pad: str) -> None:
    whole = list(text.encode("utf-8", "surrogatepass"))
    rule = TextInput(6, pad, 0, False)
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        return
    ids, total = tokenize_text(ByteTokenizer(), text, rule)
    assert total == len(whole)
    kept = whole[:6]
    assert ids.tolist() == ([0] * (6 - len(kept)) if pad == "left" else []) + kept


def test_a_very_long_text_is_known_to_be_truncated() -> None:
    ids, total = tokenize_text(ByteTokenizer(), "x" * 100_000, TextInput(6, "none", 0, False))
    assert len(ids) == 6
    assert total > 6


def test_composed_and_decomposed_letters_are_the_same_where_the_tokeniser_says_so() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for normalise, same in (("nfc", True), ("none", False)):
        rule = TextInput(20, normalise=normalise)
        ids = [tokenize_text(ByteTokenizer(), text, rule)[0] for text in (composed, decomposed)]
        assert np.array_equal(*ids) == same


def test_special_spellings_in_the_text_stay_text() -> None:
    built = prompt((Segment(text="<s>", special=True), PSEUDO, TEXT), text="<s>")
    assert built.early.tolist() == [256]
    assert built.late.tolist() == list(b"<s>")


@pytest.mark.parametrize("text", ["", "  \n", "a\x00b", "caf\udce9"])
def test_texts_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        check_text(text)


@pytest.mark.parametrize("segments", [(TEXT,), (PSEUDO,), (TEXT, PSEUDO, PSEUDO)])
def test_a_prompt_needs_both_slots_once(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(BundleError, match="exactly one"):
        prompt(segments)
