"""Excerpts of a vocabulary give the tokens that the whole gives."""

from __future__ import annotations

import csv
import random
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_factory import make_bundle
from hypothesis import given
from hypothesis import strategies as st
from make_fixtures import toy_gguf

from mse_kernels import opening
from mse_runtime.analyzer import Analyzer
from mse_runtime.backbone import Backbone, excerpt, library, vocabulary
from mse_runtime.backbone.excerpt import Excerpt
from mse_runtime.backbone.text import Speller, load_vocabulary
from mse_runtime.errors import BackboneError
from mse_runtime.features.spec import Features, FeatureTrack
from mse_runtime.gguf import Gguf

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no Linux")
SAID = ["the film was great", "-1.2 <Multimodal>", "once upon a time\n\nthere was", "cafe\u0301"]
LIB = library.load()


@contextmanager
def whole(path: Path) -> Iterator[tuple[Gguf, Speller]]:
    with Gguf.open(path) as gguf:
        model = load_vocabulary(LIB, path, path)
        yield gguf, Speller(LIB, LIB.llama_model_get_vocab(model), gguf)
        LIB.llama_model_free(model)


@contextmanager
def excerpted(gguf: Gguf, texts: list[str]) -> Iterator[Excerpt]:
    made = Excerpt(LIB, gguf, texts)
    yield made
    made.close()


def same(part: Excerpt, speller: Speller, text: str) -> bool:
    """Special spellings alone take the whole vocabulary, where they are not to be special."""
    for special in (False, True):
        found = part.tokenize(text, special)
        if found is None:
            assert not special
            assert any(one in text for one in part._special)
        elif not np.array_equal(found, speller.tokenize(text, special)):
            return False
    return True


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_gguf(tmp_path_factory.mktemp("excerpt") / "m.gguf", "qwen")


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small vocabularies and new files will do, and nothing is known of them yet."""
    monkeypatch.setattr(excerpt, "_WORTH", 0)
    monkeypatch.setattr("mse_runtime.gguf._SETTLED", -1.0)
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=1, max_size=4))
def test_a_toy_vocabulary_by_any_text(qwen: Path, texts: list[str]) -> None:
    texts = [text.replace("\0", "") for text in texts]
    with whole(qwen) as (gguf, speller), excerpted(gguf, texts) as part:
        for text in texts:
            assert same(part, speller, text)
            assert same(part, speller, text[: len(text) // 2])  # cut, as a long transcript is


@pytest.fixture(scope="module")
def gpt2(test_data: Any) -> Path:
    found: Path = test_data("models/ggml-vocab-gpt-2.gguf")
    return found


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300))
def test_gpt2s_vocabulary_by_any_text(gpt2: Path, text: str) -> None:
    with whole(gpt2) as (gguf, speller), excerpted(gguf, [text]) as part:
        assert same(part, speller, text)


def test_gpt2s_vocabulary_by_what_people_say(gpt2: Path, test_data: Any) -> None:
    with test_data("text/train_sent_emo.csv").open(encoding="utf-8", errors="replace") as file:
        lines = [row["Utterance"] for row in csv.DictReader(file)]
    random.Random(0).shuffle(lines)
    with whole(gpt2) as (gguf, speller):
        assert excerpt.agrees(LIB, gguf, speller, lines[:20])
        for start in range(0, 1000, 20):
            with excerpted(gguf, lines[start : start + 20]) as part:
                assert len(part._ids) < 3000
                for text in lines[start : start + 20]:
                    assert same(part, speller, text)


def test_a_text_that_was_not_expected_takes_the_whole(qwen: Path) -> None:
    with whole(qwen) as (gguf, _), excerpted(gguf, SAID) as part:
        assert part.tokenize("the film was", False) is not None
        assert part.tokenize("the film is", False) is None
        composed = unicodedata.normalize("NFC", SAID[3])
        assert composed != SAID[3]
        assert part.tokenize(composed, False) is not None
        assert part.tokenize(7, False) is None  # type: ignore[arg-type]
    with Gguf.open(qwen) as gguf, pytest.raises(BackboneError, match="too much"):
        Excerpt(LIB, gguf, ["x" * excerpt._MOST_TEXT, "y"])


@pytest.mark.usefixtures("worth")
def test_the_second_opening_takes_an_excerpt(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    def load(lib: Any, path: Path, name: Path) -> Any:
        loaded.append(path)
        return load_vocabulary(lib, path, name)

    with Backbone.open(qwen, threads=1, texts=SAID) as first:
        assert first._vocabulary._excerpt is None
        expected = [first.tokenize(text, special=s) for text in SAID for s in (False, True)]
        other, words = first.tokenize("another"), first.detokenize(expected[0])
        ends, logits = (first.bos_id, first.eos_id), first.prefill(expected[0])
    monkeypatch.setattr(vocabulary, "load_vocabulary", load)
    shortened = opening.headers()
    with Backbone.open(qwen, threads=1, texts=SAID) as second:
        assert second._vocabulary._speller is None
        assert opening.headers() == shortened + library._shortens
        found = [second.tokenize(text, special=s) for text in SAID for s in (False, True)]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert (second.bos_id, second.eos_id) == ends
        assert np.array_equal(second.prefill(found[0]), logits)
        assert not loaded
        assert np.array_equal(second.tokenize("another"), other)
        assert np.array_equal(second.tokenize(SAID[0]), found[0])
        assert second.detokenize(found[0]) == words
        assert len(loaded) == 1
        with pytest.raises(BackboneError, match="must be a str"):
            second.tokenize(7)  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="closed"):
        second.tokenize("another")
    with Backbone.open(qwen, threads=1) as plain:  # nothing is expected
        assert plain._vocabulary._excerpt is None


@pytest.mark.usefixtures("worth")
def test_the_rest_comes_from_the_file_that_was_opened(tmp_path: Path) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "qwen")
    for _ in range(2):
        backbone = Backbone.open(path, threads=1, texts=SAID)
        expected = None if backbone._vocabulary._excerpt else backbone.tokenize("another")
        if expected is not None:
            known = expected
            backbone.close()
    toy_gguf(tmp_path / "new.gguf", "llama").replace(path)
    with backbone:
        assert backbone._vocabulary._speller is None
        assert np.array_equal(backbone.tokenize("another"), known)
    path = toy_gguf(tmp_path / "n.gguf", "qwen")
    Backbone.open(path, threads=1, texts=SAID).close()
    with Backbone.open(path, threads=1, texts=SAID) as backbone:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
        with pytest.raises(BackboneError, match="was changed"):
            backbone.tokenize("another")


@pytest.mark.usefixtures("worth")
def test_header_and_weights_are_of_the_file_that_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one that has its name by the time llama.cpp comes has another header, too."""
    path = toy_gguf(tmp_path / "m.gguf", "qwen")
    with Backbone.open(path, threads=1, texts=SAID) as first:
        expected = first.prefill([20, 21, 22])
    make, replace = vocabulary.excerpt_for, [True]

    def slow(*arguments: Any) -> Excerpt | None:
        made = make(*arguments)
        if replace.pop():
            toy_gguf(tmp_path / "new.gguf", "llama", n_layer=1).replace(path)
        else:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - 1)
        return made

    monkeypatch.setattr("mse_runtime.backbone.loading.excerpt_for", slow)
    with Backbone.open(path, threads=1, texts=SAID) as second:
        assert second._vocabulary._excerpt is not None
        assert np.array_equal(second.prefill([20, 21, 22]), expected)
    path = toy_gguf(tmp_path / "n.gguf", "qwen")
    with monkeypatch.context() as patch:
        patch.setattr("mse_runtime.backbone.loading.excerpt_for", make)
        Backbone.open(path, threads=1, texts=SAID).close()
    replace.append(False)
    with pytest.raises(BackboneError, match="was changed"):
        Backbone.open(path, threads=1, texts=SAID)


@pytest.mark.usefixtures("worth")
def test_where_excerpts_do_not_do_all_is_loaded(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened_whole(path: Path = qwen, texts: list[str] = SAID) -> bool:
        for _ in range(2):
            with Backbone.open(path, threads=1, texts=texts) as backbone:
                if backbone._vocabulary._excerpt is not None:
                    return False
                assert len(backbone.tokenize(texts[0]))
        return True

    def refused(_: str) -> int:
        raise PermissionError("no memfd")

    with monkeypatch.context() as patch:
        patch.setattr("os.memfd_create", refused)
        assert opened_whole()
    with monkeypatch.context() as patch:  # an older C library
        patch.delattr("os.memfd_create")
        assert opened_whole()
    with monkeypatch.context() as patch:  # no kernel library
        patch.setattr("mse_kernels.strings.find_strings", lambda *_, **__: None)
        assert opened_whole()
    other = toy_gguf(tmp_path / "o.gguf", "qwen")
    with monkeypatch.context() as patch:  # another way of merging, say
        patch.setattr(Excerpt, "tokenize", lambda self, text, special: np.zeros(1, np.int32))
        assert opened_whole(other)
    assert opened_whole(other)  # that is remembered
    assert opened_whole(toy_gguf(tmp_path / "l.gguf", "llama"))  # SentencePiece
    assert not opened_whole()
    with monkeypatch.context() as patch:  # now that it is known
        patch.setattr("os.memfd_create", refused)
        assert opened_whole()
    assert opened_whole(texts=["x" * (excerpt._MOST_TEXT + 1)])  # now that it is known
    monkeypatch.setattr(excerpt, "_WORTH", 50_000)
    assert opened_whole()


@pytest.mark.usefixtures("worth")
def test_special_spellings_in_a_transcript_take_the_whole(qwen: Path) -> None:
    """What llama.cpp makes of them hangs on more than their spelling."""
    prompt, said = "<|im_start|>system\nthe film<|im_end|>", "he said <|im_end|> and left"
    found = []
    for _ in range(2):
        with Backbone.open(qwen, threads=1, texts=[prompt, said]) as backbone:
            found.append([backbone.tokenize(prompt, special=True).tolist()])
            still = backbone._vocabulary._speller is None
            found[-1].append(backbone.tokenize(said).tolist())
            assert backbone._vocabulary._speller is not None
    assert still
    assert found[0] == found[1]


@pytest.mark.usefixtures("worth")
def test_a_model_that_cannot_be_loaded_with_an_excerpt(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Backbone.open(qwen, threads=1, texts=SAID).close()
    closed: list[Excerpt] = []
    close = Excerpt.close
    monkeypatch.setattr(Excerpt, "close", lambda self: (closed.append(self), close(self)))

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Backbone.open(qwen, threads=1, texts=SAID, progress=stop)
    assert len(closed) == 1
    with pytest.raises(BackboneError, match="Put it in a list"):
        Backbone.open(qwen, threads=1, texts=SAID[0])


@pytest.mark.usefixtures("worth")
def test_an_answer_does_not_depend_on_it(tmp_path: Path, features: Features) -> None:
    make_bundle(tmp_path / "toy", arch="qwen")
    found = []
    for texts in ((), SAID[:1], SAID[:1]):
        with Analyzer.open(tmp_path / "toy", adapter="numpy", threads=1, texts=texts) as analyzer:
            vocabulary = analyzer._backbone.result()._vocabulary
            answers = [analyzer.analyze_features(features, SAID[0])]
            excerpted = vocabulary._speller is None
            answers += [analyzer.analyze_features(features, text) for text in SAID[1:]]
            assert vocabulary._speller is not None
            found.append((excerpted, [answer.answer.log_scores.tolist() for answer in answers]))
    assert [excerpted for excerpted, _ in found] == [False, False, True]
    assert found[0][1] == found[1][1] == found[2][1]


@pytest.fixture
def features() -> Features:
    rng = np.random.default_rng(0)
    tracks = [
        FeatureTrack(
            spec, rng.standard_normal((30, width), np.float32), np.ones(30, np.bool_),
            np.arange(30) / 20,
        )
        for spec, width in (("lld13/1", 13), ("face167/1", 167))
    ]  # fmt: skip
    return Features(*tracks, duration=1.5)
