"""The files of a bundle: inside the folder, of the right size and hash, fitting each other."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mse_runtime import cache
from mse_runtime.bundle.schema import (
    Bundle,
    DamagedFileError,
    FileRef,
    MismatchError,
    MissingFileError,
    UnsafePathError,
)
from mse_runtime.errors import BundleError

if TYPE_CHECKING:
    from mse_runtime.bundle.schema import FeatureInput

__all__ = ["check_file", "check_files", "check_gguf", "check_specs", "file_sha256", "files"]

HASHES = "hashes.json"
MAX_REMEMBERED = 512
CHUNK = 1 << 20
ANNOUNCE_BYTES = 256 << 20
log = logging.getLogger("mse_runtime")


def files(bundle: Bundle) -> Iterator[FileRef]:
    """The files that the manifest places in the bundle's own folder."""
    yield bundle.adapter.onnx
    yield bundle.adapter.weights
    if isinstance(bundle.backbone.gguf, FileRef):
        yield bundle.backbone.gguf
    for encoder in bundle.encoders:
        yield FileRef(encoder.file, encoder.size, encoder.sha256)


def check_files(bundle: Bundle) -> None:
    """Check place, size and SHA-256 of every file in the bundle's folder."""
    for ref in files(bundle):
        check_file(inside(bundle.path, ref.file), ref.size, ref.sha256)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, where its real place is in the folder, or in the blobs of a hub snapshot."""
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UnsafePathError(f"{path} cannot be resolved: {error}. Remove this bundle.") from error
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache: snapshots/REVISION/FILE -> blobs/HASH
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise UnsafePathError(
            f"{path} is a link to {real}, outside the bundle's folder. Copy the file into the "
            "folder if you trust it; a bundle never needs such a link."
        )
    return path


def check_file(path: Path, size: int, sha256: str) -> None:
    """Check a file's size, and its SHA-256 unless this very file was hashed before."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "is missing"
        raise MissingFileError(
            f"{path} {what}, but the manifest names it. Copy the whole bundle again, or export it "
            "again with mse-export."
        )
    try:
        found = path.stat().st_size
        if found != size:
            cut = " (truncated?)" if found < size else ""
            raise DamagedFileError(
                f"{path} is {found:,} bytes long, but the manifest says {size:,}{cut}. Copy or "
                "download the bundle again.",
                path,
            )
        digest = file_sha256(path)
    except OSError as error:
        raise MissingFileError(
            f"{path} cannot be read ({error.strerror}). Check its permissions."
        ) from error
    if digest != sha256:
        raise DamagedFileError(
            f"{path} has the SHA-256 {digest[:16]}..., but the manifest says {sha256[:16]}...: the "
            "file was damaged or replaced. Copy or download the bundle again.",
            path,
        )


def file_sha256(path: Path) -> str:
    """The file's SHA-256, remembered by real path, size, time of change and inode."""
    stat = path.stat()
    key = f"{os.path.realpath(path)}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    known = cache.read_json(HASHES).get(key)
    if isinstance(known, str):
        return known
    if stat.st_size > ANNOUNCE_BYTES:
        log.info("checking %s once (%.1f GB)", path.name, stat.st_size / 1e9)
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    cache.remember(HASHES, key, digest.hexdigest(), MAX_REMEMBERED)
    return digest.hexdigest()


def check_specs(bundle: Bundle) -> None:
    """Check that this runtime, or the bundle itself, has the features that the adapter expects."""
    for key, modality, wanted in (
        ("audio", "audio", bundle.features.audio),
        ("face", "face", bundle.features.face),
    ):
        _check_spec(bundle, key, modality, wanted)


def _check_spec(bundle: Bundle, key: str, modality: str, wanted: FeatureInput) -> None:
    if wanted.spec.startswith("hf-"):
        prefix = "hf-audio:" if modality == "audio" else "hf-image:"
        if not wanted.spec.startswith(prefix):
            raise MismatchError(
                f'The bundle {bundle.name}: "features.{key}.spec" is {wanted.spec}, which is not '
                f"{modality}. Export the bundle again with mse-export."
            )
        bundle.encoder_path(wanted.spec)
        return
    from mse_runtime.features.spec import get_spec

    try:
        spec = get_spec(wanted.spec)
    except BundleError as error:
        raise MismatchError(f'The bundle {bundle.name}, "features.{key}.spec": {error}') from error
    if spec.modality != modality:
        raise MismatchError(
            f'The bundle {bundle.name}: "features.{key}.spec" is {wanted.spec}, which describes '
            f"{spec.modality}. Export the bundle again with mse-export."
        )
    if spec.dim != wanted.dim:
        raise MismatchError(
            f'The bundle {bundle.name}: "features.{key}.dim" is {wanted.dim}, but {wanted.spec} '
            f"has {spec.dim} columns. Export the bundle again with mse-export."
        )


def check_gguf(bundle: Bundle) -> None:
    """Check the dimensions in the language model's header; its bytes were checked before.

    Raises `BackboneError` where the file is no GGUF, `MismatchError` where it is another model.
    """
    from mse_runtime.gguf import Gguf

    path, wanted = bundle.gguf_path(), bundle.backbone
    with Gguf.open(path) as header:
        pairs = (
            ("arch", header.arch, wanted.arch),
            ("n_embd", header.n_embd, wanted.n_embd),
            ("n_vocab", header.n_vocab, wanted.n_vocab),
            ("n_layer", header.n_layer, wanted.n_layer),
        )
    for name, found, expected in pairs:
        if found != expected:
            raise MismatchError(
                f"{path} is another language model than the adapter was trained for: its {name} "
                f'is {found}, but "backbone.{name}" is {expected}. Put the right GGUF in its '
                "place, or export the bundle again with mse-export."
            )
