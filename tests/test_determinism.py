"""What is the same between runs, thread counts and batch sizes, and how far.

`pytest tests/test_determinism.py -s` prints what was found beside each tolerance.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mse_runtime import Analyzer, Backbone
from mse_runtime.adapter import kernel_reasons, open_adapter
from mse_runtime.features.extract import extract
from mse_runtime.features.spec import Features
from mse_runtime.prompt import build

ROOT = Path(__file__).resolve().parent.parent
CLIPS = sorted((ROOT / "examples").glob("*.mp4"))
TEXTS = (
    "I really love it.",
    "I do not want to talk about it. It was a terrible day, and nobody even asked me how I was.",
    "Well.",
    "Thank you so much for everything, this is the nicest thing that anybody did for me.",
)
MAX_BATCH = 16
# Largest difference of a label's probability, several clips in one pass against one at a time;
# the cache holds float16 (the default), so rounding to another neighbour is what is seen.
MANY_TOLERANCE = 5e-4
THREADS_TOLERANCE = 1e-6
ADAPTER_TOLERANCE = 2e-6  # of the largest value


@pytest.fixture(scope="module")
def analyzer() -> Iterator[Analyzer]:
    with Analyzer.open("tiny", threads=1, adapter="onnx") as opened:
        yield opened


@pytest.fixture(scope="module")
def clips() -> list[Features]:
    return [extract(clip, fps=2.0, end=1.5, threads=1) for clip in CLIPS]


def answers(analyzer: Analyzer, clips: list[Features]) -> list[bytes]:
    """The label scores of every clip under every task, bit for bit."""
    return [
        analyzer.analyze_features(found, TEXTS[i % len(TEXTS)], task=task)
        .answer.log_scores.tobytes()
        for task in analyzer.bundle.tasks
        for i, found in enumerate(clips)
    ]  # fmt: skip


def test_two_processes_agree_bit_for_bit() -> None:
    code = (
        "import hashlib\n"
        "from mse_runtime import Analyzer\n"
        "with Analyzer.open('tiny', adapter='onnx') as analyzer:\n"
        f"    clips = {[*map(str, CLIPS[:3])]}\n"
        "    found = [analyzer.analyze(clip, 'I love it.', fps=2.0) for clip in clips]\n"
        "print(hashlib.sha256(b''.join(f.answer.log_scores.tobytes() for f in found)).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout, runs
    assert len(runs[0].stdout.strip()) == 64, runs[0].stderr


def test_order_and_repetition_change_nothing(analyzer: Analyzer, clips: list[Features]) -> None:
    first = answers(analyzer, clips)
    assert answers(analyzer, clips) == first
    with Analyzer.open("tiny", threads=1, adapter="onnx") as other:
        assert answers(other, clips) == first


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_threads_of_the_language_model(
    analyzer: Analyzer, clips: list[Features], threads: int
) -> None:
    one = [np.frombuffer(found) for found in answers(analyzer, clips)]
    with Analyzer.open("tiny", threads=threads, adapter="onnx") as other:
        more = [np.frombuffer(found) for found in answers(other, clips)]
    worst = max(float(np.abs(np.exp(a) - np.exp(b)).max()) for a, b in zip(one, more, strict=True))
    same = sum(a.tobytes() == b.tobytes() for a, b in zip(one, more, strict=True))
    print(f"{threads} threads: {same} of {len(one)} answers bit-identical, worst {worst:.1e}")
    assert worst <= THREADS_TOLERANCE


@pytest.fixture(scope="module")
def prompts(analyzer: Analyzer, clips: list[Features]) -> list[NDArray[np.float32]]:
    """The whole prompts of sixteen utterances as rows: real features, real adapter."""
    analyzer.ready()
    backbone, bundle = analyzer._backbone.result(), analyzer.bundle
    task = bundle.tasks[bundle.default_task]
    found = []
    for i in range(MAX_BATCH):
        text = f"{TEXTS[i % len(TEXTS)]} {i}"
        prompt = build(backbone, task.prompt, bundle.text, text, bundle.adapter.n_pseudo)
        pseudo = analyzer._pseudo(backbone, prompt, clips[i % len(clips)])
        found.append(prompt.rows(backbone.embed, pseudo))
    return found


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_several_clips_in_one_pass(
    analyzer: Analyzer, prompts: list[NDArray[np.float32]], count: int
) -> None:
    """`prefill_many` over `count` sequences against one after the other, both default caches."""
    name, task = analyzer.task(None)
    readout = analyzer._readout(name, task, analyzer._backbone.result())
    trie = readout.trie

    def probabilities(backbone: Backbone, last: NDArray[np.float32], seq: int) -> Any:
        logits = backbone.prefill_tree(
            last, trie.tokens, trie.parents, trie.branches, candidates=trie.candidates, seq=seq
        )
        answer = readout.score(logits)
        assert answer.distribution is not None
        return np.array([p for _, p in answer.distribution])

    with Backbone.open(
        analyzer.bundle.gguf_path(), threads=1, n_seq_max=MAX_BATCH, tree_width=trie.n_paths + 1,
        n_ctx=sum(map(len, prompts)) + len(trie.tokens) + 1,
    ) as backbone:  # fmt: skip
        alone = []
        for rows in prompts[:count]:
            backbone.clear()
            backbone.prefill(rows[:-1], logits="none")
            alone.append(probabilities(backbone, rows[-1:], 0))
        backbone.clear()
        backbone.prefill_many([(seq, rows[:-1]) for seq, rows in enumerate(prompts[:count])])
        together = [probabilities(backbone, prompts[seq][-1:], seq) for seq in range(count)]
    worst = float(np.abs(np.array(alone) - np.array(together)).max())
    print(f"{count} sequences in one pass: worst difference of a probability {worst:.1e}")
    assert worst <= (0.0 if count == 1 else MANY_TOLERANCE)


@pytest.mark.parametrize("name", ["numpy", "onnx", "kernels-cpu"])
def test_batch_sizes_of_the_adapter(analyzer: Analyzer, name: str) -> None:
    if reason := kernel_reasons().get(name):
        pytest.skip(f"{name}: {reason}")
    info, rng = analyzer.bundle.adapter, np.random.default_rng(0)
    inputs: list[NDArray[Any]] = []
    for steps, width in ((200, info.audio_dim), (25, info.face_dim), (40, info.n_embd)):
        inputs.append(rng.standard_normal((MAX_BATCH, steps, width), dtype=np.float32))
        inputs.append(rng.integers(1, steps + 1, MAX_BATCH))
    adapter: Any = open_adapter(analyzer.bundle, name)
    alone = np.concatenate([adapter(*(x[i : i + 1] for x in inputs)) for i in range(MAX_BATCH)])
    for count in (1, 2, 4, 8, MAX_BATCH):
        together = adapter(*(x[:count] for x in inputs))
        worst = float(np.abs(together - alone[:count]).max() / np.abs(alone).max())
        print(f"{name}, batch of {count}: worst difference {worst:.1e} of the largest value")
        assert worst <= (0.0 if count == 1 else ADAPTER_TOLERANCE)
    adapter.close()
