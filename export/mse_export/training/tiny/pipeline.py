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

from mse_export.training.tiny.workspace import SCALES, Run
from mse_runtime.errors import MSEError

__all__ = ["STAGES", "execute"]

_LOG = logging.getLogger(__name__)
#: Stages that need no clip.
_WORDS = ("vocabulary", "text", "slots")


def execute(run: Run, *, until: str = "card", threads: int = 1, workers: int = 1) -> None:
    """Run every stage in order, up to and with `until`; `ablate` is run on request only.

    `threads` train; `workers` processes draw clips meanwhile.
    """
    _LOG.info("loading PyTorch")
    import torch

    torch.set_num_threads(threads)
    run.work.mkdir(parents=True, exist_ok=True)
    with _drawing(run, 0 if until in _WORDS else workers) as drawer:
        for name, stage in STAGES.items():
            _LOG.info("stage %s", name)
            start = time.monotonic()
            if name == "clips" and drawer is not None and drawer.wait():
                raise MSEError(
                    "drawing the clips failed (see above): the same command goes on from there."
                )
            stage(run)
            _note(run, name, time.monotonic() - start)
            if name == until:
                break


def _note(run: Run, name: str, seconds: float) -> None:
    """Add a stage's wall clock to `times.json`; a stage passed over changes nothing."""
    path = run.work / "times.json"
    times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if seconds > times.get(name, 0.0):
        times[name] = round(seconds, 1)
        path.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _drawing(run: Run, workers: int) -> Iterator[subprocess.Popen[bytes] | None]:
    """A process of its own that draws and speaks every clip meanwhile; none without workers."""
    if not workers:
        yield None
        return
    name = next(name for name, scale in SCALES.items() if scale is run.scale)
    module = "mse_export.training.tiny.draw_clips"
    command = [sys.executable, "-m", module, str(run.work), name, str(workers)]
    # Away from the terminal's Ctrl-C: this process ends it.
    drawer = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield drawer
    finally:
        if drawer.poll() is None:
            drawer.terminate()
            drawer.wait()


def _clips(run: Run) -> None:
    """Nothing to do: the drawing process has been waited for."""


def _vocabulary(run: Run) -> None:
    from mse_export.training.tiny import tokeniser

    path = run.work / "vocabulary.model"
    if not path.exists():
        tokeniser.train(
            path,
            size=run.scale.model.vocab,
            sentences=run.scale.vocabulary_sentences,
        )


def _text(run: Run) -> None:
    from mse_export.training.tiny.language import train_stage

    train_stage(run.work / "text.pt", run.processor(), run.scale.text, run.scale.model)


def _slots(run: Run) -> None:
    from mse_export.training.tiny.language import train_stage

    train_stage(
        run.work / "slots.pt",
        run.processor(),
        run.scale.slots,
        run.scale.model,
        start=run.work / "text.pt",
    )


def _adapter(run: Run) -> None:
    import torch

    from mse_export.training.tiny.adapter_stage import fit

    path = run.work / "adapter.pt"
    if path.exists():
        return
    have = run.material()
    adapter, found = fit(
        have["model"],
        have["processor"],
        have["training"],
        have["fresh"],
        have["validation"],
        run.scale.adapter,
        every=100,
    )
    torch.save({"state": adapter.state_dict(), "validation": found}, path)


def _bundle(run: Run) -> None:
    from mse_export.training.tiny.calibrate import finish_bundle

    finish_bundle(run)


def _evaluate(run: Run) -> None:
    from mse_export.training.tiny.evaluate import evaluate

    path = run.work / "report.json"
    if not path.exists():
        report = evaluate(run)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _card(run: Run) -> None:
    from mse_export.training.tiny.card import write_card

    report = json.loads((run.work / "report.json").read_text(encoding="utf-8"))
    for name in ("ablations", "times"):
        path = run.work / f"{name}.json"
        if path.exists():
            report[name] = json.loads(path.read_text(encoding="utf-8"))
    write_card(run.out / "README.md", report)


def _ablate(run: Run) -> None:
    from mse_export.training.tiny.ablate import ablate

    ablate(run)
    _card(run)


#: Every stage by name, in order.
STAGES: dict[str, Callable[[Run], None]] = {
    "vocabulary": _vocabulary,
    "text": _text,
    "slots": _slots,
    "clips": _clips,
    "adapter": _adapter,
    "bundle": _bundle,
    "evaluate": _evaluate,
    "card": _card,
    "ablate": _ablate,
}
