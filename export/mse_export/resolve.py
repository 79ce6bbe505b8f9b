"""From `--backbone` to files: a name, a Hugging Face folder or a GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mse_export.profiles import NamedBackbone, backbone_names, named_backbone
from mse_export.watcher import Watcher
from mse_runtime.errors import UsageError

__all__ = ["Source", "fetch", "find_backbone", "resolve_backbone"]


@dataclass(frozen=True)
class Source:
    """Where the language model comes from."""

    kind: Literal["folder", "gguf", "synthetic"]
    name: str
    path: Path | None = None
    """The Hugging Face folder or the GGUF file."""
    config: Mapping[str, Any] | None = None
    """The shape of a model that is synthetic or not fetched yet."""
    entry: NamedBackbone | None = None
    """What to fetch."""
    description: str = ""
    licence: str = ""


def resolve_backbone(spec: str, *, synthetic: bool = False, offline: bool = False) -> Source:
    """`find_backbone`, and what it names fetched."""
    return fetch(find_backbone(spec, synthetic=synthetic), offline)


def find_backbone(spec: str, *, synthetic: bool = False) -> Source:
    """The source for `spec`: a name of `backbones.toml`, `tiny`, a folder or a `.gguf` file.

    Nothing is fetched: a named model has its shape, but a `path` only after `fetch`. Raises
    UsageError for an unknown name or path.
    """
    path = Path(spec).expanduser()
    if spec == "tiny":
        return _tiny(synthetic)
    if spec in backbone_names():
        entry = named_backbone(spec)
        if synthetic:
            return Source(
                "synthetic",
                spec,
                config=entry.config,
                description=f"random weights in the shape of {entry.repo}",
                licence="none: the weights are random",
            )
        return Source(
            "folder",
            spec,
            config=entry.config,
            entry=entry,
            description=f"{entry.repo} at revision {entry.revision}",
            licence=entry.licence,
        )
    if path.is_dir():
        return _folder(path, synthetic)
    if path.is_file():
        if synthetic:
            raise UsageError("--synthetic needs a name or a Hugging Face folder, not a GGUF file.")
        return Source("gguf", path.stem, path=path, description=path.name)
    looks_like_path = path.suffix == ".gguf" or spec.startswith((".", "/", "~")) or "/" in spec
    if looks_like_path:
        raise UsageError(
            f"There is neither a folder nor a file at {path}. Give a Hugging Face folder, a GGUF "
            f"file or one of the names {', '.join(backbone_names())}, tiny."
        )
    named_backbone(spec)  # raises, naming the known ones
    raise AssertionError


def _folder(path: Path, synthetic: bool) -> Source:
    from mse_export.hf_folder import read_config

    config = read_config(path)
    name = path.resolve().name
    if synthetic:
        return Source(
            "synthetic",
            name,
            config=config,
            description=f"random weights in the shape of {name}",
            licence="none: the weights are random",
        )
    return Source("folder", name, path=path, description=f"the Hugging Face folder {name}")


def _tiny(synthetic: bool) -> Source:
    from mse_runtime.bundle.hub import resolve_bundle

    if synthetic:
        raise UsageError("tiny is built in and needs no --synthetic: mse-run uses it by default.")
    gguf = resolve_bundle("tiny") / "backbone.gguf"
    return Source(
        "gguf", "tiny", path=gguf, description="the built-in tiny model", licence="Apache-2.0"
    )


def fetch(source: Source, offline: bool = False, watcher: Watcher | None = None) -> Source:
    """The source with its folder in the Hugging Face cache, downloaded where it is not there whole.

    Raises BackboneError where it cannot be had, DeviceError where the disk will not hold it.
    """
    if source.entry is None or source.path is not None:
        return source
    from mse_export.download import snapshot

    return replace(source, path=snapshot(source.entry, offline, watcher or Watcher()))
