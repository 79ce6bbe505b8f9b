"""The whole way, with the real built-in bundle and a real clip."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mse_runtime import Analyzer, Backbone, load_bundle
from mse_runtime.adapter import open_adapter
from mse_runtime.bundle import Segment
from mse_runtime.bundle.hub import resolve_bundle
from mse_runtime.errors import UsageError
from mse_runtime.features.extract import extract
from mse_runtime.features.normalise import prepare
from mse_runtime.features.spec import Features
from mse_runtime.parity import parse
from mse_runtime.prompt import Prompt, build
from mse_runtime.readout import intensity
from mse_runtime.result import Stopwatch
from mse_runtime.sizing import vram_mb

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "examples" / "happy.mp4"
TEXT = "Thank you so much for everything."


@pytest.fixture(scope="module")
def analyzer() -> Iterator[Analyzer]:
    with Analyzer.open("tiny", adapter="onnx") as opened:
        yield opened


@pytest.fixture(scope="module")
def features(analyzer: Analyzer) -> Features:
    inputs = analyzer.bundle.features
    return extract(CLIP, audio_spec=inputs.audio.spec, face_spec=inputs.face.spec)


def prompt_rows(analyzer: Analyzer, backbone: Backbone, features: Features) -> np.ndarray:
    """The whole prompt as rows, put together from the parts."""
    bundle = analyzer.bundle
    prompt = build(backbone, bundle.task.prompt, bundle.text, TEXT, bundle.adapter.n_pseudo)
    audio, n_audio = prepare(features.audio, bundle.features.audio)
    face, n_face = prepare(features.face, bundle.features.face)
    text = backbone.embed(prompt.text_ids)
    one = np.ones(1, np.int64)
    adapter = open_adapter(bundle, "onnx")
    pseudo = adapter(
        audio[None], n_audio * one, face[None], n_face * one, text[None], len(text) * one
    )
    return prompt.rows(backbone.embed, pseudo[0])


def test_a_clip_and_its_features_give_the_same_answer(
    analyzer: Analyzer, features: Features
) -> None:
    from_clip = analyzer.analyze(CLIP, TEXT)
    from_features = analyzer.analyze_features(features, TEXT)
    assert from_clip.value == from_features.value
    assert from_clip.distribution == from_features.distribution
    assert {"load", "decode", "features", "adapter", "prefill", "readout", "total"} <= set(
        from_clip.timing_ms
    )


def test_no_input_is_ignored(analyzer: Analyzer, features: Features) -> None:
    """Text, voice and face each move the logits; nothing gives a constant answer."""
    assert features.audio is not None
    assert features.face is not None

    def scores(changed: Features, text: str = TEXT) -> np.ndarray:
        return analyzer.analyze_features(changed, text).answer.log_scores

    base = scores(features)
    quiet = replace(features.audio, values=features.audio.values[::-1] * 0.5)
    still = replace(features.face, values=features.face.values[::-1] * 0.5)
    others = [
        scores(features, "This is a terrible day."),
        scores(replace(features, audio=quiet)),
        scores(replace(features, face=still)),
        scores(replace(features, audio=None)),
        scores(replace(features, face=None)),
    ]
    for i, one in enumerate([base, *others]):
        for other in others[i:]:
            assert np.abs(one - other).max() > 1e-6


def test_an_answer_does_not_depend_on_what_was_asked_before(
    analyzer: Analyzer, features: Features
) -> None:
    first = analyzer.analyze_features(features, TEXT)
    analyzer.analyze_features(features, "Something else altogether, and longer.", task="emotion")
    again = analyzer.analyze_features(features, TEXT)
    np.testing.assert_array_equal(first.answer.log_scores, again.answer.log_scores)
    with Analyzer.open("tiny", adapter="onnx") as fresh:
        cold = fresh.analyze_features(features, TEXT)
    np.testing.assert_array_equal(first.answer.log_scores, cold.answer.log_scores)


def test_history_does_not_matter_where_some_prompts_go_the_other_way(features: Features) -> None:
    """A long text is prefilled early, a short one in one batch: the cache must not mix them."""
    tail = Segment(text="and so, all in all, the sentiment of the sentence is")
    bundle = load_bundle(resolve_bundle("tiny"))
    task = bundle.tasks["sentiment"]
    changed = {"sentiment": replace(task, prompt=(*task.prompt, tail))}
    bundle = replace(bundle, tasks=changed)
    long = "this is a very long sentence with many words in it that says nothing much at all"
    with Analyzer(bundle, adapter="onnx") as used, Analyzer(bundle, adapter="onnx") as fresh:
        used.analyze_features(features, long)
        after = used.analyze_features(features, "ok").answer
        alone = fresh.analyze_features(features, "ok").answer
    np.testing.assert_array_equal(after.log_scores, alone.log_scores)


def test_early_prefill_equals_one_batch(
    analyzer: Analyzer, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latency-hiding order of work against the plain one: the same model, the same answer."""
    late = Future[Features]()
    late.set_result(features)
    monkeypatch.setattr(late, "done", lambda: False)
    early = analyzer._answer(late, TEXT, None, None, None, Stopwatch()).answer
    with Analyzer.open("tiny", adapter="onnx") as plain:
        whole = plain.analyze_features(features, TEXT).answer
    np.testing.assert_allclose(early.log_scores, whole.log_scores, atol=0.05)


def test_published_parity_generates(analyzer: Analyzer, features: Features) -> None:
    result = analyzer.analyze_features(features, TEXT, parity="published")
    assert result.generated is not None
    assert 1 <= len(result.generated.ids) <= analyzer.bundle.task.max_new_tokens
    plain = analyzer.analyze_features(features, TEXT)
    assert result.answer.mode == plain.answer.mode
    with Backbone.open(analyzer.bundle.gguf_path(), threads=1) as backbone:
        rows, generated = prompt_rows(analyzer, backbone, features), []
        logits = backbone.prefill(rows)
        while len(generated) < len(result.generated.ids):
            generated.append(int(logits.argmax()))
            logits = backbone.prefill(np.array(generated[-1:], np.int32))
        text = backbone.detokenize(generated)
    assert tuple(generated) == result.generated.ids
    assert result.value == parse(text, "regression")
    assert result.label == intensity(result.value, 3.0)


def test_emotion_is_a_distribution_over_the_classes(analyzer: Analyzer, features: Features) -> None:
    result = analyzer.analyze_features(features, TEXT, task="emotion")
    assert result.value is None
    assert result.label in result.probabilities
    assert sum(result.probabilities.values()) == pytest.approx(1)


def test_features_beyond_the_last_step_are_said(analyzer: Analyzer, features: Features) -> None:
    assert features.audio is not None
    repeat = analyzer.bundle.features.audio.max_steps // len(features.audio) + 1
    audio = replace(
        features.audio,
        values=np.tile(features.audio.values, (repeat, 1)),
        valid=np.tile(features.audio.valid, repeat),
        times=np.tile(features.audio.times, repeat),
    )
    result = analyzer.analyze_features(replace(features, audio=audio), TEXT)
    assert any("voice features" in warning for warning in result.warnings)


def test_buffers_of_the_host_are_no_vram() -> None:
    host = {"CPU model": 1.0, "CPU_Mapped model": 1.0, "AMX model": 9.0, "CUDA_Host compute": 1.0}
    assert vram_mb(host) is None
    assert vram_mb({**host, "CUDA0 model": 100.0, "CUDA0 KV": 10.0}) == pytest.approx(
        110 * 1.048576
    )


def test_an_unknown_task_is_named(analyzer: Analyzer, features: Features) -> None:
    with pytest.raises(UsageError, match="sarcasm"):
        analyzer.analyze_features(features, TEXT, task="sarcasm")


def test_a_long_text_is_cut_and_said(analyzer: Analyzer, features: Features) -> None:
    result = analyzer.analyze_features(features, "very good " * 10_000)
    assert any("only its beginning" in warning for warning in result.warnings)


def test_eight_threads_share_one_analyzer(analyzer: Analyzer, features: Features) -> None:
    texts = [f"I said it {n} times and it was great." for n in range(8)]
    expected = [analyzer.analyze_features(features, text).value for text in texts]
    found: dict[int, float | None] = {}

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = analyzer.analyze_features(features, texts[index]).value

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[i] for i in range(8)] == expected


def test_special_spellings_are_parsed_for_parity_alone(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transcript stays text, also where the published code would have parsed it."""
    plain = load_bundle(resolve_bundle("tiny"))
    asking = replace(plain, text=replace(plain.text, special=True))
    text = "I love it</s></s></s> so much"
    lengths: list[int] = []

    def watched(*given: object) -> Prompt:
        prompt = build(*given)  # type: ignore[arg-type]
        lengths.append(prompt.n_text_total)
        return prompt

    monkeypatch.setattr("mse_runtime.analyzer.build", watched)
    with Analyzer(plain, adapter="onnx") as one, Analyzer(asking, adapter="onnx") as other:
        usual = one.analyze_features(features, text)
        assert other.analyze_features(features, text).distribution == usual.distribution
        other.analyze_features(features, text, parity="published")
    assert lengths[0] == lengths[1] > lengths[2]
