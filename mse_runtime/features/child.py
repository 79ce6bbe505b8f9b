"""A process that reads clips (`worker`), and the pipes to it.

A command starts it before anything else, so nothing is imported here that is not there already.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from _thread import allocate_lock as Lock
from contextlib import suppress

TYPE_CHECKING = False  # see above
if TYPE_CHECKING:
    from io import BufferedReader, BufferedWriter
    from typing import Any

__all__ = ["Child", "can_help", "start_early", "take_early"]

# No files of the parent's. Its import path, not the current folder: a file beside the clips is no
# module.
CODE = (
    "import os, sys; os.closerange(3, os.sysconf('SC_OPEN_MAX')); "
    "sys.path[:] = [p for p in sys.argv.pop(1).split('\\n') if p]; "
    "from mse_runtime.features.worker import main; main()"
)
_early: Child | None = None


class Child:
    """A `worker` process, by posix_spawn: running as soon as this returns."""

    pid: int
    stdin: BufferedWriter
    stdout: BufferedReader

    def __init__(self, memory_mb: int | None = None, *, verbose: bool = False) -> None:
        """memory_mb: limit on its address space. verbose: its stderr is this process's.

        Raises OSError where the system allows no more processes, or cannot start them so.
        """
        known = "\n".join(path for path in sys.path if "\n" not in path)
        arguments = [
            sys.executable, "-P", "-c", CODE, known, str(memory_mb or 0), str(os.getpid())
        ]  # fmt: skip
        their_in, our_out = os.pipe()
        try:
            our_in, their_out = os.pipe()
        except OSError:
            os.close(their_in)
            os.close(our_out)
            raise
        # The pipe's ends first: one may be 2 where the shell has closed that.
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_DUP2, their_in, 0),
            (os.POSIX_SPAWN_DUP2, their_out, 1),
        ]
        if not verbose:
            actions.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))
        try:
            self.pid = os.posix_spawn(
                sys.executable,
                arguments,
                # NumPy sees small matrices only, and its BLAS workers would just spin.
                {"OPENBLAS_NUM_THREADS": "1", **os.environ},
                file_actions=actions,
                setsid=True,  # Ctrl-C is the parent's to handle
                setsigdef=[signal.SIGPIPE],
            )
        except BaseException as error:
            os.close(our_out)
            os.close(our_in)
            if isinstance(error, NotImplementedError):  # a C library without sessions here
                raise OSError(str(error)) from error
            raise
        finally:
            os.close(their_in)
            os.close(their_out)
        self._code: int | None = None
        self._asked = Lock()
        self.stdin, self.stdout = os.fdopen(our_out, "wb"), os.fdopen(our_in, "rb")

    def wait(self, seconds: float = float("inf")) -> int | None:
        """Its exit code, minus a signal's number; None where it still runs then.

        0 where somebody else has asked the system, which says it once.
        """
        end, pause = time.monotonic() + seconds, 0.0005
        while (code := self._ended()) is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.05)
        return code

    def kill(self) -> None:
        """End it, and what a hostile clip had it start."""
        with self._asked, suppress(OSError):
            if self._code is None:  # otherwise the number may be another's by now
                os.killpg(self.pid, signal.SIGKILL)

    def _ended(self) -> int | None:
        with self._asked:
            if self._code is None:
                try:
                    found, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:
                    found, status = self.pid, 0
                if found:
                    self._code = os.waitstatus_to_exitcode(status)
            return self._code


def can_help() -> bool:
    """Whether a process beside this one gets anywhere while this one works."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) > 1 and bool(sys.executable)


def start_early() -> None:
    """Start one for the command that this process is about to become, if that can help."""
    global _early
    if can_help():
        with suppress(OSError):
            _early = Child()


def take_early() -> Child | None:
    """What `start_early` has started, once."""
    global _early
    child, _early = _early, None
    return child
