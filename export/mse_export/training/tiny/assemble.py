"""Putting the bundle together: language model, adapter, manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mse_export import onnx_graph
from mse_export.adapter import Adapter
from mse_export.training.tiny import gguf_file
from mse_export.training.tiny.corpus import MAX_TOKENS
from mse_export.training.tiny.layout import Layout, segments
from mse_export.training.tiny.lexicon import EMOTIONS
from mse_export.training.tiny.model import TinyLlama
from mse_runtime.bundle import (
    AdapterInfo,
    BackboneInfo,
    Bundle,
    FeatureInput,
    FeatureInputs,
    FileRef,
    Label,
    Segment,
    Task,
    TextInput,
    Training,
)

__all__ = ["Statistics", "assemble", "state_arrays"]


@dataclass(frozen=True)
class Statistics:
    """The training set's mean and standard deviation per column, and the longest sequence."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    max_steps: int


@dataclass(frozen=True)
class Card:
    """What the manifest says about how the bundle was made."""

    status: Literal["trained", "untrained"]
    note: str
    temperature: Mapping[str, float] = field(default_factory=dict)
    layout: Layout = "pseudo-last"
    parity: Mapping[str, Any] = field(default_factory=dict)


def state_arrays(adapter: Adapter) -> dict[str, NDArray[np.float32]]:
    """The adapter's parameters under their published names."""
    return {
        name: np.ascontiguousarray(value.detach().float().numpy())
        for name, value in adapter.state_dict().items()
    }


def assemble(
    folder: Path,
    model: TinyLlama,
    processor: Any,
    adapter: Adapter,
    statistics: Mapping[str, Statistics],
    card: Card,
) -> Bundle:
    """Write every file of the bundle but its README into `folder`.

    `statistics` has "audio" and "face". The GGUF is written only where it is not there or differs.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    gguf_file.write(folder / "backbone.gguf", model, processor)
    state = state_arrays(adapter)
    save_file(state, str(folder / "adapter.safetensors"))
    onnx_graph.save(onnx_graph.build(state), folder / "adapter.onnx")
    dims = adapter.dims
    bundle = Bundle(
        name="tiny",
        version="0.1.0",
        created_by="mse-train tiny",
        training=Training(card.status, card.note),
        layout=card.layout,
        default_task="sentiment",
        tasks={
            "sentiment": Task(
                kind="regression",
                language="en",
                prompt=_prompt("sentiment", card.layout),
                max_new_tokens=4,
                temperature=card.temperature.get("sentiment", 1.0),
                range=(-3.0, 3.0),
                step=0.1,
                number_format="{:+.1f}",
            ),
            "emotion": Task(
                kind="classification",
                language="en",
                prompt=_prompt("emotion", card.layout),
                max_new_tokens=1,
                temperature=card.temperature.get("emotion", 1.0),
                labels=tuple(Label(name, name) for name in EMOTIONS),
            ),
        },
        text=TextInput(max_tokens=MAX_TOKENS, pad="none", pad_id=3),
        features=FeatureInputs(
            audio=_input("lld13/1", statistics["audio"]),
            face=_input("face167/1", statistics["face"]),
        ),
        adapter=AdapterInfo(
            onnx=_reference(folder / "adapter.onnx"),
            weights=_reference(folder / "adapter.safetensors"),
            n_pseudo=dims.n_pseudo,
            n_embd=dims.n_embd,
            audio_dim=dims.audio_dim,
            face_dim=dims.video_dim,
            audio_hidden=dims.audio_hidden,
            face_hidden=dims.video_hidden,
            parameters=dims.parameters,
        ),
        backbone=BackboneInfo(
            arch="llama",
            n_embd=model.config.width,
            n_vocab=model.config.vocab,
            n_layer=model.config.layers,
            gguf=_reference(folder / "backbone.gguf", "F16"),
        ),
        parity=card.parity,
        path=folder,
    )
    partial = folder / "manifest.partial"
    partial.write_text(json.dumps(bundle.to_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(folder / "manifest.json")
    return bundle


def _prompt(task: str, layout: Layout) -> tuple[Segment, ...]:
    return tuple(Segment(**entry) for entry in segments(task, layout))


def _input(spec: str, statistics: Statistics) -> FeatureInput:
    return FeatureInput(
        spec=spec,
        dim=len(statistics.mean),
        max_steps=statistics.max_steps,
        mean=tuple(round(float(v), 6) for v in statistics.mean),
        std=tuple(round(float(v), 6) for v in statistics.std),
        clip=5.0,
    )


def _reference(path: Path, kind: str | None = None) -> FileRef:
    data = path.read_bytes()
    return FileRef(path.name, len(data), hashlib.sha256(data).hexdigest(), kind)
