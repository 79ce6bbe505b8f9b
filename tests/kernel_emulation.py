"""`fusion.cu` on the host: a stand-in for the CUDA device that runs every thread as a fiber.

It checks the source's arithmetic, indexing, barriers and the whole host side of the CUDA backend
without a GPU. It proves nothing about a GPU's speed or memory ordering.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernel_cases import cxx

from mse_kernels._driver import Graph

__all__ = ["HostDevice", "build_emulation"]

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
Bytes = npt.NDArray[np.uint8]
GUARD = 1024


def build_emulation(folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile kernels/checks into `folder`; the test is skipped where there is no compiler."""
    compiler = cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = folder / "libemulation.so"
    # Fortified longjmp takes a change of stacks for an attack.
    options = ("-O2", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Werror", "-U_FORTIFY_SOURCE")
    quiet = ("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")
    sources = [str(KERNELS / "checks" / name) for name in ("host.cpp", "driver.cpp")]
    command = [compiler, *options, *quiet, *flags, *sources, "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    lib = ctypes.CDLL(str(out))
    lib.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.c_void_p]
    lib.fake_calls.restype = lib.fake_violation.restype = ctypes.c_char_p
    lib.emulated_launch.argtypes = [
        *(ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.c_uint64),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p),
    ]
    return lib


class HostDevice:
    """mse_kernels._cuda.Device in host memory. falling: threads run from the last to the first."""

    name = "host emulation (not a GPU)"

    def __init__(self, lib: ctypes.CDLL, *, sm_count: int = 3, falling: bool = False) -> None:
        self.sm_count = sm_count
        self.launches: list[str] = []
        self.recorded = 0
        self._lib, self._falling = lib, falling
        self._memory: dict[int, Bytes] = {}

    @property
    def allocations(self) -> int:
        return len(self._memory)

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def alloc(self, nbytes: int) -> int:
        # All bits set are NaNs: what is read before it was written, or beyond the end, shows in the
        # result; what is written beyond the end is found by `free`.
        array = np.full(nbytes + GUARD, 0xFF, np.uint8)
        self._memory[array.ctypes.data] = array
        return int(array.ctypes.data)

    def free(self, address: int) -> None:
        guard = self._memory.pop(address)[-GUARD:]
        assert (guard == 0xFF).all(), "a kernel wrote beyond its buffer"

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        assert array.nbytes <= self._memory[address].nbytes - GUARD
        self._memory[address][: array.nbytes] = array.reshape(-1).view(np.uint8)

    def staging(self, nbytes: int) -> Bytes:
        return np.zeros(nbytes, np.uint8)

    def unstage(self, staged: Bytes) -> None:
        pass

    def copy_in(self, address: int, staged: Bytes) -> None:
        assert staged.nbytes <= self._memory[address].nbytes - GUARD
        ctypes.memmove(address, staged.ctypes.data, staged.nbytes)

    def copy_out(self, staged: Bytes, address: int) -> None:
        assert staged.nbytes <= self._memory[address].nbytes - GUARD
        ctypes.memmove(staged.ctypes.data, address, staged.nbytes)

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        args: Sequence[Any],
        cooperative: bool = False,
    ) -> None:
        assert block % 32 == 0
        assert block <= 1024
        assert shared <= 48 * 1024
        self.launches.append(kernel)
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(a) for a in args))
        code = self._lib.emulated_launch(
            kernel.encode(), *grid, block, shared, int(cooperative), int(self._falling), pointers
        )
        assert code == 0, f"{kernel}: {'unknown kernel' if code == 1 else 'deadlock'}"

    def synchronize(self) -> None:
        pass

    def record(self, work: Callable[[], None]) -> Graph:
        self.recorded += 1
        return Graph(work, lambda: None)

    def close(self) -> None:
        pass
