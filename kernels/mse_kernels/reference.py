"""The adapter in plain NumPy: the ground truth every kernel is compared with.

Straight from the published-model spec, section 1; nothing is folded, packed or reordered, so that
a reader can hold it beside the formulas. `dtype=np.float64` gives the values that error budgets are
measured against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["erf", "forward", "gelu", "lstm_last_hidden", "sigmoid"]

Array = npt.NDArray[Any]

_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """Error function, exact to the C library's double precision, in the type of `x`."""
    return np.asarray(_erf(x.astype(np.float64)), dtype=np.float64).astype(x.dtype)


def gelu(x: Array) -> Array:
    """The erf form, 0.5 x (1 + erf(x / sqrt 2)); the tanh approximation is another function."""
    half, root = x.dtype.type(0.5), x.dtype.type(math.sqrt(0.5))
    return np.asarray(half * x * (x.dtype.type(1) + erf(x * root)))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow: exp only ever sees a number <= 0."""
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + small), small / (1 + small)), dtype=x.dtype)


def lstm_last_hidden(
    x: Array, lengths: Array, w_ih: Array, w_hh: Array, b_ih: Array, b_hh: Array
) -> Array:
    """Hidden state after each sample's own last frame, [B, H]; 0 where the length is 0.

    x [B, T, d]; lengths [B], 0 <= length <= T; gate rows in the order i, f, g, o. Frames from
    `length` on are never read (spec, sections 1.1 and 1.2).
    """
    hidden = w_hh.shape[1]
    h = np.zeros((x.shape[0], hidden), x.dtype)
    c = np.zeros_like(h)
    bias = b_ih + b_hh
    for t in range(int(lengths.max(initial=0))):
        live = np.flatnonzero(lengths > t)
        z = x[live, t] @ w_ih.T + h[live] @ w_hh.T + bias
        i, f, g, o = (z[:, k * hidden : (k + 1) * hidden] for k in range(4))
        c[live] = sigmoid(f) * c[live] + sigmoid(i) * np.tanh(g)
        h[live] = sigmoid(o) * np.tanh(c[live])
    return h


def forward(
    weights: Mapping[str, Array],
    audio: Array,
    audio_len: Array,
    video: Array,
    video_len: Array,
    text: Array,
    text_len: Array,
    dtype: npt.DTypeLike = np.float32,
) -> dict[str, Array]:
    """Every intermediate of the adapter and its output, by name.

    weights: published parameter names without `Model.`. audio [B, Ta, da], video [B, Tv, dv],
    text [B, Tt, D] (embedding rows of the backbone), lengths [B] integers; the text is averaged
    over its first `text_len` rows. Returns audio_h, video_h, text_knowledge, tgm, scale1, scale2,
    scale3, integrating [B, 256], multi_scale [B, D] and pseudo [B, P, D].
    A length of 0 leaves h = 0 (the encoder's output is its linear bias) or a text mean of 0.
    Source: published-model spec, sections 1.2 to 1.4.
    """
    kind = np.dtype(dtype)

    def w(name: str) -> Array:
        return np.asarray(weights[name]).astype(kind)

    def linear(x: Array, name: str) -> Array:
        return np.asarray(x @ w(f"{name}.weight").T + w(f"{name}.bias"))

    def encoder(x: Array, lengths: Array, name: str) -> Array:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        h = lstm_last_hidden(x.astype(kind), lengths, *(w(f"{name}.rnn.{n}") for n in names))
        return linear(h, f"{name}.linear")

    out: dict[str, Array] = {}
    out["audio_h"] = encoder(np.asarray(audio), np.asarray(audio_len), "audio_LSTM")
    out["video_h"] = encoder(np.asarray(video), np.asarray(video_len), "video_LSTM")

    rows, counts = np.asarray(text), np.asarray(text_len)
    used = np.arange(rows.shape[1])[None, :] < counts[:, None]
    total = np.where(used[..., None], rows, 0).astype(kind).sum(axis=1)
    mean = total / np.maximum(counts, 1)[:, None].astype(kind)
    out["text_knowledge"] = k = linear(mean, "text_guide_mixer.text_mlp")
    out["tgm"] = z = k * out["audio_h"] + k * out["video_h"]

    fusion = "mutli_scale_fusion"
    mix = f"{fusion}.integrating.Integrating_layer.0"
    factors = w(f"{mix}.weight").reshape(3)
    e = np.zeros_like(z) + w(f"{mix}.bias").reshape(())
    for m in (1, 2, 3):
        out[f"scale{m}"] = linear(gelu(linear(z, f"{fusion}.scale{m}.0")), f"{fusion}.scale{m}.2")
        e = e + factors[m - 1] * out[f"scale{m}"]
    out["integrating"] = e
    out["multi_scale"] = u = linear(e, f"{fusion}.multi_scale_projector")
    q, r = w(f"{fusion}.projector.weight"), w(f"{fusion}.projector.bias")
    out["pseudo"] = u[:, None, :] * q.reshape(1, -1, 1) + r.reshape(1, -1, 1)
    return out
