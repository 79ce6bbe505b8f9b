"""From `--backbone` to files: a name, a Hugging Face folder or a GGUF.

A name is looked up in the local Hugging Face cache at its pinned revision, then downloaded. What
cannot be had is explained in one paragraph: what to fetch, where to put it, and how to go on
without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mse_export.profiles import NamedBackbone, backbone_names, named_backbone
from mse_runtime.errors import BackboneError, UsageError

__all__ = ["Source", "resolve_backbone"]


@dataclass(frozen=True)
class Source:
    """Where the language model comes from."""

    kind: Literal["folder", "gguf", "synthetic"]
    name: str
    path: Path | None = None
    """The Hugging Face folder or the GGUF file."""
    config: Mapping[str, Any] | None = None
    """The shape of a synthetic model."""
    description: str = ""
    licence: str = ""


def resolve_backbone(spec: str, *, synthetic: bool = False, offline: bool = False) -> Source:
    """The source for `spec`: a name of `backbones.toml`, `tiny`, a folder or a `.gguf` file.

    Raises UsageError for an unknown name or path, BackboneError where a model cannot be fetched.
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
            path=_snapshot(entry, offline),
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


def _snapshot(entry: NamedBackbone, offline: bool) -> Path:
    """The model's folder in the Hugging Face cache, downloaded where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = list(entry.files)
    try:
        cached = snapshot_download(
            entry.repo, revision=entry.revision, allow_patterns=wanted, local_files_only=True
        )
        if _complete(Path(cached)):
            return Path(cached)
    except (LocalEntryNotFoundError, ValueError):
        pass
    if offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise _not_here(entry, "it is not in the local cache and downloads are switched off")
    try:
        return Path(snapshot_download(entry.repo, revision=entry.revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise _gated(entry) from error
    except RepositoryNotFoundError as error:
        raise (
            _gated(entry) if entry.gated else _not_here(entry, "the hub does not show it")
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _not_here(entry, f"the hub cannot be reached ({reason[:120]})") from error


def _complete(folder: Path) -> bool:
    """Whether config and some weights are there; shards are checked when they are opened."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return (folder / "config.json").is_file() and bool(weights)


def _ways_on(entry: NamedBackbone) -> str:
    patterns = " ".join(f"'{pattern}'" for pattern in entry.files)
    return (
        f"On a machine with a connection run: hf download {entry.repo} --revision "
        f"{entry.revision} --include {patterns} --local-dir {entry.name}, copy the folder here and "
        f"give it: mse-export --backbone ./{entry.name}. A GGUF made elsewhere will do as well "
        f"(--backbone FILE.gguf), and --synthetic measures speed and memory without the weights."
    )


def _not_here(entry: NamedBackbone, reason: str) -> BackboneError:
    gated = " The model is gated: accept its licence on its page first." if entry.gated else ""
    return BackboneError(
        f"The weights of {entry.name} ({entry.repo}) are not available: {reason}.{gated} "
        + _ways_on(entry)
    )


def _gated(entry: NamedBackbone) -> BackboneError:
    return BackboneError(
        f"{entry.repo} is gated and this machine has no access to it. (1) Log in to the Hugging "
        f"Face hub and accept the licence on the model's page, {entry.repo}; (2) create a token "
        "with read access in your settings; (3) run: hf auth login; (4) run this command again. "
        + _ways_on(entry)
    )
