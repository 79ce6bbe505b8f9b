"""The whole way, stage by stage: words, vocabulary, language model, clips, adapter, bundle, card.

Every stage leaves files in the working folder and is passed over where they are there already, so
a killed run goes on from where it was. Seeds are fixed; threads change rounding, nothing else.
Clips need no language model: another process draws them while the words are learned.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mse_export.training.tiny.clips import ClipSpec, plan
from mse_export.training.tiny.language import Schedule
from mse_export.training.tiny.model import TinyConfig
from mse_export.training.tiny.schedule import AdapterSchedule
from mse_runtime.errors import MSEError

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
    "card",
    "ablate",
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
    trained: bool
    """Whether the result means anything."""


FULL = Scale(
    model=TinyConfig(vocab=6144),
    vocabulary_sentences=100_000,
    text=Schedule(steps=3200, rate=1.5e-3, word_steps=150, sentences=250_000, seed=11),
    slots=Schedule(
        steps=1000, rate=1e-3, slots=True, sentences=200_000, emotion_share=0.35, seed=12
    ),
    training=(750, 2),
    validation=(80, 3),
    test=(120, 3),
    adapter=AdapterSchedule(),
    fresh=20_000,
    trained=True,
)
SMALL = Scale(
    model=TinyConfig(vocab=1024, width=64, layers=2, heads=2, feed_forward=128),
    vocabulary_sentences=3_000,
    text=Schedule(steps=20, rate=1.5e-3, batch=32, word_steps=4, sentences=800, save_every=10),
    slots=Schedule(steps=10, rate=1e-3, batch=32, slots=True, sentences=400, save_every=10),
    training=(3, 2),
    validation=(2, 2),
    test=(2, 2),
    adapter=AdapterSchedule(steps=10, batch=8, warm_up=10),
    fresh=200,
    trained=False,
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
    _drawer: subprocess.Popen[bytes] | None = None

    def stages(self) -> dict[str, Callable[[], None]]:
        """Every stage by name, in order."""
        return {name: getattr(self, f"_{name}") for name in STAGES}

    def execute(self, *, until: str = "card") -> None:
        """Run every stage in order, up to and with `until`; `ablate` is run on request only."""
        import torch

        torch.set_num_threads(self.threads)
        self.work.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with self._drawing(until):
            for name, stage in self.stages().items():
                _LOG.info("stage %s", name)
                start = time.monotonic()
                stage()
                self._note(name, time.monotonic() - start)
                if name == until:
                    break
        self._note("in all", time.monotonic() - began)

    def _note(self, name: str, seconds: float) -> None:
        """Add a stage's wall clock to `times.json`; a stage passed over changes nothing."""
        path = self.work / "times.json"
        times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if seconds > times.get(name, 0.0):
            times[name] = round(seconds, 1)
            path.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _drawing(self, until: str) -> Iterator[None]:
        """A process of its own that draws and speaks every clip meanwhile."""
        if until in ("vocabulary", "text", "slots"):
            yield
            return
        name = "full" if self.scale is FULL else "small"
        module = "mse_export.training.tiny.draw_clips"
        command = [sys.executable, "-m", module, str(self.work), name, str(self.workers)]
        # Away from the terminal's Ctrl-C: this process ends it, between two shards.
        self._drawer = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)
        try:
            yield
        finally:
            if self._drawer.poll() is None:
                self._drawer.terminate()
                self._drawer.wait()

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
        if self._drawer is not None and self._drawer.wait():
            raise MSEError(
                "drawing the clips failed (see above): the same command goes on from there."
            )

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

        ablate(self)
        self._card()

    def _card(self) -> None:
        from mse_export.training.tiny.card import write_card

        report = json.loads((self.work / "report.json").read_text(encoding="utf-8"))
        table = self.work / "ablations.json"
        if table.exists():
            report["ablations"] = json.loads(table.read_text(encoding="utf-8"))
        write_card(self.out / "README.md", report)
