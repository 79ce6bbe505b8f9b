"""Memory that was freed: when Python looks for it, and how it goes back to the system."""

from __future__ import annotations

import gc
from contextlib import suppress

__all__ = ["collect_late", "give_back"]

NEW_OBJECTS = 100_000
"""Until the first collection. What a start makes stays nearly all: with Python's 700 it is gone
through again and again."""


def collect_late() -> None:
    """For a process of our own: look for cycles only when the start is over, then as usual.

    Call before other modules are imported.
    """
    usual = gc.get_threshold()

    def first(_phase: str, _info: dict[str, int]) -> None:
        gc.set_threshold(*usual)
        gc.callbacks.remove(first)

    gc.callbacks.append(first)
    gc.set_threshold(NEW_OBJECTS, *usual[1:])


def give_back() -> None:
    """Return free pages of the C library's heaps, where it can (glibc); a few milliseconds.

    Every clip is read by threads of its own, and glibc keeps what a thread freed for the next one
    that comes to the same heap: without this the resident set wanders tens of MB upwards.
    """
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
