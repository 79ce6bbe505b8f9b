"""From a backbone and a data set to a profile: prompt, labels, feature inputs, adapter widths."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from mse_export.profiles import Layout, Profile, family_of, ours, published, published_runs
from mse_export.training.builtin import builtin_bundle
from mse_runtime.bundle import FeatureInput, FeatureInputs, Label, Segment, Task
from mse_runtime.datasets import PUBLISHED, DataSetInfo
from mse_runtime.errors import UsageError
from mse_runtime.features.spec import get_spec

__all__ = ["choose_profile", "pad_id"]

TASK_NAMES = {"regression": "sentiment", "classification": "emotion"}
# What the profiles' own prompts say, and what takes its place for other classes and ranges.
OUR_CLASSES = "neutral, surprise, fear, sadness, joy, disgust or anger"
MELD_CLASSES = "neutral:0, surprise:1, fear:2, sadness:3, joy:4, disgust:5, anger:6"


def pad_id(config: dict[str, Any]) -> int:
    """The id that pads a transcript on the left (published-model spec, section 2)."""
    if config.get("model_type") == "qwen":
        return 151643
    for key in ("pad_token_id", "eos_token_id"):
        value = config.get(key)
        if isinstance(value, int) and value >= 0:
            return 0 if key == "eos_token_id" and config.get("model_type") == "llama" else value
    return 0


def choose_profile(
    backbone: str, arch: str, pad: int, info: DataSetInfo, layout: Layout
) -> Profile:
    """The profile for training on `info` with a backbone of architecture `arch`.

    Published data sets in the published layout get the published configuration; everything else
    ours, with the data set's own classes, range and feature specs put in.
    """
    name = TASK_NAMES[info.kind]
    if backbone == "tiny":
        return _tiny(info, layout, name)
    family = family_of(arch)
    if layout == "published":
        if info.name in {dataset for _, dataset in published_runs(family)}:
            return published(family, info.name, pad)
        base = published(family, "mosei" if info.kind == "regression" else "meld", pad)
        numbered = True
    else:
        base, numbered = ours(family, pad), False
    task = _fit(base.tasks[name], info, numbered=numbered)
    return replace(
        base,
        name=f"{family}-{info.name}",
        dataset=info.name,
        default_task=name,
        tasks={name: task},
        features=_inputs(info, ours(family, pad).features),
    )


def _tiny(info: DataSetInfo, layout: Layout, name: str) -> Profile:
    from mse_export.training.tiny.layout import segments

    bundle = builtin_bundle("tiny")
    task = bundle.tasks[name]
    if layout != bundle.layout:
        prompt = tuple(Segment(**segment) for segment in segments(name, layout))
        task = replace(task, prompt=prompt)
    known = {label.name for label in task.labels}
    if info.kind == "classification" and not set(info.labels) <= known:
        raise UsageError(
            f"The built-in language model knows the emotions {', '.join(sorted(known))} only; "
            f"not {', '.join(sorted(set(info.labels) - known))}. Rename the classes, or train with "
            "a real backbone (--backbone HF_FOLDER)."
        )
    adapter = bundle.adapter
    return Profile(
        name=f"tiny-{info.name}",
        layout=layout,
        default_task=name,
        tasks={name: _fit(replace(task, temperature=1.0), info, numbered=False)},
        text=bundle.text,
        features=_inputs(info, bundle.features),
        audio_hidden=adapter.audio_hidden,
        face_hidden=adapter.face_hidden,
        n_pseudo=adapter.n_pseudo,
        dataset=info.name,
    )


def _fit(task: Task, info: DataSetInfo, *, numbered: bool) -> Task:
    """`task` with the data set's classes or range, also where the prompt's words name them."""
    words: dict[str, str] = {}
    if info.kind == "classification":
        names = info.labels
        pairs = ", ".join(f"{label}:{i}" for i, label in enumerate(names))
        words = {OUR_CLASSES: f"{', '.join(names[:-1])} or {names[-1]}", MELD_CLASSES: pairs}
        texts = [str(i) for i in range(len(names))] if numbered else list(names)
        labels = tuple(Label(t, n) for t, n in zip(texts, names, strict=True))
        task = replace(task, labels=labels)
    elif info.range and info.range != task.range:
        low, high = info.range
        fitted = _spelled(replace(task, range=(low, high), step=0.1 if high - low <= 20 else 1.0))
        words = {"-3.0": f"{low:.1f}", "+3.0": f"{high:+.1f}", " 3.0]": f" {high:.1f}]"}
        if task.number_scale is not None:
            words = {"-30": fitted.number_text(low), "+30": fitted.number_text(high)}
        task = fitted
    return replace(task, prompt=tuple(_reworded(segment, words) for segment in task.prompt))


def _spelled(task: Task) -> Task:
    """Numbers without a point, in tenths or ones, and all with the digits of the longest."""
    if task.number_scale is None or task.range is None or task.step is None:
        return task
    low, high = task.range
    ends = (low, high, task.step)
    scale = 1.0 if all(end == round(end) for end in ends) else 10.0
    if any(abs(end * scale - round(end * scale)) > 1e-9 for end in ends):
        task = replace(task, number_format="{:+.1f}", number_scale=1.0)
        longest = max(len(task.number_text(end)) for end in (low, high))
        return replace(task, max_new_tokens=longest + 1)
    digits = len(str(round(max(abs(low), abs(high)) * scale)))
    return replace(
        task,
        number_format=f"{{:+0{digits + 1}.0f}}",
        number_scale=scale,
        max_new_tokens=digits + 2,
    )


def _reworded(segment: Segment, words: dict[str, str]) -> Segment:
    if segment.text is None:
        return segment
    old = "|".join(map(re.escape, words))
    text = re.sub(old, lambda found: words[found[0]], segment.text) if words else segment.text
    return replace(segment, text=text)


def _inputs(info: DataSetInfo, base: FeatureInputs) -> FeatureInputs:
    """Feature inputs without statistics; those come from the training split."""

    def one(spec: str, like: FeatureInput) -> FeatureInput:
        return FeatureInput(
            spec=spec,
            dim=get_spec(spec).dim,
            max_steps=like.max_steps,
            clip=5.0,
            # The published sets hold infinities, which the published loaders blank.
            nonfinite="zero" if info.name in PUBLISHED else "refuse",
        )

    return FeatureInputs(one(info.audio_spec, base.audio), one(info.face_spec, base.face))
