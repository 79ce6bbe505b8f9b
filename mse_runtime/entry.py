"""The commands' way in: what must be settled before anything else is imported.

Ctrl-C while the libraries load is a quiet end, not a traceback. Texts and file names are UTF-8
whatever the locale says, as in Python's own UTF-8 mode, which a locale that is not UTF-8 makes
these commands start again in.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

TYPE_CHECKING = False  # until the handler is in place nothing may take long
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

_NO_READER = frozenset(
    (
        "--features", "--features-only", "--explain-features", "--batch", "--plot", "--low-memory",
        "--verbose", "-v", "--version", "--help", "-h",
    )
)  # fmt: skip
"""Options of mse-run that need no process to read a clip, or another one."""

__all__ = ["mse_doctor", "mse_eval", "mse_export", "mse_run", "mse_train"]


def mse_run() -> None:
    _enter("mse-run", "mse_runtime.cli", _start_reader)


def mse_eval() -> None:
    _enter("mse-eval", "mse_runtime.evaluate")


def mse_doctor() -> None:
    _enter("mse-doctor", "mse_runtime.doctor")


def mse_export() -> None:
    _enter("mse-export", "mse_export.cli")


def mse_train() -> None:
    _enter("mse-train", "mse_export.training.cli")


def _enter(name: str, module: str, before: Callable[[], None] | None = None) -> None:
    def interrupted(_number: int = 0, _frame: FrameType | None = None) -> NoReturn:
        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(130)

    # An exception could be swallowed by whatever is being imported; a handler that exits cannot.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, interrupted)
    _speak_utf8()
    import_module("mse_runtime.heap").collect_late()
    _fill_streams()
    if before is not None:
        before()
    main = import_module(module).main
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        interrupted()


def _fill_streams() -> None:
    """Streams that the shell has closed: a file that is opened later must not take their numbers,
    for what a library prints would go into it."""
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _start_reader() -> None:
    """Start the process that reads a clip while this one is still about to parse its arguments.

    Where they do not look like those of a single clip, `mse_runtime.cli` does so later, or not.
    """
    words = sys.argv[1:]
    names = [word.partition("=")[0] for word in words]
    if _NO_READER.isdisjoint(names) and any(map(os.path.isfile, words)):
        import_module("mse_runtime.features.child").start_early()


def _speak_utf8() -> None:
    """Start again in UTF-8 mode where file names would be something else, children included."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode and sys.executable:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    # Half a surrogate pair (of a file name that is not UTF-8) is printed as \udc.., JSON's way.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
