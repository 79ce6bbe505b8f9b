"""A child process that turns clips into features, one at a time.

    main() with sys.argv[1:] = [limit on its address space in MiB or 0, the parent's process id]

Requests are JSON lines on stdin: keyword arguments of `extract`, a bundle by its folder. A reply
is a JSON line on stdout and, after it, as many bytes of a feature file as its "size" says; the
parent reads both with every size checked. Nothing is pickled, so a decoder that a hostile file
took over can send wrong features, but no objects and no code.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mse_runtime import heap, memory
from mse_runtime.errors import MediaError, MSEError

if TYPE_CHECKING:
    from mse_runtime.bundle import Bundle

__all__ = ["main"]

PR_SET_PDEATHSIG = 1


def main() -> None:
    if limit := int(sys.argv[1]):
        limit_memory(limit << 20)
    heap.collect_late()
    _end_with_parent(int(sys.argv[2]))
    # Libraries that print to stdout must not be taken for replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _import_ahead()
    with suppress(BrokenPipeError):  # killed while a clip was being read: nobody to answer
        for line in sys.stdin:
            reply, content = answer(json.loads(line))
            reply |= {"size": len(content), "peak_rss": memory.measured().peak_rss}
            replies.write(json.dumps(reply).encode() + b"\n" + content)
            replies.flush()
    os._exit(0)  # there is nothing to take apart


def limit_memory(limit: int) -> None:
    """Limit the address space to `limit` bytes, where the system can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end_with_parent(parent: int) -> None:
    """Where the system can: a decoder that hangs would not see that its input has ended.

    Linux asks about the thread that started this process.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(0)


def _import_ahead() -> None:
    """While the parent still finds out what to ask for. What is missing is told in an answer."""
    with suppress(Exception):
        import onnxruntime  # noqa: F401

        from mse_runtime import media  # noqa: F401
        from mse_runtime.features import audio, extract, face, npz  # noqa: F401


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Extract what `request` asks for: what to reply, and the feature file.

    A clip of which neither sound nor picture can be used is an error where the request `needs`
    one of them.
    """
    path, needs = request["path"], request.pop("needs", False)
    folder = request.pop("bundle", None)
    try:
        from mse_runtime.features.extract import extract
        from mse_runtime.features.npz import write_npz

        features = extract(**request, bundle=_bundle(folder) if folder else None)
        if needs and features.audio is None and features.face is None:
            why = "; ".join(features.warnings)
            raise MediaError(f"{path}: neither sound nor picture of it could be used ({why}).")
        content = io.BytesIO()
        write_npz(content, features, compress=False)
    except MSEError as error:
        return _refusal(_public(error), str(error)), b""
    except MemoryError:
        return _refusal("MediaError", f"{path}: decoding it takes more memory than allowed."), b""
    except Exception as error:  # whatever it was, the next clip has another chance
        import traceback

        traceback.print_exc()
        return _refusal("MSEError", f"{path}: {type(error).__name__}: {error}"), b""
    return {}, content.getvalue()


def _refusal(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message}}


def _public(error: MSEError) -> str:
    """The nearest class of `mse_runtime.errors`."""
    return next(c.__name__ for c in type(error).__mro__ if c.__module__ == MSEError.__module__)


@lru_cache(maxsize=1)
def _bundle(folder: str) -> Bundle:
    """The bundle's encoders; its files were checked by the parent, its model is not needed."""
    from dataclasses import replace

    from mse_runtime.bundle import manifest

    return replace(manifest.read(Path(folder)), path=Path(folder))
