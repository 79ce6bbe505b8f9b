"""Training: batches, scores, gradients, prompts, schedules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from training_cases import (  # noqa: E402
    EMOTIONS,
)

from mse_export import profiles  # noqa: E402
from mse_export.adapter import init_random  # noqa: E402
from mse_export.adapter_shapes import AdapterDims  # noqa: E402
from mse_export.training.examples import answer_text, buckets, collate, encode  # noqa: E402
from mse_export.training.features import FeatureStore, Moments  # noqa: E402
from mse_export.training.frozen import Frozen, open_frozen  # noqa: E402
from mse_export.training.objective import assemble, loss_sum, score_answers  # noqa: E402
from mse_export.training.recipe import load_recipe  # noqa: E402
from mse_export.training.task import choose_profile  # noqa: E402
from mse_runtime.bundle import FeatureInput  # noqa: E402
from mse_runtime.datasets import DataSetInfo, Sample, held_features  # noqa: E402
from mse_runtime.errors import (  # noqa: E402
    UsageError,
)
from mse_runtime.features.spec import FeatureTrack  # noqa: E402
from mse_runtime.readout import Readout  # noqa: E402

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")

OWN = DataSetInfo("mine", "classification", "lld13/1", "face167/1", EMOTIONS)
SCALE = DataSetInfo("mine", "regression", "lld13/1", "face167/1", range=(-3.0, 3.0))


@pytest.fixture(scope="session")
def small(llama: Path) -> tuple[Frozen, Any]:
    frozen = open_frozen(llama)
    return frozen, init_random(AdapterDims(64, 13, 167, 8, 8, 3), 1)


def made_up(count: int, kind: str = "regression", seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        held = held_features(
            rng.normal(size=(3 + i, 13)).astype(np.float32),
            rng.normal(size=(2, 167)).astype(np.float32),
            "lld13/1",
            "face167/1",
        )
        text = "I am so happy with this " + "very " * i
        found.append(Sample(f"{i}", text, round(rng.uniform(-3, 3), 1), held=held))
    return found


@pytest.mark.parametrize("layout", ["pseudo-last", "published"])
def test_batching_changes_nothing(small: tuple[Frozen, Any], layout: Any) -> None:
    """Padding is invisible: a batch of unequal lengths gives the losses of each sample alone."""
    frozen, adapter = small
    profile = choose_profile("x", "llama", 0, SCALE, layout)
    profile = replace(profile, n_pseudo=3)
    task = profile.tasks["sentiment"]
    examples = encode(made_up(4), task, profile.text, frozen.tokenizer, 3)
    store = FeatureStore(profile.features)
    trie = Readout.build(task, frozen.tokenizer).trie
    with torch.no_grad():
        together = collate(examples, store)
        alone = [collate([e], store) for e in examples]
        losses = [float(loss_sum(frozen, adapter, batch)) for batch in alone]
        assert float(loss_sum(frozen, adapter, together)) == pytest.approx(sum(losses), rel=1e-5)
        scores = score_answers(frozen, adapter, together, trie)
        for row, batch in zip(scores, alone, strict=True):
            assert row == pytest.approx(score_answers(frozen, adapter, batch, trie)[0], abs=1e-4)
    assert scores.std(axis=0).max() > 1e-3  # different inputs, different answers


def test_the_trie_in_one_pass_equals_each_answer_alone(small: tuple[Frozen, Any]) -> None:
    """The probability of a number's tokens, one by one, renormalised at every branch."""
    frozen, adapter = small
    profile = replace(choose_profile("x", "llama", 0, SCALE, "pseudo-last"), n_pseudo=3)
    task = profile.tasks["sentiment"]
    readout = Readout.build(task, frozen.tokenizer)
    samples = made_up(2)
    store = FeatureStore(profile.features)
    texts = ["-13", "+00", "+29"]
    columns = [7 + 10, 30, 59]
    answers = [frozen.tokenizer.tokenize(text).tolist() for text in texts]
    every = [frozen.tokenizer.tokenize(f"{number:+03}").tolist() for number in range(-30, 31)]
    examples = encode(samples, task, profile.text, frozen.tokenizer, 3)
    batch = collate(examples, store)
    with torch.no_grad():
        scores = score_answers(frozen, adapter, batch, readout.trie)
        rows = assemble(frozen, adapter, batch)
        for i, example in enumerate(examples):
            for column, answer in zip(columns, answers, strict=True):
                start = rows[i : i + 1, : len(example.prompt)]
                tail = frozen.embed(torch.tensor([answer]))
                n = len(answer)
                places = torch.arange(len(example.prompt) - 1, len(example.prompt) + n - 1)
                logits = frozen.logits(torch.cat([start, tail], 1), places[None])[0].numpy()
                total = 0.0
                for k in range(n):
                    near = {ids[k] for ids in every if ids[:k] == answer[:k]}
                    z = logits[k][sorted(near)]
                    total += logits[k][answer[k]] - (z.max() + np.log(np.exp(z - z.max()).sum()))
                assert scores[i, column] == pytest.approx(total, abs=1e-4)


def test_gradients_reach_the_adapter_alone(small: tuple[Frozen, Any]) -> None:
    frozen, _ = small
    adapter = init_random(AdapterDims(64, 13, 167, 8, 8, 3), 5)
    profile = replace(choose_profile("x", "llama", 0, SCALE, "pseudo-last"), n_pseudo=3)
    examples = encode(made_up(3), profile.tasks["sentiment"], profile.text, frozen.tokenizer, 3)
    batch = collate(examples, FeatureStore(profile.features))
    gradients = []
    for checkpointing in (False, True):
        frozen.checkpointing(checkpointing)
        adapter.zero_grad()
        loss_sum(frozen, adapter, batch).backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    frozen.checkpointing(False)
    assert all(p.grad is None for p in frozen.model.parameters())
    assert all(g.abs().sum() > 0 for g in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-7)


def test_every_sample_once_and_alike_lengths_together() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 400, 103)]
    found = list(buckets(lengths, 8, np.random.default_rng(3)))
    assert sorted(i for batch in found for i in batch) == list(range(103))
    padded = sum(len(b) * max(lengths[i] for i in b) for b in found)
    assert padded < 1.2 * sum(lengths)
    assert found != list(buckets(lengths, 8, np.random.default_rng(4)))


def test_answer_texts() -> None:
    task = choose_profile("x", "llama", 0, SCALE, "pseudo-last").tasks["sentiment"]
    assert [answer_text(task, x) for x in (0.8, -1.24, -0.01, 3.0)] == [
        "+08",
        "-12",
        "+00",
        "+30",
    ]
    wide = choose_profile("x", "llama", 0, replace(SCALE, range=(0.0, 100.0)), "pseudo-last")
    assert answer_text(wide.tasks["sentiment"], 7.0) == "+007"
    published = profiles.published("llama", "mosei", 0).tasks["sentiment"]
    assert answer_text(published, -0.01, exact=True) == "-0.0"  # as the published code has it
    assert answer_text(published, -0.01) == "0.0"
    emotion = choose_profile("x", "llama", 0, OWN, "pseudo-last").tasks["emotion"]
    assert answer_text(emotion, 2.0) == "neutral"


def test_the_prompt_names_the_data_sets_own_classes_and_range() -> None:
    def words(profile: Any) -> str:
        task = profile.tasks[profile.default_task]
        return " ".join(segment.text or "" for segment in task.prompt)

    own = choose_profile("x", "llama", 0, OWN, "pseudo-last")
    assert "(anger, joy or neutral)" in words(own)
    assert "disgust" not in words(own)
    published = choose_profile("x", "llama", 0, OWN, "published")
    assert "<anger:0, joy:1, neutral:2>" in words(published)
    assert [label.text for label in published.tasks["emotion"].labels] == ["0", "1", "2"]
    narrow = choose_profile("x", "qwen2", 0, replace(SCALE, range=(-1.0, 1.0)), "pseudo-last")
    assert "from -10 (very negative) to +10" in words(narrow)
    assert narrow.tasks["sentiment"].range == (-1.0, 1.0)
    above = choose_profile("x", "llama", 0, replace(SCALE, range=(3.0, 9.0)), "pseudo-last")
    assert "from +3 (very negative) to +9" not in words(above)
    assert "from +30 (very negative) to +90" in words(above)
    wide = choose_profile("x", "llama", 0, replace(SCALE, range=(-30.0, 30.0)), "published")
    assert "in the range [-30.0, +30.0]" in words(wide)
    halves = choose_profile("x", "llama", 0, replace(SCALE, range=(-12.5, 12.5)), "pseudo-last")
    assert "from -125 (very negative) to +125" in words(halves)
    assert answer_text(halves.tasks["sentiment"], -11.5) == "-115"
    odd = choose_profile("x", "llama", 0, replace(SCALE, range=(-12.25, 12.75)), "pseudo-last")
    assert answer_text(odd.tasks["sentiment"], -11.25) == "-11.2"
    assert odd.tasks["sentiment"].max_new_tokens == len("-12.2") + 1
    meld = replace(OWN, name="meld")
    assert "from the                                             target" in words(
        choose_profile("x", "qwen", 0, meld, "published")
    )
    with pytest.raises(UsageError, match="boredom"):
        choose_profile("tiny", "llama", 0, replace(OWN, labels=("joy", "boredom")), "pseudo-last")


def test_statistics_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(5, 3, (n, 4)).astype(np.float32) for n in (3, 9, 20)]
    for part in parts:
        part[:, 3] = 7.0  # constant
    moments = Moments(4)
    for part in parts:
        valid = np.ones(len(part), bool)
        valid[0] = False
        moments.add(FeatureTrack("", part, valid, np.zeros(len(part))))
    moments.add(None)
    found = moments.into(FeatureInput("", 4, 100))
    stacked = np.concatenate([part[1:] for part in parts])
    assert found.mean == pytest.approx(stacked.mean(0), abs=1e-4)
    assert found.std is not None
    assert found.std[:3] == pytest.approx(stacked.std(0)[:3], rel=1e-4)
    assert found.std[3] == 1.0


def test_the_published_schedule() -> None:
    recipe, name = load_recipe("llama", "mosei")
    assert (name, recipe.batch, recipe.lr, recipe.eps) == ("llama/mosei", 8, 5e-5, 1e-4)
    steps = 30 * 100
    assert recipe.rate(0, 100) == 0.0
    assert recipe.rate(int(0.1 * steps), 100) == pytest.approx(recipe.lr)
    assert recipe.rate(steps, 100) == pytest.approx(0.0, abs=1e-12)
    assert recipe.rate(int(1.5 * steps), 100) > 0.2 * recipe.lr  # it rises again
    own, name = load_recipe("llama", "mine")
    assert name == "own"
    assert own.rate(10**6, 100) == pytest.approx(own.floor * own.lr)
    for family, dataset in profiles.published_runs():
        arch = {"llama2-7b": "llama", "qwen-1.8b": "qwen", "chatglm3-6b": "chatglm"}[family]
        assert load_recipe(arch, dataset)[1] == f"{arch}/{dataset}"
