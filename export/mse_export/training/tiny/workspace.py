"""A run of `mse-train tiny`: how much of everything, and what its working folder holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mse_export.training.tiny.clips import ClipSpec, plan
from mse_export.training.tiny.schedule import AdapterSchedule, Schedule, TinyConfig

__all__ = ["FAINT", "SCALES", "Run", "Scale"]

#: Strength of a faint expression, as a share of what is usual.
FAINT = 0.75


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
    portrait: tuple[int, int]
    """Clips of the held-out generator."""
    faint: tuple[int, int]
    """Clips of actors who show less than any in training."""
    adapter: AdapterSchedule
    fresh: int
    """Sentences that clips' media are paired with."""
    trained: bool
    """Whether the result means anything."""


_FULL = Scale(
    model=TinyConfig(vocab=6144),
    vocabulary_sentences=100_000,
    text=Schedule(steps=3000, rate=1.5e-3, word_steps=150, sentences=250_000, seed=11),
    slots=Schedule(
        steps=900, rate=1e-3, slots=True, sentences=200_000, emotion_share=0.35, seed=12
    ),
    training=(750, 2),
    validation=(80, 3),
    test=(120, 3),
    portrait=(40, 2),
    faint=(40, 3),
    adapter=AdapterSchedule(),
    fresh=20_000,
    trained=True,
)
_SMALL = Scale(
    model=TinyConfig(vocab=1024, width=64, layers=2, heads=2, feed_forward=128),
    vocabulary_sentences=3_000,
    text=Schedule(steps=20, rate=1.5e-3, batch=32, word_steps=4, sentences=800, save_every=10),
    slots=Schedule(steps=10, rate=1e-3, batch=32, slots=True, sentences=400, save_every=10),
    training=(3, 2),
    validation=(2, 2),
    test=(2, 2),
    portrait=(1, 2),
    faint=(1, 2),
    adapter=AdapterSchedule(steps=10, batch=8, warm_up=10),
    fresh=200,
    trained=False,
)
SCALES = {"full": _FULL, "small": _SMALL}


@dataclass(frozen=True)
class Run:
    """One run in a working folder."""

    work: Path
    out: Path
    scale: Scale
    text_data: Path | None = None
    """Folder with `dev_sent_emo.csv` and `test_sent_emo.csv` (MELD), where one has it."""
    real_clips: Path | None = None
    """Folder of clips of real people to report on, where one has it."""

    def processor(self) -> Any:
        """The vocabulary."""
        from mse_export.training.tiny import tokeniser

        return tokeniser.load(self.work / "vocabulary.model")

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
        test = plan("test", *self.scale.test, seed=3, held_out=True, avoid=said)
        if split == "test":
            return test
        said |= {c.text for c in test}
        portrait = plan("portrait", *self.scale.portrait, seed=4, held_out=True, avoid=said)
        if split == "portrait":
            return portrait
        said |= {c.text for c in portrait}
        faint = plan("faint", *self.scale.faint, seed=5, held_out=True, avoid=said)
        return [replace(spec, strength=FAINT) for spec in faint]

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
