"""What llama.cpp reports: its log, and how far it has come with loading a model.

It reports each tensor several times. Where a callback is Python's, each time waits until no other
thread runs Python, and meanwhile one may be reading the clip. So `mse_kernels.reports` takes the
reports in; without the kernels' library they come here one by one.
"""

from __future__ import annotations

import collections
import ctypes
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["log_errors", "log_lines", "log_mark", "progress_callback", "redirect_log"]

_LEVELS = {1: "debug", 2: "info", 3: "warn", 4: "error"}
_CONTINUED = 5
_log: collections.deque[tuple[int, str, str]] = collections.deque(maxlen=600)
_log_count = 0
_log_open = False
_source: Any = None
"""What llama.cpp calls for the log: a `mse_kernels.reports.Log`, or a callback of ours."""
_taking = threading.Lock()


def redirect_log(lib: Any) -> None:
    """llama.cpp writes hundreds of lines to stderr; keep the last ones and show them on errors."""
    global _source
    if _source is None:
        _source = _kernels_log() or lib.llama_log_callback(_keep)
    callback = getattr(_source, "callback", _source)
    lib.llama_log_set(ctypes.cast(callback, lib.llama_log_callback), ctypes.c_void_p(0))


def _kernels_log() -> Any:
    try:
        from mse_kernels.reports import Log

        return Log()
    except (ImportError, RuntimeError, AttributeError):  # no kernels, or older ones
        return None


def _keep(level: int, text: bytes, _user: Any) -> None:
    global _log_count, _log_open
    try:
        kind = _LEVELS.get(level, "info")
        line = text.decode("utf-8", errors="replace").rstrip("\n")
        if level == _CONTINUED:
            if _log_open and _log:
                number, before, begun = _log.pop()
                _log.append((number, before, begun + line))
            return
        # Debug lines come one for each tensor and would push the interesting ones out.
        _log_open = kind != "debug" and bool(line)
        if _log_open:
            _log_count += 1
            _log.append((_log_count, kind, line))
    except Exception:  # an exception cannot pass through C; losing a log line is harmless
        return


def _take() -> None:
    with _taking:
        if hasattr(_source, "take"):
            for level, text in _source.take():
                _keep(level, text, None)


def _kept() -> list[tuple[int, str, str]]:
    """(number, kind, line), oldest first."""
    _take()
    return list(_log)


def log_mark() -> int:
    """A mark for `log_lines(since=...)`."""
    _take()
    return _log_count


def log_lines(since: int = 0) -> list[str]:
    """llama.cpp's kept log lines after a mark, oldest first."""
    return [line for number, _, line in _kept() if number > since]


def log_errors(since: int = 0, limit: int = 4) -> str:
    """The last warnings and errors after a mark as one line, or an empty string."""
    found = [line for number, kind, line in _kept() if number > since and kind in ("warn", "error")]
    return " | ".join(found[-limit:])


def progress_callback(lib: Any, report: Callable[[float, Any], bool], step: float) -> Any:
    """(callback, user data, what must live as long): for `llama_model_params`.

    `report` is called with the fraction of the weights that are there: at the beginning, each
    `step`, and at the end; it returns whether to go on.
    """
    kind = lib.llama_progress_callback
    try:
        from mse_kernels.reports import Progress

        progress = Progress(kind(report), step)
        return ctypes.cast(progress.callback, kind), progress.user_data, progress
    except (ImportError, RuntimeError, AttributeError):
        callback = kind(_seldom(report, step))
        return callback, ctypes.c_void_p(), callback


def _seldom(report: Callable[[float, Any], bool], step: float) -> Callable[[float, Any], bool]:
    last = -2.0

    def passed(fraction: float, user: Any) -> bool:
        nonlocal last
        if fraction < 1 and fraction - last < step:
            return True
        last = fraction
        return report(fraction, user)

    return passed
