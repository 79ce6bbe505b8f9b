"""The finished bundle: temperatures from the validation clips, then every file of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mse_export.adapter import Adapter, adapter_from_state
from mse_export.training.tiny.assemble import Card, assemble
from mse_export.training.tiny.model import TinyLlama
from mse_export.training.tiny.prompter import Item, Prompter
from mse_export.training.tiny.readout import read_emotions, read_numbers
from mse_export.training.tiny.schedule import AdapterSchedule
from mse_export.training.tiny.workspace import Run
from mse_export.training.tiny.world import fused_emotion, fused_sentiment

__all__ = ["finish_bundle", "fit_temperatures"]

_LOG = logging.getLogger(__name__)
#: Candidates, about 5 % apart.
_GRID = tuple(round(float(t), 3) for t in np.geomspace(0.4, 4.0, 48))

TRAINED = (
    "Trained on synthetic actors only (drawn faces, espeak-ng speech, sentences of a grammar); "
    "for trying, testing and teaching, not for judging people. See README.md in the bundle."
)
UNTRAINED = "Made at miniature scale to exercise the code: its answers mean nothing."


@torch.no_grad()
def fit_temperatures(
    model: TinyLlama,
    adapter: Adapter,
    processor: Any,
    clips: Sequence[Item],
    schedule: AdapterSchedule,
) -> dict[str, float]:
    """The temperature per task with the smallest negative log-likelihood of the labels."""
    prompter = Prompter(model, adapter, processor, schedule.layout, schedule.mixer)
    loss: dict[str, NDArray[np.float64]] = {
        "sentiment": np.zeros(len(_GRID)),
        "emotion": np.zeros(len(_GRID)),
    }
    for start in range(0, len(clips), 64):
        part = clips[start : start + 64]
        rows, lengths, _ = prompter.rows(part, "sentiment")
        table = read_numbers(model, prompter.answers, rows, lengths, _GRID)
        value = np.array([fused_sentiment(i.valence, i.media) for i in part])
        index = np.clip(np.round(value * 10) + 30, 0, 60).astype(int)
        loss["sentiment"] -= np.log(table[:, np.arange(len(part)), index] + 1e-9).sum(1)
        one = [i for i in part if i.emotion is not None]
        if not one:
            continue
        rows, lengths, _ = prompter.rows(one, "emotion")
        table = read_emotions(model, prompter.answers, rows, lengths, _GRID)
        truth = [fused_emotion(i.emotion or 0, i.valence, i.media) for i in one]
        loss["emotion"] -= np.log(table[:, np.arange(len(one)), truth] + 1e-9).sum(1)
    return {task: _GRID[int(values.argmin())] for task, values in loss.items()}


def finish_bundle(run: Run) -> None:
    """Write the bundle of a run (all but its README) to its output folder."""
    have = run.material()
    saved = torch.load(run.work / "adapter.pt", weights_only=True)
    adapter = adapter_from_state(saved["state"])
    schedule = run.scale.adapter
    temperature = fit_temperatures(
        have["model"], adapter, have["processor"], have["validation"], schedule
    )
    _LOG.info("temperatures %s", temperature)
    real = run.scale.trained
    assemble(
        run.out,
        have["model"],
        have["processor"],
        adapter,
        have["statistics"],
        Card(
            "trained" if real else "untrained",
            TRAINED if real else UNTRAINED,
            temperature,
            schedule.layout,
        ),
    )
