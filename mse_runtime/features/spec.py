"""What a feature is: versioned specs as data, and the tracks that follow them.

A spec (`mse_runtime/data/specs/*.json`) names every column with its unit and says how faithful
it is. A bundle names the ids it was trained on; an id that is not here is refused, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import BundleError
from mse_runtime.records import dataclass

__all__ = [
    "Column",
    "FeatureSpec",
    "FeatureTrack",
    "Features",
    "Fidelity",
    "Modality",
    "encoder_spec",
    "get_spec",
    "is_encoder_id",
    "known_specs",
]

Fidelity = Literal["exact", "close", "approximate", "proxy"]
Modality = Literal["audio", "face"]

SPEC_FOLDER = Path(__file__).resolve().parent.parent / "data" / "specs"
_ENCODER_ID = re.compile(r"hf-(audio|image):[0-9a-f]{6,64}\Z")


@dataclass(frozen=True)
class Column:
    """One column of a feature matrix."""

    name: str
    """The field's name, unique within the spec."""
    unit: str
    """Physical unit, or "1" for a pure number."""
    fidelity: Fidelity
    """How close the value is to what its name promises: exact (the same definition and numbers),
    close (the same definition, small deviations), approximate, proxy (a stand-in; says so)."""
    note: str = ""


@dataclass(frozen=True)
class FeatureSpec:
    """A versioned description of one modality's features."""

    id: str
    """Name and version, for example "lld13/1"."""
    modality: Modality
    columns: tuple[Column, ...]
    rate: float
    """Rows a second (the default where the rate can be chosen); 0 where a row has no fixed step."""
    pooling: str
    """How the extractor's own steps become rows."""
    description: str
    extractable: bool
    """Whether this runtime can compute it from a clip; otherwise features come from files."""
    normalisation: str = "z-score with the bundle's training statistics, clamped"
    source: str = ""
    """Publication or tool that defines the columns."""

    @property
    def dim(self) -> int:
        return len(self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def index(self, name: str) -> int:
        """The column called `name`; KeyError names the spec."""
        try:
            return self.names.index(name)
        except ValueError:
            raise KeyError(f"{self.id} has no column {name!r}") from None

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(name, unit, fidelity, note) for each column: what `--explain-features` prints."""
        return [(c.name, c.unit, c.fidelity, c.note) for c in self.columns]


@dataclass(frozen=True)
class FeatureTrack:
    """Features of one modality over time, in raw units."""

    spec: str
    """Spec id; "" where a file did not say."""
    values: NDArray[np.float32]
    """[T, d]."""
    valid: NDArray[np.bool_]
    """[T]: False where nothing could be measured (no face in the frame)."""
    times: NDArray[np.float64]
    """[T] seconds on the clip's clock (0 = the container's first timestamp); NaN if unknown."""

    def __post_init__(self) -> None:
        rows = self.values.shape[0] if self.values.ndim == 2 else -1
        if self.valid.shape != (rows,) or self.times.shape != (rows,):
            raise ValueError(
                f"a track needs values [T, d], valid [T], times [T]; got {self.values.shape}, "
                f"{self.valid.shape}, {self.times.shape}"
            )

    def __len__(self) -> int:
        return int(self.values.shape[0])

    @property
    def dim(self) -> int:
        return int(self.values.shape[1])


@dataclass(frozen=True)
class Features:
    """What was seen and heard in a clip, or read from a feature file."""

    audio: FeatureTrack | None
    face: FeatureTrack | None
    duration: float
    """Seconds of the clip that were read (the window, not the whole file)."""
    warnings: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    """What is worth telling: chosen face, fps, decode statistics, seconds of each stage. Anything,
    where it comes from a file."""
    process_peak: int = 0
    """The most bytes that were resident of the process beside that read the clip; 0: this one."""


def known_specs() -> tuple[str, ...]:
    """The ids of all specs shipped with this runtime, sorted."""
    names = sorted(path.stem for path in SPEC_FOLDER.glob("*.json"))
    return tuple(sorted(spec.id for spec in map(_shipped, names) if spec is not None))


def get_spec(spec_id: str) -> FeatureSpec:
    """The spec `spec_id`.

    Raises:
        BundleError: unknown id. Encoder ids ("hf-audio:<sha>", "hf-image:<sha>") are not shipped:
            their width and rate stand in the bundle, see `encoder_spec`.
    """
    name = spec_id.partition("/")[0]
    found = _shipped(name) if name.replace("-", "").isalnum() else None
    if found is not None and found.id == spec_id:
        return found
    if is_encoder_id(spec_id):
        raise BundleError(
            f"{spec_id} is an encoder's features: their width is known only to a bundle that holds "
            "the encoder. Open the bundle, or name one of: " + ", ".join(known_specs())
        )
    raise BundleError(
        f"unknown feature spec {spec_id!r}; this runtime knows: {', '.join(known_specs())}. "
        "Use a bundle made for one of them, or a newer mse-runtime."
    )


def is_encoder_id(spec_id: str) -> bool:
    """Whether the id names a neural encoder that travels in the bundle."""
    return _ENCODER_ID.match(spec_id) is not None


def encoder_spec(spec_id: str, *, dim: int, rate: float, description: str = "") -> FeatureSpec:
    """The spec of an encoder's features; width and rate come from the bundle.

    Raises:
        BundleError: not an encoder's id, or a width below 1.
    """
    match = _ENCODER_ID.match(spec_id)
    if match is None or dim < 1:
        raise BundleError(
            f"{spec_id!r} with {dim} columns is no encoder's spec; expected hf-audio:<sha> or "
            "hf-image:<sha> and a positive width. Export the bundle again."
        )
    modality: Modality = "audio" if match.group(1) == "audio" else "face"
    columns = tuple(Column(f"h{i}", "1", "exact", "hidden unit") for i in range(dim))
    text = description or "last hidden layer of the encoder in the bundle"
    return FeatureSpec(spec_id, modality, columns, rate, "none", text, extractable=True)


def parse_spec(data: Mapping[str, Any], where: str = "spec") -> FeatureSpec:
    """A spec from its JSON form; a column with `count` stands for name0, name1, ...

    Raises:
        BundleError: a field is missing or of the wrong kind, or two columns share a name.
    """
    try:
        columns = tuple(c for entry in data["columns"] for c in _columns(entry))
        spec = FeatureSpec(
            id=str(data["id"]),
            modality=data["modality"],
            columns=columns,
            rate=float(data["rate"]),
            pooling=str(data["pooling"]),
            description=str(data["description"]),
            extractable=bool(data["extractable"]),
            normalisation=str(data.get("normalisation", FeatureSpec.normalisation)),
            source=str(data.get("source", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{where}: not a feature spec ({error!r}). Reinstall it.") from error
    if spec.modality not in get_args(Modality) or len(set(spec.names)) != spec.dim or not columns:
        raise BundleError(f"{where}: unknown modality, no column, or a column named twice.")
    return spec


def _columns(entry: Mapping[str, Any]) -> list[Column]:
    fidelity = entry.get("fidelity", "exact")
    if fidelity not in get_args(Fidelity):
        raise ValueError(f"unknown fidelity {fidelity!r}")
    name, unit, note = str(entry["name"]), str(entry["unit"]), str(entry.get("note", ""))
    count = entry.get("count")
    names = [name] if count is None else [f"{name}{i}" for i in range(int(count))]
    return [Column(each, unit, cast(Fidelity, fidelity), note) for each in names]


@lru_cache(maxsize=32)
def _shipped(name: str) -> FeatureSpec | None:
    # One file at a time: the widest specs take longer to read than a whole clip's sound.
    path = SPEC_FOLDER / f"{name}.json"
    if not path.is_file():
        return None
    return parse_spec(json.loads(path.read_text(encoding="utf-8")), path.name)
