"""What a checkpoint says about itself: everything of a bundle's manifest but the files.

`mse-train` writes it as safetensors metadata (JSON under each key); `mse-export` makes the bundle
from it, so that prompt, labels, feature specs and statistics are those of the training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mse_export.profiles import Profile
from mse_runtime.bundle import FeatureInput, FeatureInputs, Label, Segment, Task, TextInput
from mse_runtime.errors import BundleError

__all__ = ["profile_from_metadata", "profile_metadata"]


def profile_metadata(profile: Profile) -> dict[str, Any]:
    """A profile as JSON values, the inverse of `profile_from_metadata`."""
    return {"profile": dataclasses.asdict(profile)}


def profile_from_metadata(metadata: Mapping[str, Any]) -> Profile | None:
    """The profile in a checkpoint's metadata; None where it has none (published checkpoints).

    Raises BundleError where it is there and cannot be read.
    """
    data = metadata.get("profile")
    if data is None:
        return None
    try:
        return Profile(
            **{
                **data,
                "tasks": {name: _task(task) for name, task in data["tasks"].items()},
                "text": TextInput(**data["text"]),
                "features": FeatureInputs(
                    audio=_feature(data["features"]["audio"]),
                    face=_feature(data["features"]["face"]),
                ),
                "notes": tuple(data.get("notes", ())),
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"The checkpoint's description of its own training cannot be read ({error!r}): it was "
            "written by another version. Train again, or export with --dataset."
        ) from error


def _task(data: Mapping[str, Any]) -> Task:
    ends = data.get("range")
    return Task(
        **{
            **data,
            "prompt": tuple(Segment(**segment) for segment in data["prompt"]),
            "labels": tuple(Label(**label) for label in data.get("labels", ())),
            "range": None if ends is None else (float(ends[0]), float(ends[1])),
        }
    )


def _feature(data: Mapping[str, Any]) -> FeatureInput:
    mean, std = data.get("mean"), data.get("std")
    return FeatureInput(
        **{
            **data,
            "mean": None if mean is None else tuple(mean),
            "std": None if std is None else tuple(std),
        }
    )
