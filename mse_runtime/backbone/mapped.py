"""A file whose weights are copied while it is mapped: pages that were copied are given back.

llama.cpp repacks straight from the mapping, which spares a second copy and the clearing of its
memory: 1.8B opens in half the time (bench/latency.py, "loading alone"). But what it has touched
stays resident, so the peak would be the file and its copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

__all__ = ["CopiedPages"]

_STEP = 48 << 20
_MAPS = Path("/proc/self/maps")


class CopiedPages:
    """Gives back the resident pages of this process's mappings of a file, as loading goes on.

    Only pages that are the same in the file: whoever reads them again gets them from the kernel's
    cache, or from the disk.
    """

    def __init__(self, path: Path) -> None:
        found = path.stat()
        self._inode, self._size = str(found.st_ino), found.st_size
        self._device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        self._given = -float(_STEP)  # at once, too: llama.cpp maps the file with every page

    @staticmethod
    def possible() -> bool:
        """Whether this system has the calls: Linux."""
        return sys.platform == "linux" and hasattr(mmap, "MADV_DONTNEED") and _MAPS.exists()

    def progress(self, fraction: float) -> None:
        """Part of the file that has been copied by now."""
        if fraction < 1 and fraction * self._size - self._given < _STEP:
            return
        self._given = fraction * self._size
        madvise = ctypes.CDLL(None).madvise
        for start, stop in self._mappings():
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)

    def _mappings(self) -> list[tuple[int, int]]:
        """Addresses; none that are writable, where pages might differ from the file's."""
        found = []
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            place, rights, _offset, device, inode = line.split(maxsplit=5)[:5]
            if (device, inode) == (self._device, self._inode) and "w" not in rights:
                start, stop = place.split("-")
                found.append((int(start, 16), int(stop, 16)))
        return found
