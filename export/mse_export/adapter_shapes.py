"""Names and shapes of the adapter's parameters, without torch.

The names are the published checkpoint's without its `Model.` prefix (published-model spec,
section 1.5), misspelling ("mutli") included: they are the interface to every other backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mse_runtime.errors import BundleError

__all__ = ["FUSION_WIDTH", "SCALE_DIVISORS", "AdapterDims", "infer_dims", "parameter_shapes"]

FUSION_WIDTH = 256
"""Width in which the modalities meet; hard-coded in the published model."""

SCALE_DIVISORS = (8, 32, 16)
"""Bottleneck of expert 1, 2, 3 is D/8, D/32, D/16: not monotone (spec, section 1.4)."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AdapterDims:
    """Everything that determines the adapter's parameter shapes."""

    n_embd: int
    """D: the backbone's hidden width."""
    audio_dim: int
    """da: columns of one audio frame."""
    video_dim: int
    """dv: columns of one face frame."""
    audio_hidden: int = 64
    """Width of the audio LSTM."""
    video_hidden: int = 32
    """Width of the face LSTM."""
    n_pseudo: int = 4
    """P: pseudo tokens written per clip."""

    @property
    def scale_widths(self) -> tuple[int, int, int]:
        """Bottleneck widths of the three experts."""
        a, b, c = (max(1, self.n_embd // d) for d in SCALE_DIVISORS)
        return a, b, c

    @property
    def parameters(self) -> int:
        """Number of trainable scalars."""
        total = 0
        for shape in parameter_shapes(self).values():
            count = 1
            for n in shape:
                count *= n
            total += count
        return total


def parameter_shapes(dims: AdapterDims) -> dict[str, Shape]:
    """Every parameter's name and shape, in the published state dict's order."""
    f, d = FUSION_WIDTH, dims.n_embd
    shapes: dict[str, Shape] = {}
    for name, width, hidden in (
        ("audio_LSTM", dims.audio_dim, dims.audio_hidden),
        ("video_LSTM", dims.video_dim, dims.video_hidden),
    ):
        shapes[f"{name}.rnn.weight_ih_l0"] = (4 * hidden, width)
        shapes[f"{name}.rnn.weight_hh_l0"] = (4 * hidden, hidden)
        shapes[f"{name}.rnn.bias_ih_l0"] = (4 * hidden,)
        shapes[f"{name}.rnn.bias_hh_l0"] = (4 * hidden,)
        shapes[f"{name}.linear.weight"] = (f, hidden)
        shapes[f"{name}.linear.bias"] = (f,)
    shapes["text_guide_mixer.text_mlp.weight"] = (f, d)
    shapes["text_guide_mixer.text_mlp.bias"] = (f,)
    for i, width in enumerate(dims.scale_widths, start=1):
        shapes[f"mutli_scale_fusion.scale{i}.0.weight"] = (width, f)
        shapes[f"mutli_scale_fusion.scale{i}.0.bias"] = (width,)
        shapes[f"mutli_scale_fusion.scale{i}.2.weight"] = (f, width)
        shapes[f"mutli_scale_fusion.scale{i}.2.bias"] = (f,)
    fusion = "mutli_scale_fusion"
    shapes[f"{fusion}.integrating.Integrating_layer.0.weight"] = (1, 1, 1, 3)
    shapes[f"{fusion}.integrating.Integrating_layer.0.bias"] = (1,)
    shapes[f"{fusion}.multi_scale_projector.weight"] = (d, f)
    shapes[f"{fusion}.multi_scale_projector.bias"] = (d,)
    shapes[f"{fusion}.projector.weight"] = (dims.n_pseudo, 1)
    shapes[f"{fusion}.projector.bias"] = (dims.n_pseudo,)
    return shapes


def infer_dims(shapes: Mapping[str, Shape], source: str = "checkpoint") -> AdapterDims:
    """Read D, da, dv, H and P off the shapes; every parameter must be there and fit.

    `shapes` uses names without `Model.`; unknown names are ignored.
    Raises BundleError naming the first parameter that is missing or has another shape.
    """

    def size(name: str, axis: int, rank: int) -> int:
        shape = shapes.get(name)
        if shape is None:
            raise BundleError(
                f"{source}: no parameter {name!r}, so this is not an MSE-Adapter checkpoint. "
                "Give the file that the published trainer saved (state dict with "
                "'Model.audio_LSTM...' keys) or one written by mse-train."
            )
        if len(shape) != rank or shape[axis] < 1:
            raise BundleError(
                f"{source}: parameter {name!r} has shape {list(shape)}, expected {rank} axes. "
                "The file does not hold an MSE-Adapter."
            )
        return shape[axis]

    dims = AdapterDims(
        audio_dim=size("audio_LSTM.rnn.weight_ih_l0", 1, 2),
        audio_hidden=size("audio_LSTM.rnn.weight_hh_l0", 1, 2),
        video_dim=size("video_LSTM.rnn.weight_ih_l0", 1, 2),
        video_hidden=size("video_LSTM.rnn.weight_hh_l0", 1, 2),
        n_embd=size("text_guide_mixer.text_mlp.weight", 1, 2),
        n_pseudo=size("mutli_scale_fusion.projector.weight", 0, 2),
    )
    for name, shape in parameter_shapes(dims).items():
        found = shapes.get(name)
        if found is None:
            raise BundleError(
                f"{source}: parameter {name!r} is missing (expected shape {list(shape)}). "
                "The checkpoint is incomplete: save it again from the trainer."
            )
        if tuple(found) != shape:
            raise BundleError(
                f"{source}: parameter {name!r} has shape {list(found)}, expected {list(shape)}. "
                "The checkpoint does not belong to this adapter version; "
                "more than one LSTM layer or another fusion width are not supported."
            )
    return dims
