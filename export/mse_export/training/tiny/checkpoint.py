"""Keeping the language model between stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mse_export.training.tiny.model import TinyLlama
from mse_export.training.tiny.schedule import TinyConfig

__all__ = ["load_model", "save_model", "save_state"]


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a dictionary of tensors, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def save_model(path: Path, model: TinyLlama) -> None:
    """Write weights and shape."""
    save_state(path, {"config": model.config.to_dict(), "weights": model.state_dict()})


def load_model(path: Path) -> TinyLlama:
    """The model of a file written by `save_model`, frozen."""
    state = torch.load(path, weights_only=True)
    model = TinyLlama(TinyConfig(**state["config"]))
    model.load_state_dict(state["weights"])
    model.requires_grad_(False)
    return model.eval()
