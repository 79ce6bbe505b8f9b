"""What a data set is made of: samples with a transcript, a label and features, in splits.

What is wrong with a row is kept as a `Problem` beside the good ones: nothing vanishes in silence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import MediaError, UsageError

if TYPE_CHECKING:
    from mse_runtime.features.spec import Features

__all__ = [
    "PUBLISHED",
    "SPLITS",
    "DataSet",
    "DataSetInfo",
    "Problem",
    "Sample",
    "assign_split",
    "check_samples",
    "held_features",
    "parse_label",
    "split_name",
    "summary",
]

SPLITS = ("train", "valid", "test")
_SPELLINGS = {"dev": "valid", "val": "valid", "validation": "valid", "eval": "test"}
Kind = Literal["regression", "classification"]


@dataclass(frozen=True)
class DataSetInfo:
    """What a data set asks and what its feature columns are.

    Classification has `labels` (names, in index order), regression `range`.
    """

    name: str
    kind: Kind
    audio_spec: str
    face_spec: str
    labels: tuple[str, ...] = ()
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Problem:
    """Something wrong with a row: where it stands and what it is."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Sample:
    """One utterance. `label` is the value on the scale or the class index, NaN where there is none.

    Features lie in memory (`held`), in a feature file, or have yet to be extracted from `clip`.
    """

    id: str
    text: str
    label: float
    clip: Path | None = None
    file: Path | None = None
    held: Features | None = field(default=None, repr=False, compare=False)

    def features(self) -> Features:
        """Features in raw units; MediaError where only a clip is there, or the file is bad."""
        if self.held is not None:
            return self.held
        if self.file is None:
            raise MediaError(
                f"{self.id}: there is a clip but no feature file. Extract first: mse-train prepare "
                "clips.csv -o data/"
            )
        from mse_runtime.features.extract import load_npz

        return load_npz(self.file)


@dataclass(frozen=True)
class DataSet:
    """The samples of each split in file order, and the rows that could not be read."""

    info: DataSetInfo
    splits: dict[str, tuple[Sample, ...]]
    problems: tuple[Problem, ...] = ()

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of `name`; UsageError names the splits that have any."""
        found = self.splits.get(name, ())
        if not found:
            there = ", ".join(f"{key} ({len(rows)})" for key, rows in self.splits.items() if rows)
            raise UsageError(
                f"The data set {self.info.name!r} has no sample in the split {name!r}; it has "
                f"{there or 'none at all'}. Add rows, or name another with --split."
            )
        return found


# Published-model spec, section 9: label maps, ranges and feature widths.
PUBLISHED = {
    info.name: info
    for info in (
        DataSetInfo(
            "mosei", "regression", "mosei-covarep74/1", "mosei-facet35/1", range=(-3.0, 3.0)
        ),
        DataSetInfo("simsv2", "regression", "egemaps25/1", "openface177/1", range=(-1.0, 1.0)),
        DataSetInfo(
            "meld",
            "classification",
            "meld-mel64/1",
            "meld-cnn64/1",
            ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
        ),
        DataSetInfo(
            "cherma",
            "classification",
            "cherma-wav1024/1",
            "cherma-res2048/1",
            ("愤怒", "厌恶", "恐惧", "高兴", "平静", "悲伤", "惊奇"),
        ),
        DataSetInfo(
            "iemocap",
            "classification",
            "meld-mel64/1",
            "meld-cnn64/1",
            ("hap", "sad", "neu", "ang", "exc", "fru"),
        ),
    )
}


def parse_label(value: object, info: DataSetInfo) -> float:
    """A label as a number: a class's index by name or number, or the value on the scale.

    Raises ValueError saying what is wrong; out of range is an error, never a clip.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if info.kind == "classification":
        if isinstance(value, str) and value.strip() in info.labels:
            return float(info.labels.index(value.strip()))
        try:
            index = float(str(value))
        except ValueError:
            raise ValueError(f"the label {value!r} is none of {', '.join(info.labels)}") from None
        if not 0 <= index < len(info.labels) or index != math.floor(index):
            raise ValueError(f"the label {value!r} is out of range 0 to {len(info.labels) - 1}")
        return index
    try:
        number = float(str(value))
    except ValueError:
        raise ValueError(f"the label {value!r} is not a number") from None
    low, high = info.range or (-math.inf, math.inf)
    if not low <= number <= high:
        raise ValueError(f"the label {number:g} is out of range {low:g} to {high:g}")
    return number


def split_name(text: str) -> str:
    """A split's name as used here; ValueError for an unknown one."""
    name = text.strip().lower()
    name = _SPELLINGS.get(name, name)
    if name not in SPLITS:
        raise ValueError(f"the split {text!r} is none of train, valid, test")
    return name


def assign_split(key: str) -> str:
    """A split for a row without one: 80 % train, 10 % valid, 10 % test, by a hash of `key`.

    The key is the speaker where known, so that nobody stands in two splits.
    """
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10
    return "valid" if bucket == 0 else "test" if bucket == 1 else "train"


def check_samples(samples: Sequence[Sample], info: DataSetInfo) -> list[Problem]:
    """Classes that no sample has, and labels that are not there at all."""
    found = [Problem(s.id, "has no label") for s in samples if math.isnan(s.label)]
    present = {int(s.label) for s in samples if not math.isnan(s.label)}
    if info.kind == "classification":
        found += [
            Problem(f"class {label!r}", "has no sample")
            for index, label in enumerate(info.labels)
            if index not in present
        ]
    return found


def summary(problems: Iterable[Problem], limit: int = 8) -> str:
    """The first problems one per line, and how many more there are."""
    found = [str(problem) for problem in problems]
    more = [f"... and {len(found) - limit} more"] if len(found) > limit else []
    return "\n".join(f"  {line}" for line in found[:limit] + more)


def held_features(
    audio: NDArray[np.float32] | None,
    face: NDArray[np.float32] | None,
    audio_spec: str,
    face_spec: str,
) -> Features:
    """Features from bare arrays [T, d]: every row valid, times unknown."""
    from mse_runtime.features.spec import Features, FeatureTrack

    def track(values: NDArray[np.float32] | None, spec: str) -> FeatureTrack | None:
        if values is None or not len(values):
            return None
        count = len(values)
        return FeatureTrack(
            spec,
            np.asarray(values, np.float32),
            np.ones(count, np.bool_),
            np.full(count, np.nan),
        )

    return Features(track(audio, audio_spec), track(face, face_spec), math.nan)
