"""One training run from arguments to a checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from mse_export.adapter import init_random
from mse_export.profiles import Layout, Profile
from mse_export.training.about import profile_metadata
from mse_export.training.checks import checked
from mse_export.training.examples import encode
from mse_export.training.features import FeatureStore
from mse_export.training.frozen import DTYPES, Frozen, Precision, open_frozen
from mse_export.training.progress import Reporter
from mse_export.training.recipe import Recipe, load_recipe
from mse_export.training.state import RunFolder, write_checkpoint
from mse_export.training.task import choose_profile, pad_id
from mse_export.training.trainer import Outcome, Trainer
from mse_runtime.datasets import DataSet, Sample, load_dataset
from mse_runtime.errors import DeviceError, UsageError

__all__ = ["Arguments", "Result", "summary_rows", "train"]


@dataclass(frozen=True)
class Arguments:
    """What the command line says; None means the recipe's or profile's value."""

    backbone: str
    dataset: str
    data: Path
    output: Path
    layout: Layout = "pseudo-last"
    seeds: tuple[int, ...] = (1111,)
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    early_stop: int | None = None
    n_pseudo: int | None = None
    device: str = "auto"
    precision: str = "auto"
    four_bit: bool = False
    checkpointing: bool = False
    parity: bool = False
    skip_bad: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class Result:
    """One seed's outcome and the metrics on the test split (empty without one)."""

    seed: int
    checkpoint: Path
    outcome: Outcome
    test: dict[str, float]


def train(arguments: Arguments, reporter: Reporter) -> list[Result]:
    """Train one adapter per seed; the best of them (by validation) lies at `output`."""
    device, precision = _device(arguments)
    folder = RunFolder(arguments.output)
    folder.make()
    data = load_dataset(arguments.data, arguments.dataset)
    frozen = open_frozen(
        arguments.backbone, device=device, precision=precision, four_bit=arguments.four_bit
    )
    if arguments.parity:
        frozen.round_rotary()
    config = getattr(frozen.model, "config", None)
    pad = pad_id(config.to_dict()) if config is not None else 0
    profile = choose_profile(arguments.backbone, frozen.arch, pad, data.info, arguments.layout)
    if arguments.n_pseudo:
        profile = replace(profile, n_pseudo=arguments.n_pseudo)
    data, inputs = checked(data, profile, arguments.skip_bad, folder, reporter)
    profile = replace(profile, features=inputs)
    recipe, recipe_name = load_recipe(frozen.arch, arguments.dataset, arguments.backbone)
    recipe = _overridden(recipe, arguments)
    reporter.say(_plan(arguments, profile, recipe, recipe_name, frozen, data, precision))
    results = []
    for seed in arguments.seeds:
        several = len(arguments.seeds) > 1
        path = _seed_path(arguments.output, seed) if several else arguments.output
        run = _Run(arguments, frozen, profile, recipe, data, seed, path, precision, reporter)
        results.append(run.go())
    if len(results) > 1:
        _keep_best(results, arguments.output)
    return results


def summary_rows(results: Sequence[Result]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds of each test metric."""
    names = results[0].test if results else {}
    return {
        name: (
            fmean(r.test[name] for r in results),
            stdev(r.test[name] for r in results) if len(results) > 1 else math.nan,
        )
        for name in names
    }


class _Run:
    """One seed."""

    def __init__(
        self,
        arguments: Arguments,
        frozen: Frozen,
        profile: Profile,
        recipe: Recipe,
        data: DataSet,
        seed: int,
        path: Path,
        precision: Precision,
        reporter: Reporter,
    ) -> None:
        self.arguments, self.frozen, self.profile = arguments, frozen, profile
        self.recipe, self.data, self.seed, self.path = recipe, data, seed, path
        self.precision, self.reporter = precision, reporter
        self.task = profile.tasks[profile.default_task]
        self.folder = RunFolder(path)

    def go(self) -> Result:
        self.folder.make()
        if self.arguments.fresh:
            self.folder.clear()
        adapter = init_random(self.profile.dims(self.frozen.n_embd), self.seed)
        adapter.to(self.frozen.device)
        store = FeatureStore(self.profile.features)
        on_gpu = self.frozen.device.type != "cpu" and self.precision != "fp32"
        trainer = Trainer(
            self.frozen,
            adapter,
            self.task,
            store,
            self.recipe,
            self.folder,
            seed=self.seed,
            autocast=DTYPES[self.precision] if on_gpu else None,
            checkpointing=self.arguments.checkpointing,
            save_best=self._save,
            report=self._report,
            progress=lambda done, total: self.reporter.step("epoch", done, total),
            warn=self.reporter.say,
        )
        train, valid = (self._encode(self.data.split(name)) for name in ("train", "valid"))
        outcome = trainer.run(train, valid, self._settings())
        self.folder.draw(outcome.history, outcome.metric)
        test: dict[str, float] = {}
        if self.data.splits.get("test"):
            test = trainer.validate(self._encode(self.data.split("test")))
        if not self.path.exists():  # a finished run whose checkpoint was moved away
            self._save(adapter.state_dict(), outcome.history[outcome.best_epoch - 1])
        return Result(self.seed, self.path, outcome, test)

    def _encode(self, samples: Sequence[Sample]) -> list[Any]:
        return encode(
            samples,
            self.task,
            self.profile.text,
            self.frozen.tokenizer,
            self.profile.n_pseudo,
            exact=self.arguments.parity,
        )

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "max_epochs"}
        counts = {name: len(rows) for name, rows in sorted(self.data.splits.items())}
        return {
            "backbone": str(self.arguments.backbone),
            "dataset": self.arguments.dataset,
            "layout": self.profile.layout,
            "n_pseudo": self.profile.n_pseudo,
            "seed": self.seed,
            "samples": json.dumps(counts),
            "recipe": json.dumps(recipe),
        }

    def _save(self, state: Mapping[str, Tensor], row: Mapping[str, Any]) -> None:
        shown = {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        about = profile_metadata(self.profile) | {
            "created_by": "mse-train",
            "training": {
                "status": "trained",
                "note": f"{self.arguments.dataset}, {len(self.data.split('train'))} samples, "
                f"epoch {row['epoch']}, seed {self.seed}",
            },
            "backbone": {
                "source": self.arguments.backbone,
                "arch": self.frozen.arch,
                "n_embd": self.frozen.n_embd,
            },
            "validation": shown,
        }
        write_checkpoint(self.path, state, about)

    def _report(self, row: Mapping[str, Any]) -> None:
        metrics = " ".join(
            f"{name} {row[name]:.4f}" for name in ("MAE", "Corr", "acc", "weight_F1") if name in row
        )
        mark = " *" if row["best"] else ""
        self.reporter.say(
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f}  valid {metrics}  "
            f"lr {row['lr']:.2e}  {row['seconds']:.1f} s{mark}"
        )


def _device(arguments: Arguments) -> tuple[str, Precision]:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda was asked for and PyTorch sees no GPU. Install a CUDA build of torch, "
            "or leave --device away."
        )
    precision = arguments.precision
    if precision == "auto":
        if device == "cpu":
            precision = "fp32"
        else:
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device == "cpu" and precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; on the CPU use fp32 or bf16.")
    return device, precision  # type: ignore[return-value]


def _overridden(recipe: Recipe, arguments: Arguments) -> Recipe:
    changes: dict[str, Any] = {
        "batch": arguments.batch,
        "lr": arguments.lr,
        "max_epochs": arguments.epochs,
        "early_stop": arguments.early_stop,
    }
    recipe = replace(recipe, **{k: v for k, v in changes.items() if v is not None})
    if arguments.epochs and not recipe.rises_again:
        recipe = replace(recipe, schedule_epochs=min(recipe.schedule_epochs, arguments.epochs))
    return recipe


def _plan(
    arguments: Arguments,
    profile: Profile,
    recipe: Recipe,
    recipe_name: str,
    frozen: Frozen,
    data: DataSet,
    precision: Precision,
) -> str:
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in data.splits.items())
    parameters = profile.dims(frozen.n_embd).parameters
    return (
        f"{arguments.dataset}: {counts}. Backbone {frozen.source} ({frozen.arch}, width "
        f"{frozen.n_embd}, {precision} on {frozen.device}), layout {profile.layout}, adapter "
        f"{parameters / 1e6:.2f} M parameters, {profile.n_pseudo} pseudo tokens. Recipe "
        f"{recipe_name}: batch {recipe.batch}, lr {recipe.lr:g}, early stop {recipe.early_stop}."
    )


def _seed_path(output: Path, seed: int) -> Path:
    return output.with_name(f"{output.stem}-seed{seed}{output.suffix}")


def _keep_best(results: Sequence[Result], output: Path) -> None:
    sign = -1.0 if results[0].outcome.metric == "MAE" else 1.0
    best = max(results, key=lambda r: sign * r.outcome.best)
    partial = output.with_name(output.name + ".partial")
    shutil.copyfile(best.checkpoint, partial)
    partial.replace(output)
    beside = best.checkpoint.with_suffix(".json")
    if output.suffix in (".pth", ".pt") and beside.exists():
        shutil.copyfile(beside, output.with_suffix(".json"))
