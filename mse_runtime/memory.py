"""How much memory this process may still take, whoever sets the limit, and what it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mse_runtime.records import dataclass

__all__ = ["Measured", "available", "measured"]

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62
FILES = ("inactive_file", "active_file")
"""Of memory.stat: the page cache, without shared memory, as MemAvailable counts it too."""


def available() -> int:
    """Bytes: the least of the machine's (MemAvailable), the control groups' and the process's own
    limit (RLIMIT_AS, `ulimit -v`); 0 where nothing is known.
    """
    found = [room for room in (_machine(), _address_space(), *_groups()) if room is not None]
    return max(min(found), 1) if found else 0


@dataclass(frozen=True)
class Measured:
    """This process's memory in bytes."""

    peak_rss: int
    rss: int
    anonymous: int
    mapped: int


def measured() -> Measured:
    """Resident memory as the kernel counts it; zeros where /proc is missing."""
    found = {"VmHWM": 0, "VmRSS": 0, "RssAnon": 0, "RssFile": 0}
    try:
        for line in (PROC / "self" / "status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return Measured(found["VmHWM"], found["VmRSS"], found["RssAnon"], found["RssFile"])


def _machine() -> int | None:
    return _field(PROC / "meminfo", "MemAvailable:")


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _field(PROC / "self" / "status", "VmSize:")
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used


def _groups() -> Iterator[int]:
    """Room in each group above this process; what the kernel could reclaim counts as room."""
    lines: list[str] = []
    with suppress(OSError):
        lines = (PROC / "self" / "cgroup").read_text("utf-8").splitlines()
    for line in lines:
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds == "":
            root, prefix = CGROUPS, ""
            names = ("memory.max", "memory.current")
        elif "memory" in kinds.split(","):
            root, prefix = CGROUPS / "memory", "total_"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        limit_file, used_file = names
        # In a container the path may be the host's: then only the root is there to be read.
        inside = Path(path.lstrip("/"))
        for folder in (root / inside, *(root / parent for parent in inside.parents)):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None and limit < UNLIMITED:
                # A model that was read twice is active, and can be dropped like any file.
                cached = [_field(folder / "memory.stat", prefix + kind, 1) for kind in FILES]
                yield limit - used + sum(size or 0 for size in cached)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))  # "max" is no number
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str, unit: int = 1024) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text("utf-8").splitlines():
            if line.split()[0] == name:
                return int(line.split()[1]) * unit
    return None
