"""From a clip to features: specs, extractors for audio and face, files, normalisation.

Names are loaded when they are asked for, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Column": "spec",
    "FeatureSpec": "spec",
    "FeatureTrack": "spec",
    "Features": "spec",
    "encoder_spec": "spec",
    "get_spec": "spec",
    "known_specs": "spec",
    "load_npz": "npz",
    "save_npz": "npz",
    "prepare": "normalise",
}

__all__ = [
    "Column",
    "FeatureSpec",
    "FeatureTrack",
    "Features",
    "encoder_spec",
    "get_spec",
    "known_specs",
    "load_npz",
    "prepare",
    "save_npz",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
