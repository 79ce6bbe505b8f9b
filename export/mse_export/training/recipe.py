"""How to train: batch, rate, schedule and when to stop (published-model spec, section 7)."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Recipe", "load_recipe"]

FILE = Path(__file__).with_name("recipes.toml")
FAMILIES = {"llama": "llama", "chatglm": "chatglm", "qwen": "qwen", "qwen2": "qwen"}


@dataclass(frozen=True)
class Recipe:
    """AdamW with a cosine schedule after a warm-up, ended by the validation metric."""

    batch: int
    lr: float
    schedule_epochs: int
    early_stop: int
    max_epochs: int = 1000
    """The published loop is ended by early stopping alone."""
    warm_up: float = 0.1
    """Share of the horizon."""
    eps: float = 1e-4
    weight_decay: float = 0.01
    rises_again: bool = False
    """The published cosine goes up again behind its horizon; ours stays at its floor."""
    floor: float = 0.05
    """Share of the rate that is left at the horizon, where the cosine does not rise again."""

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of the optimiser's step number `step` (from 0)."""
        horizon = max(1, steps_per_epoch * self.schedule_epochs)
        warm = int(self.warm_up * horizon)
        if step < warm:
            return self.lr * step / max(1, warm)
        progress = (step - warm) / max(1, horizon - warm)
        if self.rises_again:
            return self.lr * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.lr * (self.floor + (1 - self.floor) * share)


def load_recipe(arch: str, dataset: str, backbone: str = "") -> tuple[Recipe, str]:
    """The recipe for a backbone and a data set, and the name it has in `recipes.toml`.

    Published combinations have the published numbers, cosine included; anything else is `own`.
    """
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))
    published = f"{FAMILIES.get(arch, arch)}/{dataset}"
    if published in table and backbone != "tiny":
        return Recipe(**table[published], rises_again=True), published
    name = "own/tiny" if backbone == "tiny" else "own"
    return Recipe(**table[name]), name
