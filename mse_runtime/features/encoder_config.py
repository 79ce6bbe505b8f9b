"""A bundle's `encoders` entries: which file makes which features, and how it wants its input.

A bundle that was trained on hidden states of wav2vec2, HuBERT, ResNet or CLIP names the encoder in
`encoders` and its spec id (`hf-audio:<sha>` or `hf-image:<sha>`) in `features`; `<sha>` is the
beginning of the file's SHA-256, so features of another checkpoint can never be mistaken for these.
How the encoder wants its input is data, the entry's `config`:

    {"id": "hf-audio:3f9a21c0", "file": "audio_encoder.onnx", "size": 1, "sha256": "3f9a21c0...",
     "config": {"dim": 1024, "sample_rate": 16000, "stride": 320, "receptive": 400,
                "normalise": true, "chunk_seconds": 20.0, "model": "org/name"}}

    {"id": "hf-image:77aa01de", "file": "image_encoder.onnx", "size": 1, "sha256": "77aa01de...",
     "config": {"dim": 2048, "size": 224, "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225], "crop": "face", "margin": 1.3, "align": true,
                "rate": 5.0, "batch": 8, "model": "org/name"}}

Audio graph: waveform float32 [1, n] -> [1, T, dim], one row per `stride` samples once `receptive`
samples are there. `normalise`: zero mean and unit variance over the utterance, as Wav2Vec2's
feature extractor does. Image graph: float32 [B, 3, size, size] -> [B, dim] (or [B, dim, 1, 1]),
pixels / 255, less `mean`, over `std`. `crop`: "face" (a square of `margin` times the landmarks'
longer side, turned upright where `align`) or "frame" (the middle square of the frame). A key that
is missing has the value shown above, except `dim`, `size`, `mean` and `std`, which must be given;
`model` is for the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mse_runtime.errors import BundleError
from mse_runtime.features.spec import FeatureSpec, encoder_spec, get_spec, is_encoder_id

if TYPE_CHECKING:
    from mse_runtime.bundle import Bundle, EncoderInfo

__all__ = ["AudioConfig", "ImageConfig", "entry_of", "parse_config", "spec_for", "spec_of"]


@dataclass(frozen=True)
class AudioConfig:
    """How a speech encoder wants its waveform; see the module's docstring."""

    dim: int
    sample_rate: int = 16000
    stride: int = 320
    receptive: int = 400
    normalise: bool = True
    chunk_seconds: float = 20.0
    model: str = ""

    @property
    def rate(self) -> float:
        return self.sample_rate / self.stride

    def problem(self) -> str | None:
        if self.dim < 1 or self.stride < 1 or self.receptive < self.stride:
            return "dim and stride must be positive, receptive at least stride"
        if self.sample_rate != 16000:
            return "only 16000 Hz is decoded here"
        return None if self.chunk_seconds >= 1 else "chunk_seconds must be at least 1"


@dataclass(frozen=True)
class ImageConfig:
    """How an image encoder wants its pixels; see the module's docstring."""

    dim: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: Literal["face", "frame"] = "face"
    margin: float = 1.3
    align: bool = True
    rate: float = 5.0
    batch: int = 8
    model: str = ""

    def problem(self) -> str | None:
        if min(self.dim, self.size, self.batch) < 1 or min(self.rate, self.margin) <= 0:
            return "dim, size, batch, rate and margin must be positive"
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            return "mean and std need three numbers each, std above 0"
        return None if self.crop in ("face", "frame") else 'crop must be "face" or "frame"'


Config = TypeVar("Config", AudioConfig, ImageConfig)


def spec_for(spec_id: str, bundle: Bundle | None) -> FeatureSpec:
    """The spec `spec_id`: a shipped one, or an encoder's of `bundle`; BundleError otherwise."""
    if bundle is None or not is_encoder_id(spec_id):
        return get_spec(spec_id)
    return spec_of(entry_of(bundle, spec_id))


def entry_of(bundle: Bundle, spec_id: str) -> EncoderInfo:
    """The bundle's entry for `spec_id`; BundleError where it has none."""
    for info in bundle.encoders:
        if info.id == spec_id:
            return info
    raise BundleError(
        f"the bundle {bundle.name} has no encoder {spec_id}: export it again with the encoder."
    )


def spec_of(info: EncoderInfo) -> FeatureSpec:
    """The feature spec of an encoder entry; BundleError where entry and file disagree."""
    config = _config(info)
    description = f"last hidden layer of {config.model or 'the encoder in the bundle'}"
    return encoder_spec(info.id, dim=config.dim, rate=config.rate, description=description)


def _config(info: EncoderInfo) -> AudioConfig | ImageConfig:
    if info.id.startswith("hf-audio:"):
        return parse_config(AudioConfig, info)
    return parse_config(ImageConfig, info)


def parse_config(kind: type[Config], info: EncoderInfo) -> Config:
    """The entry's config as a `kind`, checked, and its id held against the file's hash."""
    sha = info.id.partition(":")[2]
    if not sha or not info.sha256.startswith(sha):
        raise BundleError(
            f"{info.id} is not the encoder that {info.file} holds (SHA-256 {info.sha256[:12]}...): "
            "the features would be another model's. Export the bundle again."
        )
    known = {f.name: f.type for f in fields(kind)}
    given: Mapping[str, Any] = info.config
    unknown = sorted(set(given) - set(known))
    try:
        values = {name: _value(given[name], str(known[name])) for name in known if name in given}
        config = kind(**values)
        problem = f"unknown keys {', '.join(unknown)}" if unknown else config.problem()
    except (TypeError, ValueError) as error:
        problem = str(error)
    if problem:
        raise BundleError(
            f"encoder {info.id}: its config cannot be used ({problem}). Export the bundle again, "
            "or use a newer mse-runtime."
        )
    return config


def _value(value: Any, kind: str) -> Any:
    """A JSON value as a field's type; TypeError otherwise (True is no number)."""
    if kind == "bool":
        wanted = isinstance(value, bool)
    elif kind == "int":
        wanted = isinstance(value, int) and not isinstance(value, bool)
    elif kind == "float":
        wanted = isinstance(value, int | float) and not isinstance(value, bool)
    elif kind.startswith("tuple"):
        return tuple(float(each) for each in value)
    else:
        wanted = isinstance(value, str)
    if not wanted:
        raise TypeError(f"{value!r} where {kind} is expected")
    return value
