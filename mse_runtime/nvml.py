"""NVIDIA GPUs and their memory through the driver's own library (NVML); nothing to install."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

__all__ = ["GpuDevice", "NvmlError", "read"]

LIBRARY = "libnvidia-ml.so.1"
NAME_BYTES = 96


class NvmlError(Exception):
    """Why there is no answer; for people to read."""


@dataclass(frozen=True)
class GpuDevice:
    """A GPU; memory in bytes."""

    name: str
    total: int
    free: int


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def read() -> tuple[str, list[GpuDevice]]:
    """The driver's version and every GPU. Raises `NvmlError` without a working driver.

    `CUDA_VISIBLE_DEVICES` is not applied, except that an empty one hides every GPU.
    """
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError:
        raise NvmlError(f"there is no NVIDIA driver ({LIBRARY} is not installed)") from None
    code = nvml.nvmlInit_v2()
    if code:
        raise NvmlError(f"the NVIDIA driver does not answer (NVML error {code})")
    try:
        version = ctypes.create_string_buffer(NAME_BYTES)
        _call(nvml.nvmlSystemGetDriverVersion, version, NAME_BYTES)
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            return version.value.decode(), []
        count = ctypes.c_uint()
        _call(nvml.nvmlDeviceGetCount_v2, ctypes.byref(count))
        return version.value.decode(), [_device(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()


def _device(nvml: Any, index: int) -> GpuDevice:
    handle, memory = ctypes.c_void_p(), _Memory()
    name = ctypes.create_string_buffer(NAME_BYTES)
    _call(nvml.nvmlDeviceGetHandleByIndex_v2, index, ctypes.byref(handle))
    _call(nvml.nvmlDeviceGetName, handle, name, NAME_BYTES)
    _call(nvml.nvmlDeviceGetMemoryInfo, handle, ctypes.byref(memory))
    return GpuDevice(name.value.decode(errors="replace"), memory.total, memory.free)


def _call(function: Any, *arguments: Any) -> None:
    code = function(*arguments)
    if code:
        raise NvmlError(f"the NVIDIA driver refused a question (NVML error {code})")
