"""Reading the golden sets: inputs are generated, outputs are stored (see their README)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

INTERMEDIATES = (
    "audio_h",
    "video_h",
    "text_knowledge",
    "tgm",
    "scale1",
    "scale2",
    "scale3",
    "integrating",
)


def detgen(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    """Splitmix64 stream as float32, uniform in [-scale, scale), row-major.

    Element i is the finaliser of `seed + (i + 1) * golden ratio`, its top 24 bits as a fraction.
    """
    count = int(np.prod(shape))
    mask = (1 << 64) - 1
    golden = 0x9E3779B97F4A7C15
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(golden)
        state += np.uint64(seed & mask)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state ^= state >> np.uint64(shift)
            state *= np.uint64(factor)
        state ^= state >> np.uint64(31)
    unit = (state >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return (unit * np.float32(scale)).reshape(shape)


@dataclass(frozen=True)
class AdapterGolden:
    """One set: weights and inputs regenerated, outputs as stored."""

    name: str
    info: dict[str, Any]
    weights: dict[str, Array]
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]


def adapter_golden_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.npz"))


def load_adapter_golden(folder: Path, name: str) -> AdapterGolden:
    """Weights carry names without `Model.`; inputs are the six of the ONNX graph."""
    info = json.loads((folder / f"{name}.json").read_text())
    outputs = dict(np.load(folder / f"{name}.npz", allow_pickle=False))
    weights = {
        key.removeprefix("Model."): detgen(spec["seed"], tuple(spec["shape"]), spec["scale"])
        for key, spec in info["parameters"].items()
    }
    batch, width = info["batch"], info["D"]
    inputs: dict[str, NDArray[Any]] = {
        "text": detgen(info["text_seed"], (batch, info["text_len"], width)),
        "text_len": np.full(batch, info["text_len"], np.int64),
    }
    for modality in ("audio", "video"):
        spec = info[modality]
        inputs[modality] = detgen(spec["seed"], (batch, spec["T"], spec["dim"]))
        inputs[f"{modality}_len"] = outputs[f"{modality}_len"].astype(np.int64)
    return AdapterGolden(name, info, weights, inputs, outputs)


def relative_error(found: NDArray[Any], reference: NDArray[Any]) -> float:
    """Largest difference relative to the reference's largest magnitude."""
    assert found.shape == reference.shape, (found.shape, reference.shape)
    difference = np.abs(found.astype(np.float64) - reference.astype(np.float64)).max()
    return float(difference / np.abs(reference).max())


def compare_adapter_outputs(
    found: dict[str, NDArray[Any]], golden: AdapterGolden
) -> dict[str, float]:
    """Relative error by name for whatever of `trace`'s outputs `found` holds."""
    stored = golden.outputs
    errors = {
        name: relative_error(found[name], stored[name]) for name in INTERMEDIATES if name in found
    }
    if "multi_scale" in found:
        errors["multi_scale"] = relative_error(
            found["multi_scale"][:, ::4], stored["multi_scale_every_4th"]
        )
    pseudo = found["pseudo"]
    errors["pseudo"] = relative_error(pseudo[:, :, ::16], stored["pseudo_every_16th"])
    # A sum over D columns may cancel: relative to the sum of magnitudes it still covers them all.
    total = pseudo.astype(np.float64).sum(axis=2)
    errors["pseudo_sum"] = float(
        (np.abs(total - stored["pseudo_sum"]) / stored["pseudo_abs_sum"]).max()
    )
    return errors
