"""Memory that was freed: when Python looks for it, and how it goes back to the system."""

from __future__ import annotations

import gc
from contextlib import suppress

__all__ = ["collect_rarely", "give_back"]

NEW_OBJECTS = 100_000
"""Between two collections. A start makes some 200,000, and nearly all of them stay: Python's 700
had it go through them for a tenth of the time."""


def collect_rarely() -> None:
    """For a process of our own: look for cycles rarely. What has no cycle is freed at once anyway.

    Call before other modules are imported.
    """
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])


def give_back() -> None:
    """Return free pages of the C library's heaps, where it can (glibc); a few milliseconds.

    Every clip is read by threads of its own, and glibc keeps what a thread freed for the next one
    that comes to the same heap: without this the resident set wanders tens of MB upwards.
    """
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
