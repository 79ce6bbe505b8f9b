"""Files of a run: the state to go on from, the best adapter so far, and the curves.

Every file appears under its name complete or not at all, so a killed process loses at most the
epoch it was in.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mse_runtime.errors import MSEError, UsageError

__all__ = ["RunFolder", "write_checkpoint"]


class RunFolder:
    """`CKPT.train/` beside the checkpoint: state.pt, curves.csv, curves.png."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint.with_name(checkpoint.name + ".train")
        self.state = self.path / "state.pt"
        self.curves = self.path / "curves.csv"
        self.plot = self.path / "curves.png"
        self.problems = self.path / "problems.csv"

    def make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MSEError(
                f"{self.path} cannot be made ({error.strerror}). Choose another -o."
            ) from error

    def save_state(self, state: Mapping[str, Any]) -> None:
        _atomic(self.state, lambda part: torch.save(dict(state), part))

    def load_state(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state of a run with the same settings; None where there is none.

        UsageError where it belongs to other settings, naming the first that differs.
        """
        if not self.state.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.state, weights_only=True)
        except Exception as error:  # whatever a damaged zip or pickle gives
            raise UsageError(
                f"{self.state} is damaged ({type(error).__name__}). Start again with --fresh."
            ) from error
        for key, value in settings.items():
            before = state.get("settings", {}).get(key)
            if before != value:
                raise UsageError(
                    f"{self.path} holds a run with {key} = {before!r}, not {value!r}. Go on with "
                    "the same settings, choose another -o, or start again with --fresh."
                )
        return state

    def clear(self) -> None:
        """Forget an earlier run."""
        for path in (self.state, self.curves, self.plot):
            path.unlink(missing_ok=True)

    def write_curves(self, history: Sequence[Mapping[str, Any]]) -> None:
        """All epochs so far, one line each."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[-1]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(history)
        _atomic(self.curves, lambda part: part.write_text(text.getvalue(), encoding="utf-8"))

    def draw(self, history: Sequence[Mapping[str, Any]], metric: str) -> bool:
        """Loss, validation metric and rate over epochs; False without matplotlib."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return False
        figure = Figure(figsize=(7, 5), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        epochs = [row["epoch"] for row in history]
        upper.plot(epochs, [row["train_loss"] for row in history], color="tab:blue")
        upper.set_ylabel("training loss", color="tab:blue")
        right = upper.twinx()
        right.plot(epochs, [row[metric] for row in history], color="tab:orange", marker=".")
        right.set_ylabel(f"validation {metric}", color="tab:orange")
        lower.plot(epochs, [row["lr"] for row in history], color="tab:gray")
        lower.set_ylabel("learning rate")
        lower.set_xlabel("epoch")
        lower.xaxis.get_major_locator().set_params(integer=True)
        _atomic(self.plot, lambda part: figure.savefig(part, format="png", dpi=110))
        return True


def write_checkpoint(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """The adapter as safetensors with `about` as metadata (JSON values by key).

    With the suffix .pth in the published trainer's format instead (`Model.` before every name),
    `about` in a .json beside it.
    """
    tensors = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in state.items()}
    metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()}
    if path.suffix in (".pth", ".pt"):
        published = {f"Model.{name}": tensor for name, tensor in tensors.items()}
        text = json.dumps(dict(about), indent=1, ensure_ascii=False) + "\n"
        _atomic(path, lambda part: torch.save(published, part))
        _atomic(path.with_suffix(".json"), lambda part: part.write_text(text, encoding="utf-8"))
        return
    from safetensors.torch import save_file

    _atomic(path, lambda part: save_file(tensors, str(part), metadata))


def _atomic(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
    except Exception as error:  # torch and safetensors wrap the system's error in their own
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise MSEError(
            f"{path} cannot be written ({reason}). Is the disk full? What was there before is "
            "kept: make room and run the same command again."
        ) from error
