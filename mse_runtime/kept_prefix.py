"""The constant beginning of a prompt, kept in the cache folder as the keys and values it became.

A task's instructions are the same for every clip, and so is what the backbone makes of them. A new
process reads them (10 MB for 48 positions of a 1.8B model) in a twentieth of the time it takes to
compute them. Nothing of a transcript or a clip is in these files. They are bound to the model's
file, llama.cpp's build, the CPU and every setting that changes a rounding, so an answer does not
depend on whether one was there.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mse_runtime import background, cpu
from mse_runtime.cache import cache_dir
from mse_runtime.errors import BackboneError
from mse_runtime.sizing import SMALL_MODEL

if TYPE_CHECKING:
    from mse_runtime.backbone import Backbone
    from mse_runtime.bundle import Bundle

__all__ = ["restore", "store"]

FOLDER, KEEP = "prefixes", 4
# What of `Backbone.info` decides how sums round.
SETTINGS = (
    "build", "device", "offloaded_layers", "threads", "extra_bufts", "product", "attention",
    "kv_type", "rope_table",
)  # fmt: skip


def restore(backbone: Backbone, bundle: Bundle, ids: NDArray[np.int32]) -> bool:
    """Put the kept keys and values of `ids` into sequence 0; False where there are none."""
    if not _pays(bundle, ids):
        return False
    path = _path(backbone, bundle, ids)
    try:
        with path.open("rb") as file:  # mapped: read, it would be copied once more
            state = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        backbone.load_state(0, state)
    except (OSError, ValueError, BackboneError):  # ValueError: it is empty
        return False
    with suppress(OSError):  # not ours to touch, or gone by now: it has been read all the same
        os.utime(path)
    if backbone.length(0) == len(ids):
        return True
    backbone.clear(0)
    return False


def store(backbone: Backbone, bundle: Bundle, ids: NDArray[np.int32]) -> None:
    """Keep sequence 0, which holds `ids` and nothing else; written beside the caller's work."""
    if not _pays(bundle, ids):
        return
    path, state = _path(backbone, bundle, ids), backbone.save_state(0)
    background.start(lambda: _write(path, state), "mse-prefix")


def _pays(bundle: Bundle, ids: NDArray[np.int32]) -> bool:
    """A small model computes the few positions faster than it finds the file."""
    return len(ids) > 0 and bundle.backbone.gguf.size >= SMALL_MODEL


def _path(backbone: Backbone, bundle: Bundle, ids: NDArray[np.int32]) -> Path:
    facts = [backbone.info[name] for name in SETTINGS]
    facts.append(min(backbone.n_batch, len(ids)))  # after `shrink` sums are cut at other places
    text = repr((bundle.backbone.gguf.sha256, cpu.model(), *facts, ids.tolist()))
    return cache_dir() / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.kv"


def _write(path: Path, state: bytes) -> None:
    """A folder that cannot be written costs time, never an answer."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as handle:
            try:
                handle.write(state)
            except OSError:
                Path(handle.name).unlink()
                raise
        Path(handle.name).replace(path)
        kept = sorted(path.parent.glob("*.kv"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in kept[KEEP:]:
            old.unlink()
