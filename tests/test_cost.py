"""What an answer may cost: passes and positions exactly, growth as ratios. No clock is compared
with a constant, so a busy machine changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mse_runtime import Analyzer, Backbone, load_bundle
from mse_runtime.adapter import open_adapter
from mse_runtime.backbone.batch import Entries
from mse_runtime.bundle import Bundle
from mse_runtime.bundle.hub import resolve_bundle
from mse_runtime.features.spec import Features
from mse_runtime.prompt import build
from mse_runtime.readout import Readout
from mse_runtime.result import Stopwatch

pytest_plugins = ("backbone_fixtures",)

NOTHING = Features(None, None, 1.0, (), {})
TEXT = "Thank you so much for everything."
# Four times the work: linear cost grows fourfold, quadratic sixteenfold.
LINEAR = 8


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(resolve_bundle("tiny"))


def published(bundle: Bundle) -> Bundle:
    """The same bundle with its pseudo tokens in front, as the published layouts have them."""
    task = bundle.task
    prompt = tuple(sorted(task.prompt, key=lambda segment: segment.slot != "pseudo"))
    tasks = {**bundle.tasks, bundle.default_task: replace(task, prompt=prompt)}
    return replace(bundle, tasks=tasks)


class Meter:
    """Counts the decodes of an analyzer: (positions, rows of logits) of each."""

    def __init__(self, analyzer: Analyzer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[tuple[int, int]] = []
        analyzer.ready()
        self.backbone = analyzer._backbone.result()
        run = self.backbone._run

        def counted(entries: Entries) -> None:
            self.passes.append((len(entries), int(entries.wanted.sum())))
            run(entries)

        monkeypatch.setattr(self.backbone, "_run", counted)

    def of(self, work: Callable[[], Any]) -> list[tuple[int, int]]:
        self.passes.clear()
        work()
        return list(self.passes)

    def plan(self, bundle: Bundle, text: str = TEXT) -> tuple[Any, Any]:
        """The prompt and the label trie of the bundle's own task."""
        task = bundle.task
        prompt = build(self.backbone, task.prompt, bundle.text, text, bundle.adapter.n_pseudo)
        return prompt, Readout.build(task, self.backbone).trie


class Late(Future[Any]):
    """Features that are still being extracted when the language model is ready."""

    def __init__(self, features: Any) -> None:
        super().__init__()
        self.set_result(features)

    def done(self) -> bool:
        return False


def test_a_published_prompt_and_its_labels_are_one_pass(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = published(bundle)
    with Analyzer(bundle, adapter="onnx", threads=1) as analyzer:
        meter = Meter(analyzer, monkeypatch)
        prompt, trie = meter.plan(bundle)
        whole = (len(prompt) + len(trie.tokens), 1 + int(trie.branches.sum()))
        for _ in range(2):
            assert meter.of(lambda: analyzer.analyze_features(NOTHING, TEXT)) == [whole]


def test_after_the_features_only_the_tail_and_the_labels_remain(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Analyzer(bundle, adapter="onnx", threads=1) as analyzer:
        meter = Meter(analyzer, monkeypatch)
        prompt, trie = meter.plan(bundle)
        text = (len(prompt.early) - prompt.n_constant, 0)
        tail = (
            prompt.n_pseudo + len(prompt.late) + len(trie.tokens), 1 + int(trie.branches.sum())
        )  # fmt: skip

        def passes(text: str) -> list[tuple[int, int]]:
            return meter.of(
                lambda: analyzer._answer(Late(NOTHING), text, None, None, None, Stopwatch())
            )

        assert passes(TEXT) == [(prompt.n_constant, 0), text, tail]
        assert passes(TEXT) == [text, tail]
        other = passes("no")
        assert [rows for _, rows in other] == [0, tail[1]]  # the instructions are still there
        assert other[1] == tail
        # Features that are there already need not be waited for.
        together = [(text[0] + tail[0], tail[1])]
        assert meter.of(lambda: analyzer.analyze_features(NOTHING, TEXT)) == together


def test_several_clips_are_one_pass(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instructions are there once; each clip adds its text, its tail and its logits."""
    with Analyzer(bundle, adapter="onnx", threads=1) as analyzer:
        meter = Meter(analyzer, monkeypatch)
        analyzer.analyze_features(NOTHING, TEXT)
        single = meter.of(lambda: analyzer.analyze_features(NOTHING, TEXT))
        each = sum(positions for positions, _ in single), sum(rows for _, rows in single)
        assert analyzer.new_positions(TEXT) == each[0]
        for count in (1, 3):
            clips = [(NOTHING, TEXT, None)] * count
            assert meter.of(lambda clips=clips: analyzer.analyze_many(clips)) == [  # type: ignore[misc]
                (count * each[0], count * each[1])
            ]


def test_positions_grow_by_the_text_alone(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with Analyzer(bundle, adapter="onnx", threads=1) as analyzer:
        meter = Meter(analyzer, monkeypatch)
        analyzer.analyze_features(NOTHING, TEXT)
        sums = []
        for count in (1, 4, 16):
            text = " ".join(["good"] * count)
            tokens = len(meter.backbone.tokenize(text))
            fed = meter.of(lambda text=text: analyzer.analyze_features(NOTHING, text))  # type: ignore[misc]
            sums.append(sum(positions for positions, _ in fed) - tokens)
        assert len(set(sums)) == 1


def test_no_logits_but_those_that_decide(bundle: Bundle) -> None:
    """61 numbers, and fewer rows of logits than a twelfth of them."""
    with Analyzer(bundle, adapter="onnx", threads=1) as analyzer:
        analyzer.ready()
        trie = Readout.build(bundle.task, analyzer._backbone.result()).trie
    assert trie.n_labels == 61
    assert 1 + trie.branches.sum() <= 9
    assert len(trie.tokens) <= 14


def cheapest(small: Callable[[], Any], large: Callable[[], Any]) -> float:
    """CPU time of `large` over that of `small`: the least of interleaved turns."""
    times: dict[Callable[[], Any], list[float]] = {small: [], large: []}
    for _ in range(6):
        for work, found in times.items():
            begun = time.process_time()
            for _ in range(4):
                work()
            found.append(time.process_time() - begun)
    return min(times[large]) / min(times[small])


def test_prefill_grows_with_its_positions(toys: dict[str, Path]) -> None:
    with Backbone.open(toys["llama"], n_ctx=512, threads=1) as backbone:

        def work(n: int) -> Callable[[], None]:
            rows = backbone.embed(np.arange(n) % 200)

            def prefill() -> None:
                backbone.clear()
                backbone.prefill(rows, logits="none")

            return prefill

        assert cheapest(work(96), work(384)) < LINEAR


def test_the_adapter_grows_with_its_steps(bundle: Bundle) -> None:
    info = bundle.adapter
    adapter = open_adapter(bundle, "onnx", threads=1)
    rng = np.random.default_rng(0)
    text = rng.standard_normal((1, 20, info.n_embd), dtype=np.float32)

    def work(steps: int) -> Callable[[], Any]:
        audio = rng.standard_normal((1, steps, info.audio_dim), dtype=np.float32)
        face = rng.standard_normal((1, steps, info.face_dim), dtype=np.float32)
        one = np.ones(1, np.int64)
        return lambda: adapter(audio, one * steps, face, one * steps, text, one * 20)

    assert cheapest(work(200), work(800)) < LINEAR


def test_the_tree_beside_the_prompt_is_cheaper_than_behind_it(toys: dict[str, Path]) -> None:
    """One pass over the weights instead of two: fewer products, the weights are read once."""
    tokens, parents = np.arange(14), np.array([-1, -1, *[0] * 6, *[1] * 6])
    with Backbone.open(toys["llama"], n_ctx=256, threads=1) as backbone:
        rows = backbone.embed(np.arange(9))

        def together() -> None:
            backbone.clear()
            backbone.prefill_tree(rows, tokens, parents)

        def apart() -> None:
            backbone.clear()
            backbone.prefill(rows[:-1], logits="none")
            backbone.prefill_tree(rows[-1:], tokens, parents)

        assert cheapest(apart, together) < 1
