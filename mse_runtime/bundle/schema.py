"""The bundle: a folder with a manifest, an adapter and (a reference to) a language model.

The dataclasses mirror `manifest.json` key by key; `manifest.parse` reads them and `to_dict` writes
them. A bundle is data only: nothing in it is executed, and no path in it leaves its folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from mse_runtime.errors import BundleError
from mse_runtime.records import dataclass

__all__ = [
    "SCHEMA_VERSION",
    "AdapterInfo",
    "BackboneInfo",
    "Bundle",
    "DamagedFileError",
    "EncoderInfo",
    "FeatureInput",
    "FeatureInputs",
    "FileRef",
    "HubRef",
    "Label",
    "ManifestError",
    "MismatchError",
    "MissingFileError",
    "Segment",
    "Task",
    "TextInput",
    "Training",
    "UnsafePathError",
    "VersionError",
]

SCHEMA_VERSION = "1.2"
MANIFEST = "manifest.json"


class ManifestError(BundleError):
    """A key of the manifest that is missing, of the wrong type or out of range: `key` names it."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class VersionError(BundleError):
    """A manifest of a schema version that this runtime does not know."""


class UnsafePathError(BundleError):
    """A file of the bundle that lies, or points, outside the bundle's folder."""


class MissingFileError(BundleError):
    """The folder, its manifest or a file that the manifest names is not there."""


class DamagedFileError(BundleError):
    """A file whose size or SHA-256 is not the manifest's: `path` is the file."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class MismatchError(BundleError):
    """Parts of the bundle that do not fit each other, such as the adapter and the GGUF."""


@dataclass(frozen=True)
class FileRef:
    """A file of the bundle's folder. `file` is relative to it, `size` is in bytes."""

    file: str
    size: int
    sha256: str
    type: str | None = None
    """For a GGUF: its quantisation, such as "Q4_0"."""


@dataclass(frozen=True)
class HubRef:
    """A file of a repository on the Hugging Face hub: `revision` is a commit, tag or branch."""

    repo: str
    revision: str
    file: str
    size: int
    sha256: str
    type: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The manifest's form, with the place under the key `hub`."""
        plain: dict[str, Any] = {
            "hub": {"repo": self.repo, "revision": self.revision, "file": self.file},
            "size": self.size,
            "sha256": self.sha256,
        }
        return plain if self.type is None else plain | {"type": self.type}


@dataclass(frozen=True)
class Segment:
    """One piece of a prompt: `text`, tokenised alone, or the place of a `slot`.

    `bos` puts the BOS id in front; `special` parses spellings of special tokens.
    """

    text: str | None = None
    slot: Literal["pseudo", "text"] | None = None
    bos: bool = False
    special: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The manifest's form: only what differs from the defaults."""
        plain = {"text": self.text, "slot": self.slot, "bos": self.bos, "special": self.special}
        return {key: value for key, value in plain.items() if value not in (None, False)}


@dataclass(frozen=True)
class Label:
    """A class: `text` is what the language model says, `name` what people read."""

    text: str
    name: str


@dataclass(frozen=True)
class Task:
    """What is asked. Regression has `range`, `step` and how numbers are written; classification
    `labels`.
    """

    kind: Literal["regression", "classification"]
    language: str
    prompt: tuple[Segment, ...]
    max_new_tokens: int
    temperature: float = 1.0
    range: tuple[float, float] | None = None
    step: float | None = None
    number_format: str | None = None
    """A `str.format` field for the number, such as "{:+.1f}"."""
    number_scale: float | None = None
    """What the number is written times, if not 1: 1.5 is "+15" with "{:+03.0f}" and 10. People wait
    for every token of a number but its last, for a point as well. All need the same width: one
    may not begin like another."""
    labels: tuple[Label, ...] = ()

    def number_text(self, number: float) -> str:
        """The number as the language model writes it."""
        scaled = round(number * (self.number_scale or 1.0), 10) + 0.0  # no negative zero
        return (self.number_format or "{:.1f}").format(scaled)


@dataclass(frozen=True)
class TextInput:
    """How the transcript becomes ids (published-model spec, section 2).

    With `pad` "left" always exactly `max_tokens` ids, `pad_id` in front; with "none" the bare ids.
    """

    max_tokens: int
    pad: Literal["left", "none"] = "none"
    pad_id: int = 0
    special: bool = False
    """Whether the published code parses spellings of special tokens; `--parity published` does."""
    normalise: Literal["none", "nfc"] = "none"
    """Unicode normalisation before tokenising; Qwen's tokenisers do NFC, llama.cpp does not."""


@dataclass(frozen=True)
class FeatureInput:
    """What the adapter expects of one modality.

    `spec` names the columns; `mean` and `std` [dim] are the training set's statistics, applied
    before the clamp to +-`clip`; `max_steps` is the longest sequence.
    """

    spec: str
    dim: int
    max_steps: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    clip: float | None = None
    nonfinite: Literal["zero", "refuse"] = "zero"


@dataclass(frozen=True)
class FeatureInputs:
    """The adapter's two feature inputs."""

    audio: FeatureInput
    face: FeatureInput


@dataclass(frozen=True)
class AdapterInfo:
    """The adapter: `weights` are the source, `onnx` is compiled from them.

    `n_pseudo` rows of width `n_embd` come out; `*_dim` and `*_hidden` are the LSTMs' widths.
    """

    onnx: FileRef
    weights: FileRef
    n_pseudo: int
    n_embd: int
    audio_dim: int
    face_dim: int
    audio_hidden: int
    face_hidden: int
    parameters: int


@dataclass(frozen=True)
class BackboneInfo:
    """The language model that the adapter was trained for."""

    arch: str
    n_embd: int
    n_vocab: int
    n_layer: int
    gguf: FileRef | HubRef
    rope_table: Literal["bf16"] | None = None
    """How the published runs rounded their rotary table; `--parity published` does, too."""


@dataclass(frozen=True)
class EncoderInfo:
    """A feature encoder that travels with the bundle; `config` is what its extractor needs."""

    id: str
    file: str
    size: int
    sha256: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """Whether the adapter was trained at all, and what to know about it."""

    status: Literal["trained", "untrained"]
    note: str = ""


@dataclass(frozen=True)
class Bundle:
    """A bundle's manifest, and where it lies.

    `path` (the folder) and `hub_gguf` (the downloaded file of a `HubRef`) belong to this machine,
    not to the manifest: they are neither written nor compared.
    """

    name: str
    version: str
    created_by: str
    training: Training
    layout: Literal["published", "pseudo-last"]
    default_task: str
    tasks: Mapping[str, Task]
    text: TextInput
    features: FeatureInputs
    adapter: AdapterInfo
    backbone: BackboneInfo
    encoders: tuple[EncoderInfo, ...] = ()
    parity: Mapping[str, Any] = field(default_factory=dict)
    schema_version: str = SCHEMA_VERSION
    path: Path = field(default=Path(), compare=False)
    hub_gguf: Path | None = field(default=None, compare=False, repr=False)

    @property
    def task(self) -> Task:
        """The default task."""
        return self.tasks[self.default_task]

    @property
    def trained(self) -> bool:
        return self.training.status == "trained"

    def to_dict(self) -> dict[str, Any]:
        """The manifest as JSON values; `manifest.parse` of it gives an equal bundle."""
        plain: dict[str, Any] = _plain(self)
        return {"schema_version": plain.pop("schema_version"), **plain}

    def onnx_path(self) -> Path:
        return self.path / self.adapter.onnx.file

    def weights_path(self) -> Path:
        return self.path / self.adapter.weights.file

    def encoder_path(self, spec: str) -> Path:
        """The encoder file of the feature spec `spec` (an `hf-...` id)."""
        for encoder in self.encoders:
            if encoder.id == spec:
                return self.path / encoder.file
        raise MismatchError(f"The bundle {self.name} has no encoder for the feature spec {spec}.")

    def gguf_path(self) -> Path:
        """The language model's file; `MissingFileError` where a hub reference was not fetched."""
        if isinstance(self.backbone.gguf, FileRef):
            return self.path / self.backbone.gguf.file
        if self.hub_gguf is None:
            ref = self.backbone.gguf
            raise MissingFileError(
                f"The bundle {self.name} takes its language model from the hub ({ref.repo}, file "
                f"{ref.file}), and it has not been downloaded. Open the bundle with load_bundle."
            )
        return self.hub_gguf


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON values; None and what is local are left out."""
    if isinstance(value, (HubRef, Segment)):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        pairs = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}
        return {k: _plain(v) for k, v in pairs.items() if v is not None and v != ()}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
