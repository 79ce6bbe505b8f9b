"""The adapter's weights, checked once: names, shapes, finite values, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mse_kernels.errors import WeightsError

__all__ = ["FUSION", "STORAGES", "Weights"]

F32 = npt.NDArray[np.float32]
STORAGES = ("f32", "f16", "bf16")
FUSION = "mutli_scale_fusion"  # (sic) the published spelling
MIX = f"{FUSION}.integrating.Integrating_layer.0"
UP = f"{FUSION}.multi_scale_projector"
PSEUDO = f"{FUSION}.projector"

MAX_HIDDEN, MAX_DIM, MAX_PSEUDO, MAX_MIX = 512, 65536, 64, 4096


@dataclass(frozen=True)
class Weights:
    """Published parameters as contiguous float32 arrays, and the dimensions they imply.

    arrays: published names without `Model.`; gate rows in the order i, f, g, o.
    mix: width of the encoders' output (256 in the published model). scale: hidden widths of the
    three experts in the published order (D/8, D/32, D/16).
    Source: published-model spec, sections 1.2 to 1.5.
    """

    arrays: Mapping[str, F32]
    audio_dim: int
    audio_hidden: int
    video_dim: int
    video_hidden: int
    mix: int
    n_embd: int
    scale: tuple[int, int, int]
    n_pseudo: int

    @classmethod
    def of(cls, weights: Mapping[str, npt.NDArray[Any]] | Weights) -> Weights:
        """Check `weights`; WeightsError names the parameter. Other keys are ignored."""
        if isinstance(weights, Weights):
            return weights
        arrays: dict[str, F32] = {}

        def take(name: str, *shape: int | None) -> tuple[int, ...]:
            if name not in weights:
                raise WeightsError(f"adapter weights lack {name!r}; is this another model's file?")
            value = np.asarray(weights[name])
            if value.dtype.kind != "f":
                raise WeightsError(f"{name} holds {value.dtype}, expected floating point")
            fits = len(shape) == value.ndim and all(
                want is None or want == got for want, got in zip(shape, value.shape, strict=True)
            )
            if not fits or value.size == 0:
                want = ", ".join("any" if n is None else str(n) for n in shape)
                raise WeightsError(f"{name} has shape {value.shape}, expected ({want})")
            array = np.require(value, np.float32, ["C", "A"])
            if not np.isfinite(array).all():
                raise WeightsError(f"{name} holds a NaN or an infinity")
            arrays[name] = array
            return value.shape

        text = "text_guide_mixer.text_mlp"
        mix, width = take(f"{text}.weight", None, None)
        take(f"{text}.bias", mix)
        dims: list[int] = []
        for part in ("audio_LSTM", "video_LSTM"):
            _, hidden = take(f"{part}.rnn.weight_hh_l0", None, None)
            take(f"{part}.rnn.weight_hh_l0", 4 * hidden, hidden)
            _, dim = take(f"{part}.rnn.weight_ih_l0", 4 * hidden, None)
            take(f"{part}.rnn.bias_ih_l0", 4 * hidden)
            take(f"{part}.rnn.bias_hh_l0", 4 * hidden)
            take(f"{part}.linear.weight", mix, hidden)
            take(f"{part}.linear.bias", mix)
            dims += [dim, hidden]
        scale: list[int] = []
        for m in (1, 2, 3):
            n, _ = take(f"{FUSION}.scale{m}.0.weight", None, mix)
            take(f"{FUSION}.scale{m}.0.bias", n)
            take(f"{FUSION}.scale{m}.2.weight", mix, n)
            take(f"{FUSION}.scale{m}.2.bias", mix)
            scale.append(n)
        take(f"{MIX}.weight", 1, 1, 1, 3)
        take(f"{MIX}.bias", 1)
        take(f"{UP}.weight", width, mix)
        take(f"{UP}.bias", width)
        n_pseudo, _ = take(f"{PSEUDO}.weight", None, 1)
        take(f"{PSEUDO}.bias", n_pseudo)
        for what, value, most in (
            ("LSTM hidden width", max(dims[1], dims[3]), MAX_HIDDEN),
            ("feature width", max(dims[0], dims[2]), MAX_DIM),
            ("embedding width", max(width, *scale), MAX_DIM),
            ("mixer width", mix, MAX_MIX),
            ("number of pseudo tokens", n_pseudo, MAX_PSEUDO),
        ):
            if value > most:
                raise WeightsError(f"{what} {value} is beyond what the kernels take ({most})")
        audio_dim, audio_hidden, video_dim, video_hidden = dims
        experts = (scale[0], scale[1], scale[2])
        return cls(
            arrays, audio_dim, audio_hidden, video_dim, video_hidden, mix, width, experts, n_pseudo
        )

    def check_storage(self, storage: str) -> None:
        """Refuse a storage that is unknown, or that would turn a weight into an infinity."""
        if storage not in STORAGES:
            raise WeightsError(f"storage {storage!r} is unknown; choose one of {STORAGES}")
        if storage == "f16":
            for name, value in self.arrays.items():
                if np.abs(value).max() >= 65520.0:
                    raise WeightsError(f"{name} has a value beyond float16; use storage bf16")
