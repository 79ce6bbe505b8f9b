"""Work that runs beside the caller: one function, one thread, one result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["start"]

T = TypeVar("T")


def start(work: Callable[[], T], name: str) -> Future[T]:
    """Run `work` in a thread of its own. An exception is raised where the result is asked for.

    The thread is a daemon, so Ctrl-C never waits for a model that is still loading
    (`concurrent.futures` executors join theirs at exit).
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
