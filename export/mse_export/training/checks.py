"""Looking at every row before training: what is wrong is named, and nothing vanishes in silence."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mse_export.profiles import Profile
from mse_export.training.features import Moments, check_features
from mse_export.training.progress import Reporter
from mse_export.training.state import RunFolder
from mse_runtime.bundle import FeatureInputs
from mse_runtime.datasets import PUBLISHED, DataSet, Problem, Sample, check_samples, summary
from mse_runtime.errors import MediaError, UsageError

__all__ = ["checked"]

NO_LABEL = "has no label"


def checked(
    data: DataSet,
    profile: Profile,
    skip_bad: bool,
    folder: RunFolder,
    reporter: Reporter,
) -> tuple[DataSet, FeatureInputs]:
    """The data set without bad rows, and the feature inputs with the training statistics.

    A published data set in the published layout is used as it is; anything else is z-scored.
    """
    problems = list(data.problems)
    moments = (Moments(profile.features.audio.dim), Moments(profile.features.face.dim))
    as_published = profile.layout == "published" and data.info.name in PUBLISHED
    total = sum(map(len, data.splits.values()))
    seen = 0

    def step() -> None:
        nonlocal seen
        seen += 1
        reporter.step("reading", seen, total)

    splits: dict[str, tuple[Sample, ...]] = {}
    for split, samples in data.splits.items():
        found = check_features(
            samples,
            profile.features,
            moments=moments if split == "train" else None,
            step=step,
        )
        unlabelled = [
            problem for problem in check_samples(samples, data.info) if problem.what == NO_LABEL
        ]
        bad = {problem.where for problem in (*found, *unlabelled)}
        problems += [Problem(f"{split}, {p.where}", p.what) for p in (*found, *unlabelled)]
        splits[split] = tuple(s for s in samples if s.id not in bad)
    data = replace(data, splits=splits, problems=tuple(problems))
    _refuse(data, skip_bad, folder, reporter)
    inputs = profile.features
    if not as_published:
        inputs = FeatureInputs(moments[0].into(inputs.audio), moments[1].into(inputs.face))
    return data, inputs


def _refuse(data: DataSet, skip_bad: bool, folder: RunFolder, reporter: Reporter) -> None:
    """Stop for bad rows unless they may be skipped, and for classes that nothing teaches."""
    if data.problems:
        _write_problems(folder.problems, data.problems)
        text = (
            f"{len(data.problems)} of the data set's rows cannot be used (all of them in "
            f"{folder.problems}):\n{summary(data.problems)}\n"
        )
        if not skip_bad:
            raise MediaError(text + "Mend them, or leave them out with --skip-bad.")
        reporter.say(text + "They are left out.")
    train, valid = data.split("train"), data.split("valid")
    empty = [p for p in check_samples(train, data.info) if p.where.startswith("class")]
    if empty:
        raise UsageError(
            f"The training split cannot teach every class:\n{summary(empty)}\nAdd samples, or take "
            "the class out of dataset.json."
        )
    for problem in check_samples(valid, data.info):
        reporter.say(f"Warning: in the validation split, {problem}.")


def _write_problems(path: Path, problems: Sequence[Problem]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("where", "what"))
        writer.writerows((p.where, p.what) for p in problems)
