"""The tiny bundle's words and language model: grammar, vocabulary, model, GGUF."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("vaderSentiment")

from mse_export.training.tiny import tokeniser  # noqa: E402
from mse_export.training.tiny.corpus import NO_TARGET, encode  # noqa: E402
from mse_export.training.tiny.grammar import (  # noqa: E402
    Sentence,
    any_sentence,
    emotion_sentence,
    neutral_sentence,
)
from mse_export.training.tiny.layout import (  # noqa: E402
    Answers,
    Pieces,
    build_row,
    segments,
)
from mse_export.training.tiny.lexicon import EMOTIONS, lexicon, vader  # noqa: E402
from mse_export.training.tiny.model import TinyLlama  # noqa: E402
from mse_export.training.tiny.readout import read_emotions, read_numbers  # noqa: E402
from mse_export.training.tiny.schedule import TinyConfig  # noqa: E402

SMALL = TinyConfig(vocab=1024, width=64, layers=2, heads=2, feed_forward=96)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    return tokeniser.train(path, size=SMALL.vocab, sentences=3000)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, vocabulary: Any) -> Path:
    from mse_export.training.tiny import gguf_file as writer

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer.write(path, TinyLlama(SMALL), vocabulary)
    return path


def test_neutral_words_have_no_valence() -> None:
    words = lexicon()
    assert len(words.neutral) > 2000
    assert not [w for w in words.neutral if w in vader().valence]
    assert len(words.valent) > 7000


def test_neutral_sentences_are_neutral() -> None:
    rng = random.Random(1)
    drawn = [neutral_sentence(rng) for _ in range(200)]
    assert all(abs(s.valence) < 0.15 and s.emotion == 0 for s in drawn)


def test_half_of_the_sentences_are_neutral_and_both_signs_are_there() -> None:
    rng = random.Random(2)
    values = np.array([any_sentence(rng).valence for _ in range(1500)])
    assert 0.4 < (np.abs(values) < 0.15).mean() < 0.6
    assert (values > 0.3).mean() > 0.15
    assert (values < -0.3).mean() > 0.15


def test_emotion_sentences_hold_a_word_of_the_emotion() -> None:
    rng = random.Random(3)
    for emotion in range(1, len(EMOTIONS)):
        text = emotion_sentence(rng, emotion).text.lower()
        assert any(word in text for word in lexicon().emotion[emotion])


def test_sentences_repeat_with_the_seed() -> None:
    one, two = random.Random(4), random.Random(4)
    assert [any_sentence(one) for _ in range(20)] == [any_sentence(two) for _ in range(20)]


def test_word_targets_stand_at_the_last_piece_of_each_word(vocabulary: Any) -> None:
    example = encode(vocabulary, [Sentence("The horrible table.", 0.0, None)])[0]
    targets = [t for t in example.words if t != NO_TARGET]
    assert targets == [0.0, pytest.approx(vader().valence["horrible"] / 2), 0.0]


def test_every_number_and_emotion_is_scored_in_as_few_tokens_as_promised(vocabulary: Any) -> None:
    answers = Answers(vocabulary)
    assert vocabulary.decode(answers.number(1.26)) == "+1.3"
    assert vocabulary.decode(answers.number(-9)) == "-3.0"
    assert vocabulary.decode(answers.number(0.0)) == "+0.0"


def test_llama_cpp_tokenises_as_sentencepiece_does(vocabulary: Any, gguf_file: Path) -> None:
    from mse_runtime.backbone import Backbone

    rng = random.Random(5)
    texts = [any_sentence(rng).text for _ in range(300)]
    texts += [
        "<mm> no </mm> <s>",
        "  two  spaces ",
        "tab\tline\n",
        "naïve 😀 日本",
        "x" * 90,
        "+1.8",
    ]
    with Backbone.open(gguf_file, n_ctx=64, threads=1) as backbone:
        for text in texts:
            assert list(backbone.tokenize(text)) == vocabulary.encode(text), text
        # Only where the prompt says so is the spelling the piece itself.
        assert list(backbone.tokenize(tokeniser.OPEN, special=True)) == [tokeniser.OPEN_ID]
        assert tokeniser.OPEN_ID not in backbone.tokenize(f"say {tokeniser.OPEN}")


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40).filter(lambda t: "\0" not in t))
def test_any_text_tokenises_alike(text: str) -> None:
    from mse_runtime.backbone import Backbone

    backbone, vocabulary = _shared(Backbone)
    text = text.encode("utf-8", "ignore").decode()
    # sentencepiece treats its own space mark in a text as a space; so does llama.cpp.
    assert list(backbone.tokenize(text)) == vocabulary.encode(text)


_CACHE: dict[str, Any] = {}


def _shared(kind: Any) -> tuple[Any, Any]:
    """One vocabulary and backbone for all of hypothesis's examples."""
    if not _CACHE:
        import tempfile

        from mse_export.training.tiny import gguf_file as writer

        folder = Path(tempfile.mkdtemp())
        _CACHE["vocabulary"] = tokeniser.train(folder / "v.model", size=1024, sentences=2000)
        writer.write(folder / "m.gguf", TinyLlama(SMALL), _CACHE["vocabulary"])
        _CACHE["backbone"] = kind.open(folder / "m.gguf", n_ctx=32, threads=1)
    return _CACHE["backbone"], _CACHE["vocabulary"]


def test_the_model_is_a_llama(vocabulary: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    ours = TinyLlama(SMALL)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL.hugging_face()))
    theirs.load_state_dict(ours.state_dict())
    ids = torch.tensor([[1, *vocabulary.encode("I am happy today.")]])
    with torch.no_grad():
        hidden, _ = ours(ours.embed(ids))
        difference = ours.lm_head(hidden) - theirs(ids).logits
    assert difference.abs().max() < 1e-4


def test_llama_cpp_computes_what_the_model_computes(vocabulary: Any, gguf_file: Path) -> None:
    from mse_runtime.backbone import Backbone

    torch.manual_seed(0)
    model = TinyLlama(SMALL)
    ids = [1, *vocabulary.encode("What a lovely day!")]
    with Backbone.open(gguf_file, n_ctx=64, threads=1, kv_type="f32") as backbone:
        found = backbone.prefill(np.array(ids, np.int32))
    with torch.no_grad():
        hidden, _ = model(model.embed(torch.tensor([ids])))
        wanted = model.lm_head(hidden)[0, -1].numpy()
    assert found is not None
    assert np.abs(np.ravel(found) - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("layout", ["pseudo-last", "published"])
@pytest.mark.parametrize("task", ["sentiment", "emotion"])
def test_training_rows_are_the_manifest_segments(vocabulary: Any, layout: Any, task: str) -> None:
    text = vocabulary.encode("I like it.")
    row = build_row(Pieces(vocabulary), text, task, layout, 3)
    ids: list[int] = []
    holes = []
    for part in segments(task, layout):
        if part.get("slot") == "pseudo":
            holes = list(range(len(ids), len(ids) + 3))
            ids += row.ids[holes[0] : holes[-1] + 1]
        elif part.get("slot") == "text":
            assert row.text == len(ids)
            ids += text
        else:
            ids += [tokeniser.BOS] * part["bos"]
            wrappers = {tokeniser.OPEN: tokeniser.OPEN_ID, tokeniser.CLOSE: tokeniser.CLOSE_ID}
            piece = part["text"]
            ids += [wrappers[piece]] if part["special"] else vocabulary.encode(piece)
    assert ids == row.ids
    assert holes[0] == row.slot


def test_readout_is_a_distribution_and_pads_do_not_matter(vocabulary: Any) -> None:
    torch.manual_seed(2)
    model, answers = TinyLlama(SMALL).requires_grad_(False), Answers(vocabulary)
    ids = [1, *vocabulary.encode("It was a good day.")]
    rows = model.embed(torch.tensor([ids, ids]))
    longer = torch.cat((rows, torch.randn(2, 5, SMALL.width)), 1)
    lengths = torch.tensor([len(ids), len(ids)])
    short = read_numbers(model, answers, rows, lengths)[0]
    padded = read_numbers(model, answers, longer, lengths)[0]
    assert short.sum(1) == pytest.approx(1.0)
    np.testing.assert_allclose(short, padded, atol=2e-3)
    hot, cold = read_emotions(model, answers, rows, lengths, (4.0, 0.25))
    assert hot.max() < cold.max()
