"""The processor: physical cores, instruction sets, its name."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

__all__ = ["has_amx", "is_x86", "model", "physical_cores"]

_TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores() -> int:
    """Distinct physical cores among the CPUs of this process's affinity mask, at least 1.

    Two hyper-threads of a core share its multipliers: a second thread there slows matmuls down.
    Where the topology is not readable, every allowed CPU counts.
    """
    if not hasattr(os, "sched_getaffinity"):
        return max(1, os.cpu_count() or 1)
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        try:
            siblings = _TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def model() -> str:
    """The processor's model and feature flags, as the kernel gives them."""
    wanted = ("model name", "flags", "Features", "CPU part")
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return json.dumps(found, sort_keys=True) if found else platform.processor()


def is_x86() -> bool:
    """Whether this is a 64-bit x86 processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


def has_amx() -> bool:
    """Whether the kernel reports int8 tile instructions (Intel, from Sapphire Rapids on)."""
    try:
        return " amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
