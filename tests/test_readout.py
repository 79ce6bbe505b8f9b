"""Answers from logits, and the published parser."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mse_runtime.bundle import Label, Task
from mse_runtime.labels import LabelTrie
from mse_runtime.parity import generate, parse
from mse_runtime.readout import Readout, intensity, label_texts, number_grid


class CharTokenizer:
    def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> np.ndarray:
        return np.array([ord(char) for char in text], np.int32)


class CharModel:
    """A language model over characters that always continues towards one text."""

    eos_id = 3

    def __init__(self, target: str, margin: float = 5.0) -> None:
        self.target, self.margin, self.fed = target, margin, 0

    def logits(self, depth: int, on_path: bool = True) -> np.ndarray:
        row = np.zeros(128, np.float32)
        if on_path and depth < len(self.target):
            row[ord(self.target[depth])] = self.margin
        return row

    def tree_logits(self, trie: LabelTrie) -> np.ndarray:
        paths: list[str] = []
        for token, parent in zip(trie.tokens, trie.parents, strict=True):
            paths.append((paths[parent] if parent >= 0 else "") + chr(token))
        wanted = ["", *(path for path, flag in zip(paths, trie.branches, strict=True) if flag)]
        logits = [self.logits(len(p), self.target.startswith(p)) for p in wanted]
        return np.stack(logits)[:, trie.candidates]

    def prefill(self, ids: np.ndarray, *, seq: int = 0) -> np.ndarray:
        self.fed += len(ids)
        return self.logits(self.fed)

    def detokenize(self, ids: np.ndarray) -> str:
        return "".join(map(chr, ids))


def regression(**changes: object) -> Task:
    fields: dict[str, object] = {
        "kind": "regression", "language": "en", "range": (-3.0, 3.0), "step": 0.1,
        "number_format": "{:+.1f}", "labels": (), "prompt": (), "max_new_tokens": 4,
        "temperature": 1.0,
    }  # fmt: skip
    return Task(**(fields | changes))  # type: ignore[arg-type]


def classification() -> Task:
    labels = tuple(Label(text=str(i), name=name) for i, name in enumerate(["calm", "joy", "fear"]))
    return regression(kind="classification", labels=labels, range=None, step=None, max_new_tokens=1)


def test_number_grids_are_the_published_answers() -> None:
    assert len(number_grid(-3, 3, 0.1)) == 61
    assert len(number_grid(-1, 1, 0.1)) == 21
    texts = label_texts(regression())
    assert texts[0] == "-3.0"
    assert texts[30] == "+0.0"
    assert texts[-1] == "+3.0"
    assert "-0.0" not in label_texts(regression(number_format="{:.1f}"))
    tenths = label_texts(regression(number_format="{:+03.0f}", number_scale=10.0))
    assert [tenths[i] for i in (0, 1, 29, 30, 31, 60)] == ["-30", "-29", "-01", "+00", "+01", "+30"]
    assert tenths == [text.replace(".", "") for text in texts]


@pytest.mark.parametrize("step", [0.25, 0.15, 0.5, 1.0])
def test_grids_of_any_step_are_exact(step: float) -> None:
    grid = number_grid(-3, 3, step)
    np.testing.assert_allclose(grid, np.linspace(-3, 3, round(6 / step) + 1), atol=1e-9)
    assert 0.0 in grid


@pytest.mark.parametrize(
    ("target", "spelling", "tokens"),
    [
        *((text, {}, 14) for text in ("+1.7", "-2.3", "+0.0", "-3.0")),
        *(
            (text, {"number_format": "{:+03.0f}", "number_scale": 10.0}, 8)
            for text in ("+17", "-30")
        ),
    ],
)
def test_regression_finds_the_number(target: str, spelling: dict[str, object], tokens: int) -> None:
    task = regression(**spelling)
    readout = Readout.build(task, CharTokenizer())
    assert len(readout.trie.tokens) == tokens
    model = CharModel(target, margin=9.0)
    answer = readout.score(model.tree_logits(readout.trie))
    number = float(target) / (task.number_scale or 1.0)
    assert answer.mode == pytest.approx(number)
    assert answer.value == pytest.approx(number, abs=0.1)
    assert answer.distribution is not None
    assert sum(p for _, p in answer.distribution) == pytest.approx(1)
    assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_temperature_flattens() -> None:
    model = CharModel("1")
    readout = Readout.build(classification(), CharTokenizer())
    cold = readout.score(model.tree_logits(readout.trie))
    warm = readout.score(model.tree_logits(readout.trie), temperature=4.0)
    assert cold.label == warm.label == "joy"
    assert cold.probabilities["joy"] > warm.probabilities["joy"] > 1 / 3


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (-3, "strongly negative"),
        (-0.2, "neutral"),
        (1.2, "weakly positive"),
        (9, "strongly positive"),
    ],
)
def test_intensity_words(value: float, word: str) -> None:
    assert intensity(value, 3.0) == word


# Spec section 5, verified cases.
@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 0.8", 0.8), ("+0.8", 0.8), (".5", 0.5), ("-0.", 0.0), ("1e1", 10.0), ("1_0", 10.0),
        ("０.８", 0.8), ("–1.2", -1.2), ("一0.4", -0.4), ("：0.6", 0.6), ("(1.0", 1.0),
        ("1/2", 12.0), ("--1", 0.0), ("0,8", 0.0), ("- 0.8", 0.0), ("neutral", 0.0), ("", 0.0),
        ("inf", float("inf")),
    ],
)  # fmt: skip
def test_published_regression_parser(text: str, number: float) -> None:
    assert parse(text, "regression") == number


def test_published_class_parser_maps_nothing() -> None:
    assert parse("–1", "classification") == 0.0
    assert parse("▁3".strip("▁"), "classification") == 3.0
    assert np.isnan(parse("nan", "classification"))


@given(st.text(max_size=12))
def test_the_parser_never_raises(text: str) -> None:
    assert isinstance(parse(text, "regression"), float)


def test_generation_keeps_the_first_token() -> None:
    model = CharModel("-1.4")
    made = generate(model, model.logits(0), "regression", 4)
    assert made.text == "-1.4"
    assert made.value == -1.4
    assert model.fed == 3  # the last token is never fed
    model = CharModel("-14")
    assert generate(model, model.logits(0), "regression", 3, scale=10.0).value == -1.4


def test_generation_stops_at_the_end_token() -> None:
    model = CharModel("2\x03zz")
    made = generate(model, model.logits(0), "classification", 4)
    assert made.ids == (ord("2"),)
