"""A child process that turns clips into feature files, one at a time, with a limit on memory.

    main() with sys.argv[1] = MEMORY_MB

Requests and replies are JSON lines on stdin and stdout; features travel as .npz files, which the
parent reads with every size checked. Nothing is pickled: a decoder that a hostile file took over
gets no way into the parent.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mse_runtime.bundle import Bundle, manifest
from mse_runtime.errors import MediaError, MSEError

__all__ = ["main"]


def main() -> None:
    limit_memory(int(sys.argv[1]) << 20)
    # Libraries that print to stdout must not be taken for replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    target: Path | None = None
    with suppress(BrokenPipeError):  # killed while a clip was being read: nobody to answer
        for line in sys.stdin:
            request = json.loads(line)
            target = Path(request["target"])
            print(json.dumps(answer(request)), file=replies, flush=True)
    if target is not None:
        # Requests only end where the parent was killed: its temporary folder is ours to remove.
        with suppress(OSError):
            target.unlink(missing_ok=True)
            target.parent.rmdir()  # by the last of its children


def limit_memory(memory: int) -> None:
    """Limit the address space to `memory` bytes, where the system can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Extract what `request` asks for into its `target`; what to reply."""
    target, folder = request.pop("target"), request.pop("bundle", None)
    try:
        from mse_runtime.features.extract import extract, save_npz

        features = extract(**request, bundle=_bundle(folder) if folder else None)
    except MSEError as error:
        return {"error": {"type": _public(error), "message": str(error)}}
    except MemoryError:
        problem = MediaError(f"{request['path']}: decoding it takes more memory than allowed.")
        return {"error": {"type": type(problem).__name__, "message": str(problem)}}
    except Exception as error:
        text = f"{request['path']}: {type(error).__name__}: {error}"
        return {"error": {"type": "MediaError", "message": text}}
    if features.audio is None and features.face is None:
        why = "; ".join(features.warnings)
        text = f"{request['path']}: neither sound nor picture of it could be used ({why})."
        return {"error": {"type": "MediaError", "message": text}}
    try:
        save_npz(target, features)
    except MSEError as error:
        text = f"{request['path']}: there is no room for its features ({error})"
        advice = "Make room or name another folder in TMPDIR, then --retry."
        return {"error": {"type": "UsageError", "message": f"{text} {advice}"}}
    return {"ok": True}


def _public(error: MSEError) -> str:
    """The nearest class of `mse_runtime.errors`."""
    return next(c.__name__ for c in type(error).__mro__ if c.__module__ == MSEError.__module__)


@lru_cache(maxsize=1)
def _bundle(folder: str) -> Bundle:
    """The bundle's encoders; its files were checked by the parent, its model is not needed."""
    return replace(manifest.read(Path(folder)), path=Path(folder))
