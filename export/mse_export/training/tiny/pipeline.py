"""The whole way, stage by stage: words, vocabulary, language model, clips, adapter, bundle, card.

Every stage leaves files in the working folder and is passed over where they are there already, so
a killed run goes on from where it was. Seeds are fixed; threads change rounding, nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mse_export.training.tiny.adapter_stage import AdapterSchedule
from mse_export.training.tiny.clips import ClipSpec, plan
from mse_export.training.tiny.language import Schedule
from mse_export.training.tiny.model import TinyConfig

__all__ = ["FULL", "SMALL", "STAGES", "Run", "Scale"]

_LOG = logging.getLogger(__name__)
STAGES = (
    "vocabulary",
    "text",
    "slots",
    "clips",
    "adapter",
    "bundle",
    "evaluate",
    "ablate",
    "card",
)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    model: TinyConfig
    vocabulary_sentences: int
    text: Schedule
    slots: Schedule
    training: tuple[int, int]
    """Identities, and clips of each."""
    validation: tuple[int, int]
    test: tuple[int, int]
    adapter: AdapterSchedule
    fresh: int
    """Sentences that clips' media are paired with."""
    ablations: bool


FULL = Scale(
    model=TinyConfig(),
    vocabulary_sentences=100_000,
    text=Schedule(steps=4000, rate=1.5e-3, word_steps=150, sentences=250_000, seed=11),
    slots=Schedule(
        steps=1000, rate=1e-3, slots=True, sentences=200_000, emotion_share=0.35, seed=12
    ),
    training=(180, 3),
    validation=(40, 3),
    test=(40, 3),
    adapter=AdapterSchedule(steps=400),
    fresh=20_000,
    ablations=True,
)
SMALL = Scale(
    model=TinyConfig(vocab=1024, width=64, layers=2, heads=2, feed_forward=128),
    vocabulary_sentences=3_000,
    text=Schedule(steps=20, rate=1.5e-3, batch=32, word_steps=4, sentences=800, save_every=10),
    slots=Schedule(steps=10, rate=1e-3, batch=32, slots=True, sentences=400, save_every=10),
    training=(3, 2),
    validation=(2, 2),
    test=(2, 2),
    adapter=AdapterSchedule(steps=10, batch=8),
    fresh=200,
    ablations=False,
)


@dataclass
class Run:
    """One run in a working folder."""

    work: Path
    out: Path
    scale: Scale
    threads: int = 1
    workers: int = 1
    text_data: Path | None = None
    """Folder with `dev_sent_emo.csv` and `test_sent_emo.csv` (MELD), where one has it."""
    real_clips: Path | None = None
    """Folder of clips of real people to report on, where one has it."""

    def stages(self) -> dict[str, Callable[[], None]]:
        """Every stage by name, in order."""
        return {name: getattr(self, f"_{name}") for name in STAGES}

    def execute(self, *, until: str | None = None) -> None:
        """Run every stage in order, up to and with `until`."""
        import torch

        torch.set_num_threads(self.threads)
        self.work.mkdir(parents=True, exist_ok=True)
        for name, stage in self.stages().items():
            _LOG.info("stage %s", name)
            stage()
            if name == until:
                return

    # Language model.

    def processor(self) -> Any:
        """The vocabulary."""
        from mse_export.training.tiny import tokeniser

        return tokeniser.load(self.work / "vocabulary.model")

    def _vocabulary(self) -> None:
        from mse_export.training.tiny import tokeniser

        path = self.work / "vocabulary.model"
        if not path.exists():
            tokeniser.train(
                path,
                size=self.scale.model.vocab,
                sentences=self.scale.vocabulary_sentences,
            )

    def _text(self) -> None:
        from mse_export.training.tiny.language import train_stage

        train_stage(self.work / "text.pt", self.processor(), self.scale.text, self.scale.model)

    def _slots(self) -> None:
        from mse_export.training.tiny.language import train_stage

        train_stage(
            self.work / "slots.pt",
            self.processor(),
            self.scale.slots,
            self.scale.model,
            start=self.work / "text.pt",
        )

    # Clips.

    def specs(self, split: str) -> list[ClipSpec]:
        """The clips of a split; identities, voices (in the test) and sentences are apart."""
        training = plan("train", *self.scale.training, seed=1)
        if split == "train":
            return training
        said = frozenset(c.text for c in training)
        validation = plan("valid", *self.scale.validation, seed=2, avoid=said)
        if split == "valid":
            return validation
        said |= {c.text for c in validation}
        return plan("test", *self.scale.test, seed=3, held_out=True, avoid=said)

    def _clips(self) -> None:
        from mse_export.training.tiny.clips import render_all

        for split in ("valid", "train"):
            folder = self.work / "clips"
            render_all(self.specs(split), folder, split, workers=self.workers)

    # Adapter.

    def material(self) -> dict[str, Any]:
        """What fitting an adapter needs: items of both splits, statistics, fresh sentences."""
        from mse_export.training.tiny.checkpoint import load_model
        from mse_export.training.tiny.clips import load
        from mse_export.training.tiny.corpus import clip_examples
        from mse_export.training.tiny.prompter import items, statistics

        processor = self.processor()
        training = load(self.specs("train"), self.work / "clips", "train")
        validation = load(self.specs("valid"), self.work / "clips", "valid")
        stats = statistics(training)
        return {
            "model": load_model(self.work / "slots.pt"),
            "processor": processor,
            "training": items(training, processor, stats),
            "validation": items(validation, processor, stats),
            "statistics": stats,
            "fresh": clip_examples(processor, self.scale.fresh, 4),
        }

    def _adapter(self) -> None:
        import torch

        from mse_export.training.tiny.adapter_stage import fit

        path = self.work / "adapter.pt"
        if path.exists():
            return
        have = self.material()
        adapter, found = fit(
            have["model"],
            have["processor"],
            have["training"],
            have["fresh"],
            have["validation"],
            self.scale.adapter,
            every=100,
        )
        torch.save({"state": adapter.state_dict(), "validation": found}, path)

    def _bundle(self) -> None:
        from mse_export.training.tiny.calibrate import finish_bundle

        finish_bundle(self)

    def _evaluate(self) -> None:
        from mse_export.training.tiny.evaluate import evaluate

        path = self.work / "report.json"
        if not path.exists():
            report = evaluate(self)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def _ablate(self) -> None:
        from mse_export.training.tiny.ablate import ablate

        if self.scale.ablations:
            ablate(self)

    def _card(self) -> None:
        from mse_export.training.tiny.card import write_card

        report = json.loads((self.work / "report.json").read_text(encoding="utf-8"))
        table = self.work / "ablations.json"
        if table.exists():
            report["ablations"] = json.loads(table.read_text(encoding="utf-8"))
        write_card(self.out / "README.md", report)


def with_steps(scale: Scale, steps: int) -> Scale:
    """The same with another number of adapter steps."""
    return replace(scale, adapter=replace(scale.adapter, steps=steps))
