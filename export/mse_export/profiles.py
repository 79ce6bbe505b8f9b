"""Profiles: tasks, text and features of a bundle, read from `profiles.toml` and `backbones.toml`.

A profile is what the manifest says besides files: the prompt segments, the transcript's rule, the
feature specs and the adapter's widths. Nothing here depends on weights.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from mse_export.adapter_shapes import AdapterDims
from mse_runtime.bundle import FeatureInput, FeatureInputs, Label, Segment, Task, TextInput
from mse_runtime.errors import UsageError

__all__ = [
    "NamedBackbone",
    "Profile",
    "backbone_names",
    "family_of",
    "guess_datasets",
    "named_backbone",
    "ours",
    "published",
    "published_rope_table",
    "published_runs",
]

Layout = Literal["published", "pseudo-last"]

FAMILIES = {"llama": "llama2-7b", "qwen": "qwen-1.8b", "chatglm": "chatglm3-6b"}
"""Family of architectures -> the published backbone whose configuration applies."""


@dataclass(frozen=True)
class NamedBackbone:
    """An entry of `backbones.toml`."""

    name: str
    repo: str
    revision: str
    config: Mapping[str, Any]
    files: tuple[str, ...]
    licence: str
    pad_id: int
    gated: bool = False


@dataclass(frozen=True)
class Profile:
    """One bundle's tasks, text and features, and the adapter's widths."""

    name: str
    layout: Layout
    default_task: str
    tasks: Mapping[str, Task]
    text: TextInput
    features: FeatureInputs
    audio_hidden: int
    face_hidden: int
    n_pseudo: int
    dataset: str = ""
    notes: tuple[str, ...] = field(default=())

    def dims(self, n_embd: int) -> AdapterDims:
        """The adapter's dimensions for a backbone of width `n_embd`."""
        return AdapterDims(
            n_embd=n_embd,
            audio_dim=self.features.audio.dim,
            video_dim=self.features.face.dim,
            audio_hidden=self.audio_hidden,
            video_hidden=self.face_hidden,
            n_pseudo=self.n_pseudo,
        )


@cache
def _data(name: str) -> dict[str, Any]:
    return tomllib.loads(files("mse_export").joinpath(name).read_text("utf-8"))


def backbone_names() -> tuple[str, ...]:
    """Names that `--backbone` knows, `tiny` excepted."""
    return tuple(_data("backbones.toml"))


def named_backbone(name: str) -> NamedBackbone:
    """An entry of `backbones.toml`; `UsageError` names the known ones."""
    entry = _data("backbones.toml").get(name)
    if entry is None:
        raise UsageError(
            f"Unknown backbone {name!r}. Known names: {', '.join(backbone_names())}, tiny; or give "
            "a Hugging Face folder or a GGUF file."
        )
    return NamedBackbone(
        name=name,
        repo=entry["repo"],
        revision=entry["revision"],
        config=entry["config"],
        files=tuple(entry["files"]),
        licence=entry["licence"],
        pad_id=entry["pad_id"],
        gated=entry.get("gated", False),
    )


def family_of(arch: str) -> str:
    """The family whose prompts suit a GGUF architecture: llama, qwen or chatglm."""
    if arch.startswith("qwen"):
        return "qwen"
    return "chatglm" if arch in ("chatglm", "glm4") else "llama"


def published_runs(family: str | None = None) -> list[tuple[str, str]]:
    """(published backbone, data set) of every published configuration."""
    return [
        (backbone, dataset)
        for backbone, runs in _data("profiles.toml")["published"].items()
        for dataset in runs
        if family is None or FAMILIES[family] == backbone
    ]


def published_rope_table(arch: str) -> Literal["bf16"] | None:
    """How published runs round the rotary table of a GGUF architecture; None: not at all."""
    rounded: Literal["bf16"] | None = _data("profiles.toml")["published_rope_table"].get(arch)
    return rounded


def published(family: str, dataset: str, pad_id: int) -> Profile:
    """The profile of a published run on a backbone of `family`.

    pad_id: the id that pads the transcript on the left (published-model spec, section 2).
    """
    data = _data("profiles.toml")
    backbone = FAMILIES[family]
    run = data["published"][backbone].get(dataset)
    if run is None:
        known = ", ".join(data["published"][backbone])
        raise UsageError(
            f"There is no published configuration of {backbone} on {dataset!r}; there are {known}."
        )
    about, layout = data["datasets"][dataset], data["layouts"][family]
    segments = tuple(
        Segment(text=run["prompt"]) if entry.get("prompt") else Segment(**entry)
        for entry in layout[about["language"]]
    )
    labels = tuple(Label(str(i), name) for i, name in enumerate(about.get("labels", ())))
    task = _task(about, segments, run["max_new_tokens"], layout, labels)
    return Profile(
        name=f"{backbone}-{dataset}",
        layout="published",
        default_task="sentiment" if about["kind"] == "regression" else "emotion",
        tasks={"sentiment" if about["kind"] == "regression" else "emotion": task},
        text=TextInput(
            about["text_tokens"], "left", pad_id, layout["special"], layout.get("normalise", "none")
        ),
        features=FeatureInputs(FeatureInput(**about["audio"]), FeatureInput(**about["face"])),
        audio_hidden=run["audio_hidden"],
        face_hidden=run["face_hidden"],
        n_pseudo=run["n_pseudo"],
        dataset=dataset,
    )


def ours(family: str, pad_id: int = 0) -> Profile:
    """Our profile for raw clips, pseudo tokens last, on a backbone of `family`."""
    about = _data("profiles.toml")["ours"]
    start = Segment(**about["start"][family])
    tasks = {}
    for name, entry in about["tasks"].items():
        segments = (start, *(Segment(**segment) for segment in entry["prompt"]))
        labels = tuple(Label(label, label) for label in entry.get("labels", ()))
        tasks[name] = _task(entry, segments, entry["max_new_tokens"], entry, labels)
    return Profile(
        name=f"{family}-clips",
        layout="pseudo-last",
        default_task=about["default_task"],
        tasks=tasks,
        text=TextInput(
            about["text_tokens"],
            "none",
            pad_id,
            normalise=_data("profiles.toml")["layouts"][family].get("normalise", "none"),
        ),
        features=FeatureInputs(FeatureInput(**about["audio"]), FeatureInput(**about["face"])),
        audio_hidden=about["audio_hidden"],
        face_hidden=about["face_hidden"],
        n_pseudo=about["n_pseudo"],
    )


def _task(
    about: Mapping[str, Any],
    segments: tuple[Segment, ...],
    max_new_tokens: int,
    numbers: Mapping[str, Any],
    labels: tuple[Label, ...],
) -> Task:
    if about["kind"] == "classification":
        return Task("classification", about["language"], segments, max_new_tokens, labels=labels)
    low, high = about["range"]
    return Task(
        "regression",
        about["language"],
        segments,
        max_new_tokens,
        range=(low, high),
        step=about["step"],
        number_format=numbers["number_format"],
        number_scale=numbers.get("number_scale"),
    )


def guess_datasets(family: str, dims: AdapterDims) -> list[str]:
    """Data sets whose features have the checkpoint's widths, the best match first.

    The checkpoint does not record its data set; (da, dv) tell all but MELD from IEMOCAP, where
    the LSTM widths and the number of pseudo tokens decide.
    """
    scored = []
    for _, dataset in published_runs(family):
        profile = published(family, dataset, 0)
        if (profile.features.audio.dim, profile.features.face.dim) != (
            dims.audio_dim,
            dims.video_dim,
        ):
            continue
        agree = (
            (profile.audio_hidden == dims.audio_hidden)
            + (profile.face_hidden == dims.video_hidden)
            + (profile.n_pseudo == dims.n_pseudo)
        )
        scored.append((-agree, dataset))
    return [dataset for _, dataset in sorted(scored)]
