"""The user's cache folder: remembered facts (probe results, hashes, measurements) and what was
computed once (`kept_prefix`, `features.sessions`).

Everything here may be deleted at any time, and a folder that cannot be written costs speed,
never correctness: `write_json` reports failure instead of raising.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["cache_dir", "read_json", "remember", "write_json"]


def cache_dir() -> Path:
    """`$MSE_CACHE`, else `$XDG_CACHE_HOME/mse-runtime`, else `~/.cache/mse-runtime`.

    Without a home folder it is a path that cannot be, so that nothing is remembered: a folder of a
    known name in /tmp could be somebody else's. Nothing is created.
    """
    if override := os.environ.get("MSE_CACHE"):
        return Path(override)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "mse-runtime"
    try:
        return Path.home() / ".cache" / "mse-runtime"
    except RuntimeError:
        return Path(os.devnull) / "mse-runtime"


def read_json(name: str) -> dict[str, Any]:
    """The remembered facts in `name`, or an empty dict where there are none or they are damaged."""
    try:
        found = json.loads((cache_dir() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(name: str, key: str, fact: Any, keep: int = 64) -> bool:
    """Put `fact` under `key` into the facts in `name`, or take it out where it is None.

    The newest `keep` stay. False where the folder cannot be written.
    """
    facts = read_json(name)
    facts.pop(key, None)
    if fact is not None:
        facts = dict(list(facts.items())[max(0, len(facts) + 1 - keep) :])
        facts[key] = fact
    return write_json(name, facts)


def write_json(name: str, facts: dict[str, Any]) -> bool:
    """Write `facts` atomically; False where the folder cannot be written."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=folder, prefix=f".{name}.", delete=False
        ) as handle:
            json.dump(facts, handle, indent=1)
        Path(handle.name).replace(folder / name)
    except OSError:
        return False
    return True
