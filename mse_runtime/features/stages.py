"""Stages that overlap: seconds spent in each, and items prepared ahead of their use."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

__all__ = ["Watch", "ahead"]

T = TypeVar("T")


class Watch:
    """Seconds spent in each stage; stages overlap, so they don't add up to the whole."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[stage] = self.spent.get(stage, 0.0) + time.perf_counter() - begin

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        source = iter(items)
        while True:
            with self(stage):
                item = next(source, None)
            if item is None:
                return
            yield item


def ahead(source: Iterator[T], room: int) -> Iterator[T]:
    """The same items, prepared by a thread a few ahead of their use."""
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(room)
    stop = threading.Event()

    def fill() -> None:
        last: BaseException | None = None
        try:
            for item in source:
                if stop.is_set():
                    return
                ready.put((item,))
        except BaseException as error:
            last = error
        ready.put(last)

    worker = threading.Thread(target=fill, name="mse-decode", daemon=True)
    worker.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stop.set()
        # Whoever leaves early must not leave the worker waiting for room.
        while worker.is_alive():
            with suppress(queue.Empty):
                ready.get(timeout=0.01)
