"""Feature encoders for a bundle: wav2vec 2.0 / HuBERT and ResNet / CLIP from Hugging Face folders.

optimum exports the network; the graph is then cut to the one output that the runtime reads, checked
against PyTorch, and named by its own hash, so features of another checkpoint can't pass for these.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mse_export.hf_folder import read_config
from mse_export.quiet import quiet
from mse_runtime.bundle import EncoderInfo, FeatureInput, FeatureInputs
from mse_runtime.bundle.files import file_sha256
from mse_runtime.errors import BundleError

__all__ = ["encoder_width", "export_audio_encoder", "export_face_encoder", "with_encoders"]

AUDIO_TYPES = ("wav2vec2", "hubert")
IMAGE_TYPES = ("resnet", "clip", "clip_vision_model")
OPSET = 18
TOLERANCE = 1e-4
AUDIO_STEPS = 1500  # 30 s at 50 rows a second
FACE_STEPS = 300


def encoder_width(folder: Path) -> int:
    """Columns of the features that an encoder folder gives."""
    config = read_config(folder)
    kind = _kind(folder, config, (*AUDIO_TYPES, *IMAGE_TYPES))
    if kind == "resnet":
        return int(config["hidden_sizes"][-1])
    if kind == "clip":
        return int(config["vision_config"]["hidden_size"])
    return int(config["hidden_size"])


def export_audio_encoder(folder: Path, target: Path) -> EncoderInfo:
    """wav2vec 2.0 or HuBERT: waveform [1, n] -> last hidden states [1, T, dim]."""
    config = read_config(folder)
    _kind(folder, config, AUDIO_TYPES)
    processor = _processor(folder)
    receptive, stride = 1, 1
    for name in ("conv_kernel", "conv_stride", "hidden_size"):
        if name not in config:
            raise BundleError(
                f"{folder / 'config.json'} has no {name!r}, so it is not a complete speech "
                "encoder. Download the folder again."
            )
    for kernel, step in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        receptive += (int(kernel) - 1) * stride
        stride *= int(step)
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((1, receptive + 7 * stride), dtype=np.float32)
    path = target / "audio_encoder.onnx"
    _export(folder, path, "last_hidden_state", samples)
    return _entry(
        "hf-audio",
        path,
        {
            "dim": int(config["hidden_size"]),
            "sample_rate": int(processor.get("sampling_rate", 16000)),
            "stride": stride,
            "receptive": receptive,
            "normalise": bool(processor.get("do_normalize", True)),
            "model": folder.resolve().name,
        },
    )


def export_face_encoder(folder: Path, target: Path) -> EncoderInfo:
    """ResNet or CLIP's image tower: pixels [B, 3, size, size] -> pooled vector [B, dim]."""
    config = read_config(folder)
    kind = _kind(folder, config, IMAGE_TYPES)
    processor = _processor(folder)
    size = _image_size(processor, config)
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size), dtype=np.float32)
    path = target / "image_encoder.onnx"
    _export(folder, path, "last_hidden_state" if kind == "resnet" else "pooler_output", pixels)
    return _entry(
        "hf-image",
        path,
        {
            "dim": encoder_width(folder),
            "size": size,
            "mean": [float(v) for v in processor.get("image_mean", (0.485, 0.456, 0.406))],
            "std": [float(v) for v in processor.get("image_std", (0.229, 0.224, 0.225))],
            "model": folder.resolve().name,
        },
    )


def with_encoders(features: FeatureInputs, encoders: tuple[EncoderInfo, ...]) -> FeatureInputs:
    """The features of exported encoders in place of the profile's own."""
    for info in encoders:
        audio = info.id.startswith("hf-audio:")
        wanted = FeatureInput(
            spec=info.id,
            dim=int(info.config["dim"]),
            max_steps=AUDIO_STEPS if audio else FACE_STEPS,
            nonfinite="zero",
        )
        features = replace(features, audio=wanted) if audio else replace(features, face=wanted)
    return features


def _kind(folder: Path, config: Mapping[str, Any], known: tuple[str, ...]) -> str:
    kind = str(config.get("model_type"))
    if kind not in known:
        raise BundleError(
            f"{folder} holds a model of type {kind!r}; here one of {', '.join(known)} is needed. "
            "Give the folder of such an encoder."
        )
    return kind


def _processor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} is missing or broken, so nobody knows how the encoder wants its input. "
            "Download the whole folder."
        ) from error
    return data if isinstance(data, dict) else {}


def _image_size(processor: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    for entry in (processor.get("crop_size"), processor.get("size")):
        if isinstance(entry, int):
            return entry
        if isinstance(entry, dict):
            for name in ("height", "shortest_edge"):
                if name in entry:
                    return int(entry[name])
    return int(config.get("image_size", 224))


def _export(folder: Path, path: Path, output: str, example: np.ndarray[Any, Any]) -> None:
    import torch

    with quiet(), tempfile.TemporaryDirectory(prefix="mse-encoder-") as scratch:
        model = _load(folder)
        from optimum.exporters.onnx import onnx_export_from_model

        onnx_export_from_model(
            model,
            Path(scratch),
            task="feature-extraction",
            opset=OPSET,
            do_validation=False,
            no_post_process=True,
        )
        graph = onnx.load(next(Path(scratch).glob("*.onnx")))
        with torch.inference_mode():
            expected = model(torch.from_numpy(example))[output]
    if expected.ndim == 4:
        expected = expected.mean((2, 3))
    onnx.save(_cut(graph, output), path)
    _compare(path, example, expected.numpy())


def _load(folder: Path) -> Any:
    from transformers import AutoModel, CLIPVisionModel

    kind = read_config(folder)["model_type"]
    loader = CLIPVisionModel if kind in ("clip", "clip_vision_model") else AutoModel
    try:
        return loader.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise BundleError(
            f"The encoder in {folder} cannot be loaded ({reason}). Download the folder again."
        ) from error


def _cut(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """Keep one output (a feature map is averaged over its pixels) and what leads to it."""
    graph = model.graph
    value = next(v for v in graph.output if v.name == output)
    if len(value.type.tensor_type.shape.dim) == 4:
        graph.node.append(helper.make_node("GlobalAveragePool", [output], ["pooled_map"]))
        graph.node.append(helper.make_node("Flatten", ["pooled_map"], ["features"], axis=1))
        value = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch_size", None])
    needed, kept = {value.name}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_inputs(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    del graph.output[:]
    graph.output.append(value)
    used = [init for init in graph.initializer if init.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(used)
    onnx.checker.check_model(model)
    return model


def _inputs(node: Any) -> Iterator[str]:
    """A node's inputs, those of its subgraphs included."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _inputs(inner)


def _compare(path: Path, example: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: example})
    if math.prod(found.shape) != expected.size:
        raise BundleError(f"{path.name}: the exported encoder gives {found.shape}.")
    error = float(np.abs(found.reshape(expected.shape) - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise BundleError(
            f"The exported encoder differs from PyTorch by {error:.1e} (bound {TOLERANCE:.0e}), so "
            "it was not used."
        )


def _entry(prefix: str, path: Path, config: Mapping[str, Any]) -> EncoderInfo:
    digest = file_sha256(path)
    return EncoderInfo(f"{prefix}:{digest[:16]}", path.name, path.stat().st_size, digest, config)
