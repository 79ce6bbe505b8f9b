"""`adapter.safetensors`: the adapter's parameters under their published names, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.bundle import AdapterInfo, Bundle, MismatchError
from mse_runtime.errors import BundleError

__all__ = ["load_weights", "parameter_shapes"]

WIDTH = 256  # of both encoders' outputs and of the fusion (published-model spec, section 1.2)
EXPERT_DIVISORS = (8, 32, 16)  # not monotone: section 1.4


def parameter_shapes(info: AdapterInfo) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape (published-model spec, section 1.5)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, dim, hidden in (
        ("audio_LSTM", info.audio_dim, info.audio_hidden),
        ("video_LSTM", info.face_dim, info.face_hidden),
    ):
        shapes[f"{name}.rnn.weight_ih_l0"] = (4 * hidden, dim)
        shapes[f"{name}.rnn.weight_hh_l0"] = (4 * hidden, hidden)
        shapes[f"{name}.rnn.bias_ih_l0"] = shapes[f"{name}.rnn.bias_hh_l0"] = (4 * hidden,)
        shapes[f"{name}.linear.weight"] = (WIDTH, hidden)
        shapes[f"{name}.linear.bias"] = (WIDTH,)
    shapes["text_guide_mixer.text_mlp.weight"] = (WIDTH, info.n_embd)
    shapes["text_guide_mixer.text_mlp.bias"] = (WIDTH,)
    fusion = "mutli_scale_fusion"
    for number, divisor in enumerate(EXPERT_DIVISORS, start=1):
        inner = info.n_embd // divisor
        shapes[f"{fusion}.scale{number}.0.weight"] = (inner, WIDTH)
        shapes[f"{fusion}.scale{number}.0.bias"] = (inner,)
        shapes[f"{fusion}.scale{number}.2.weight"] = (WIDTH, inner)
        shapes[f"{fusion}.scale{number}.2.bias"] = (WIDTH,)
    shapes[f"{fusion}.integrating.Integrating_layer.0.weight"] = (1, 1, 1, 3)
    shapes[f"{fusion}.integrating.Integrating_layer.0.bias"] = (1,)
    shapes[f"{fusion}.multi_scale_projector.weight"] = (info.n_embd, WIDTH)
    shapes[f"{fusion}.multi_scale_projector.bias"] = (info.n_embd,)
    shapes[f"{fusion}.projector.weight"] = (info.n_pseudo, 1)
    shapes[f"{fusion}.projector.bias"] = (info.n_pseudo,)
    return shapes


def load_weights(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """The parameters as stored (float32 or float16).

    Raises `BundleError` for a file that is no safetensors file, `MismatchError` where a parameter
    is missing or has another shape than the manifest's numbers give.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = bundle.weights_path()
    try:
        found: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise BundleError(
            f"{path} cannot be read as safetensors ({error}). Copy the bundle again, or export it "
            "again with mse-export."
        ) from error
    expected = parameter_shapes(bundle.adapter)
    for name, shape in expected.items():
        value = found.get(name)
        if value is None or value.shape != shape or value.dtype not in (np.float32, np.float16):
            got = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise MismatchError(
                f"{path}: the parameter {name} is {got}, but the manifest's numbers give float32 "
                f"or float16 {list(shape)}. Export the bundle again with mse-export."
            )
    return {name: found[name] for name in expected}
