"""Adapter weights and inputs for the kernel tests: golden ones, and random ones of any shape."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Case", "detgen", "golden_cases", "load_golden", "random_case", "random_weights"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class Case(NamedTuple):
    """Arguments of `reference.forward`, in its order."""

    weights: dict[str, F32]
    audio: F32
    audio_len: I64
    video: F32
    video_len: I64
    text: F32
    text_len: I64

    @property
    def inputs(self) -> tuple[F32, I64, F32, I64, F32, I64]:
        """The arguments of an opened kernel, in its order."""
        return (
            self.audio, self.audio_len, self.video, self.video_len, self.text, self.text_len,
        )  # fmt: skip


def detgen(seed: int, shape: list[int], scale: float = 1.0) -> F32:
    """splitmix64 of a counter, mapped to [-scale, scale): the golden vectors' generator."""
    n = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = (z >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    return (unit.astype(np.float32) * np.float32(scale)).reshape(shape)


def cxx() -> str | None:
    """A C++ compiler of this machine."""
    return shutil.which("g++") or shutil.which("clang++")


def builds_tiles() -> bool:
    """Whether a build here has the tiles of AMX: the assembler must know them (CMakeLists.txt)."""
    found = cxx()
    if found is None or platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    source = 'int main() { asm volatile("tilerelease; tdpbf16ps %tmm1, %tmm2, %tmm0"); }'
    command = [found, "-x", "c++", "-c", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def golden_cases() -> list[str]:
    """Names of the golden adapters (the files may be absent)."""
    names = [f"{b}-{d}" for b in ("llama2", "chatglm3") for d in ("mosei", "cherma")]
    return [*names, "llama2-meld", *(f"qwen-{d}" for d in ("mosei", "simsv2", "meld", "iemocap"))]


def load_golden(folder: Path, name: str) -> tuple[Case, dict[str, npt.NDArray[np.float32]]]:
    """Inputs of golden adapter `name`, and the published implementation's numbers."""
    about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    weights = {
        key.removeprefix("Model."): detgen(p["seed"], p["shape"], p["scale"])
        for key, p in about["parameters"].items()
    }
    with np.load(folder / f"{name}.npz") as found:
        expected = {key: found[key] for key in found.files}
    batch = about["batch"]

    def frames(key: str) -> F32:
        part = about[key]
        return detgen(part["seed"], [batch, part["T"], part["dim"]])

    case = Case(
        weights,
        frames("audio"),
        expected.pop("audio_len").astype(np.int64),
        frames("video"),
        expected.pop("video_len").astype(np.int64),
        detgen(about["text_seed"], [batch, about["text_len"], about["D"]]),
        np.full(batch, about["text_len"], np.int64),
    )
    return case, expected


def random_weights(
    seed: int,
    audio_dim: int = 13,
    video_dim: int = 35,
    hidden: tuple[int, int] = (32, 16),
    width: int = 128,
    n_pseudo: int = 4,
) -> dict[str, F32]:
    """Weights of the published names, scaled as a fresh layer's (1 / sqrt(fan in))."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, fan: int) -> F32:
        return np.asarray(rng.uniform(-1, 1, shape) / np.sqrt(fan), dtype=np.float32)

    out: dict[str, F32] = {}
    for name, dim, h in (("audio", audio_dim, hidden[0]), ("video", video_dim, hidden[1])):
        out[f"{name}_LSTM.rnn.weight_ih_l0"] = draw(4 * h, dim, fan=dim)
        out[f"{name}_LSTM.rnn.weight_hh_l0"] = draw(4 * h, h, fan=h)
        out[f"{name}_LSTM.rnn.bias_ih_l0"] = draw(4 * h, fan=h)
        out[f"{name}_LSTM.rnn.bias_hh_l0"] = draw(4 * h, fan=h)
        out[f"{name}_LSTM.linear.weight"] = draw(256, h, fan=h)
        out[f"{name}_LSTM.linear.bias"] = draw(256, fan=h)
    out["text_guide_mixer.text_mlp.weight"] = draw(256, width, fan=width)
    out["text_guide_mixer.text_mlp.bias"] = draw(256, fan=width)
    fusion = "mutli_scale_fusion"
    for m, r in enumerate((8, 32, 16), start=1):
        n = width // r
        out[f"{fusion}.scale{m}.0.weight"] = draw(n, 256, fan=256) * 4
        out[f"{fusion}.scale{m}.0.bias"] = draw(n, fan=256)
        out[f"{fusion}.scale{m}.2.weight"] = draw(256, n, fan=n)
        out[f"{fusion}.scale{m}.2.bias"] = draw(256, fan=n)
    out[f"{fusion}.integrating.Integrating_layer.0.weight"] = draw(1, 1, 1, 3, fan=1)
    out[f"{fusion}.integrating.Integrating_layer.0.bias"] = draw(1, fan=3)
    out[f"{fusion}.multi_scale_projector.weight"] = draw(width, 256, fan=256)
    out[f"{fusion}.multi_scale_projector.bias"] = draw(width, fan=256)
    out[f"{fusion}.projector.weight"] = draw(n_pseudo, 1, fan=1)
    out[f"{fusion}.projector.bias"] = draw(n_pseudo, fan=1)
    return out


def random_case(
    seed: int = 0,
    batch: int = 3,
    steps: tuple[int, int, int] = (21, 9, 7),
    weights: dict[str, F32] | None = None,
    lengths: str = "random",
) -> Case:
    """Normal features for `weights` (default: small ones), lengths "random" (1..T) or "full"."""
    rng = np.random.default_rng(seed)
    weights = random_weights(seed) if weights is None else weights
    dims = (
        weights["audio_LSTM.rnn.weight_ih_l0"].shape[1],
        weights["video_LSTM.rnn.weight_ih_l0"].shape[1],
        weights["text_guide_mixer.text_mlp.weight"].shape[1],
    )
    parts: list[npt.NDArray[np.float32] | npt.NDArray[np.int64]] = []
    for t, d in zip(steps, dims, strict=True):
        parts.append(rng.standard_normal((batch, t, d), dtype=np.float32))
        n = rng.integers(min(1, t), t + 1, batch) if lengths == "random" else np.full(batch, t)
        parts.append(n.astype(np.int64))
    return Case(weights, *parts)  # type: ignore[arg-type]
