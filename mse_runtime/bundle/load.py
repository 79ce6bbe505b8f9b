"""Opening a bundle: the manifest read, its files checked, its language model at hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mse_runtime.bundle import files, manifest
from mse_runtime.bundle.schema import Bundle, HubRef

__all__ = ["load_bundle"]


def load_bundle(path: Path | str, *, offline: bool = False, progress: bool = True) -> Bundle:
    """The bundle in the folder `path`, checked.

    Sizes are always checked, SHA-256 on the first load of a file on this machine, dimensions
    against the GGUF's header and the feature specs. A language model that the manifest refers to
    on the hub is downloaded first (`offline`: taken from the hub's cache only).

    Raises a subclass of `BundleError` per fault; writes nothing but the cache folder.
    """
    folder = Path(path).expanduser()
    bundle = dataclasses.replace(manifest.read(folder), path=folder)
    files.check_specs(bundle)
    files.check_files(bundle)
    if isinstance(bundle.backbone.gguf, HubRef):
        from mse_runtime.bundle import hub

        gguf = hub.fetch_gguf(bundle.backbone.gguf, offline=offline, progress=progress)
        bundle = dataclasses.replace(bundle, hub_gguf=gguf)
    files.check_gguf(bundle)
    return bundle
