"""A file whose weights are copied while it is mapped: pages that were copied are given back.

Where llama.cpp repacks weights it does so straight from the mapping, which spares a second copy and
the clearing of its memory. But what it has touched stays resident, so the peak would be the file
and its copy.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from mse_runtime.gguf import MAPPINGS

__all__ = ["STEP", "CopiedPages"]

STEP = 48 << 20
"""Bytes of the file after which it is time to give back again."""
_MAPS = Path("/proc/self/maps")


class CopiedPages:
    """Gives back the resident pages of this process's mappings of a file.

    Only pages that are the same in the file: whoever reads them again gets them from the kernel's
    cache, or from the disk.
    """

    def __init__(self, file: tuple[str, str]) -> None:
        self._file = file  # device and inode

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """For this file; None where pages cannot be given back: no Linux, no such file.

        What the kernel calls the file is read off a mapping: on some file systems (btrfs) `stat`
        names another device.
        """
        if sys.platform != "linux":
            return None
        try:
            with (
                MAPPINGS,
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ) as one,
            ):
                page = np.frombuffer(one, np.uint8)
                address = page.ctypes.data
                del page  # the mapping cannot be closed while it is looked at
                name = next((name for start, _, name in _mappings() if start == address), None)
            return None if name is None else cls(name)
        except (OSError, ValueError):
            return None

    def give_back(self) -> None:
        """What is resident now."""
        madvise = ctypes.CDLL(None).madvise
        with MAPPINGS:  # none of them may go meanwhile: its address could be another's by then
            for start, stop, name in _mappings():
                if name == self._file:
                    madvise(
                        ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
                    )


def _mappings() -> Iterator[tuple[int, int, tuple[str, str]]]:
    """Start, end, and device and inode of the file; none that are writable: they may differ."""
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        place, rights, _offset, device, inode = line.split(maxsplit=5)[:5]
        if inode != "0" and "w" not in rights:
            start, stop = place.split("-")
            yield int(start, 16), int(stop, 16), (device, inode)
