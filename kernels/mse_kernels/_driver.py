"""The few calls of the CUDA driver API that the kernels need, through ctypes.

Needs an NVIDIA driver (`libcuda.so.1`) and nothing else. Import does nothing.
"""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mse_kernels.errors import KernelError, UnavailableError

__all__ = ["KERNELS", "CudaDevice", "Graph", "image_for", "load_driver"]

FOLDER = Path(__file__).parent / "cubin"
CAPTURE_THREAD_LOCAL = 1
CC_MAJOR, CC_MINOR, SM_COUNT, COOPERATIVE = 75, 76, 16, 95
KERNELS = (
    *("mse_project", "mse_lstm", "mse_lstm_any"),
    *("mse_fuse_f32", "mse_fuse_f16", "mse_fuse_bf16"),
)
Bytes = npt.NDArray[np.uint8]


def load_driver() -> ctypes.CDLL:
    """The driver library; UnavailableError says what is missing."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        lib = ctypes.CDLL(name)
    except OSError:
        raise UnavailableError(f"no NVIDIA driver ({name} is not installed)") from None
    lib.cuGetErrorString.argtypes = [c_int, c_void_p]
    return lib


def image_for(major: int, minor: int) -> tuple[str, bytes]:
    """(file name, image) for compute capability `major`.`minor`.

    A cubin runs on its own and on later minor versions of its family; anything newer gets the PTX,
    which the driver compiles once and keeps.
    """
    if override := os.environ.get("MSE_KERNELS_CUBIN"):  # a developer's own build
        return Path(override).name, Path(override).read_bytes()
    index_path = FOLDER / "index.json"
    if not index_path.is_file():
        raise UnavailableError("this installation holds no CUDA kernels (mse_kernels/cubin)")
    index = json.loads(index_path.read_text(encoding="utf-8"))
    family = [int(t) for t in index["images"] if int(t) // 10 == major and int(t) % 10 <= minor]
    if family:
        name = str(index["images"][str(max(family))]["file"])
    elif 10 * major + minor >= int(index["ptx"]["target"]):
        name = str(index["ptx"]["file"])
    else:
        raise UnavailableError(
            f"this GPU has compute capability {major}.{minor}; the kernels need 7.5 or newer"
        )
    image = gzip.decompress((FOLDER / name).read_bytes())
    return name, image + b"\0"  # PTX is read as a C string


@dataclass(frozen=True)
class Graph:
    """Recorded work: `launch` queues it, `close` frees it."""

    launch: Callable[[], None]
    close: Callable[[], None]


class CudaDevice:
    """Device 0's primary context, one module and one stream.

    Everything but `close` needs the context to be current: call it inside `active()`.
    """

    def __init__(self) -> None:
        self._lib = load_driver()
        self._call("cuInit", c_uint(0))
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        if count.value == 0:
            raise UnavailableError("the NVIDIA driver sees no GPU")
        device = c_int()
        self._call("cuDeviceGet", byref(device), c_int(0))
        self._device = device
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, c_int(len(name)), device)
        major, minor = self._attribute(CC_MAJOR), self._attribute(CC_MINOR)
        self.name = f"{name.value.decode(errors='replace')} (sm_{major}{minor})"
        self.sm_count = self._attribute(SM_COUNT)
        if not self._attribute(COOPERATIVE):
            raise UnavailableError(f"{self.name} takes no cooperative launch, which they need")
        self.image, image = image_for(major, minor)
        self._context, self._module, self._stream = c_void_p(), c_void_p(), c_void_p()
        self._functions: dict[str, c_void_p] = {}
        self._pinned: list[c_void_p] = []
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), device)
        try:
            with self.active():
                self._call("cuModuleLoadData", byref(self._module), c_char_p(image))
                # All of them now: a driver that loads lazily finds out here what it can't run.
                for kernel in KERNELS:
                    function = self._functions[kernel] = c_void_p()
                    self._call(
                        "cuModuleGetFunction", byref(function), self._module, kernel.encode()
                    )
                # 1: no order with the default stream, on which other libraries may work.
                self._call("cuStreamCreate", byref(self._stream), c_uint(1))
        except BaseException:
            self.close()
            raise

    def _call(self, name: str, *args: Any) -> None:
        code = int(getattr(self._lib, name)(*args))
        if code != 0:
            text = c_char_p()
            self._lib.cuGetErrorString(code, byref(text))
            why = (text.value or b"unknown error").decode()
            opening = ("cuInit", "cuModuleLoadData", "cuModuleGetFunction")
            kind = UnavailableError if name in opening else KernelError
            raise kind(f"CUDA: {name} failed: {why} (code {code})")

    def _attribute(self, which: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), c_int(which), self._device)
        return value.value

    @contextmanager
    def active(self) -> Iterator[None]:
        """The context is this thread's current one inside; afterwards the one before is again."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def alloc(self, nbytes: int) -> int:
        """Device memory; released with `free`."""
        pointer = c_void_p()
        self._call("cuMemAlloc_v2", byref(pointer), c_size_t(max(nbytes, 256)))
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        """Release what `alloc` gave."""
        self._call("cuMemFree_v2", c_void_p(address))

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy and wait: for weights, once.

        On our own stream: a copy on the default one may still be under way when kernels start.
        """
        self._call(
            "cuMemcpyHtoDAsync_v2",
            *(c_void_p(address), c_void_p(array.ctypes.data), c_size_t(array.nbytes)),
            self._stream,
        )
        self.synchronize()

    def staging(self, nbytes: int) -> Bytes:
        """Page-locked host memory as bytes; it lives as long as the device."""
        pointer = c_void_p()
        self._call("cuMemAllocHost_v2", byref(pointer), c_size_t(max(nbytes, 256)))
        self._pinned.append(pointer)
        buffer = (ctypes.c_uint8 * nbytes).from_address(int(pointer.value or 0))
        return np.ctypeslib.as_array(buffer)

    def unstage(self, staged: Bytes) -> None:
        """Release what `staging` gave; nothing may use the array afterwards."""
        for pointer in self._pinned:
            if pointer.value == staged.ctypes.data:
                self._call("cuMemFreeHost", pointer)
                self._pinned.remove(pointer)
                return

    def copy_in(self, address: int, staged: Bytes) -> None:
        """Queue host -> device."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            *(c_void_p(address), c_void_p(staged.ctypes.data), c_size_t(staged.nbytes)),
            self._stream,
        )

    def copy_out(self, staged: Bytes, address: int) -> None:
        """Queue device -> host."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            *(c_void_p(staged.ctypes.data), c_void_p(address), c_size_t(staged.nbytes)),
            self._stream,
        )

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        args: Sequence[Any],
        cooperative: bool = False,
    ) -> None:
        """Queue `kernel`; args are ctypes values in the kernel's order."""
        function = self._functions[kernel]
        pointers = (c_void_p * len(args))(*(ctypes.addressof(a) for a in args))
        shape = [c_uint(n) for n in (*grid, block, 1, 1, shared)]
        if cooperative:
            self._call("cuLaunchCooperativeKernel", function, *shape, self._stream, pointers)
        else:
            self._call("cuLaunchKernel", function, *shape, self._stream, pointers, None)

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self._call("cuStreamSynchronize", self._stream)

    def record(self, work: Callable[[], None]) -> Graph | None:
        """`work` as a CUDA graph to queue again; None where the driver can't capture it."""
        graph, executable = c_void_p(), c_void_p()
        try:
            self._call("cuStreamBeginCapture_v2", self._stream, c_int(CAPTURE_THREAD_LOCAL))
            try:
                work()
            finally:
                self._call("cuStreamEndCapture", self._stream, byref(graph))
            flags = ctypes.c_ulonglong(0)
            self._call("cuGraphInstantiateWithFlags", byref(executable), graph, flags)
        except (KernelError, AttributeError):
            return None
        finally:
            if graph:
                self._call("cuGraphDestroy", graph)
        return Graph(
            lambda: self._call("cuGraphLaunch", executable, self._stream),
            lambda: self._call("cuGraphExecDestroy", executable),
        )

    def close(self) -> None:
        """Free what is left and give the context back; for a device that can't go on, too."""
        self._lib.cuCtxPushCurrent_v2(self._context)
        for pointer in self._pinned:
            self._lib.cuMemFreeHost(pointer)
        self._pinned.clear()
        if self._stream:
            self._lib.cuStreamDestroy_v2(self._stream)
        if self._module:
            self._lib.cuModuleUnload(self._module)
        self._lib.cuCtxPopCurrent_v2(byref(c_void_p()))
        self._lib.cuDevicePrimaryCtxRelease_v2(self._device)
