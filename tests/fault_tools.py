"""What the fault tests share: the commands as children, small disks, ready features."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

__all__ = [
    "CLIP", "ROOT", "TINY", "batch_list", "command", "decoder_traps", "json_lines", "preloaded",
    "tiny_disk",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "examples" / "happy.mp4"
TINY = ROOT / "mse_runtime" / "data" / "bundles" / "tiny"


TRAPS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>
static void trap(const char *path) { /* as a decoder's bug would: in C, out of Python's reach */
  if (strstr(path, "hangs.mp4")) for (;;) pause();
  if (strstr(path, "crashes.mp4")) { signal(SIGSEGV, SIG_DFL); raise(SIGSEGV); }
}
#define TRAPPED(name) \
int name(const char *path, int flags, ...) { \
  static int (*real)(const char *, int, ...); \
  if (!real) real = dlsym(RTLD_NEXT, #name); \
  va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
  trap(path); \
  return real(path, flags, mode); \
}
TRAPPED(open)
TRAPPED(open64)
"""
"""Preloaded: the moment FFmpeg opens one of these names, its process hangs or dies."""


def decoder_traps(folder: Path) -> dict[str, str]:
    """The environment in which `hangs.mp4` and `crashes.mp4` do what they are called."""
    return preloaded(folder, TRAPS)


def preloaded(folder: Path, source: str) -> dict[str, str]:
    """The environment in which the C functions of `source` stand in for those of their names."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("no C compiler for a library to preload")
    shim = folder / "preloaded.so"
    subprocess.run(
        [compiler, "-x", "c", "-", "-shared", "-fPIC", "-o", str(shim), "-ldl"],
        input=source, text=True, check=True,
    )  # fmt: skip
    return {"LD_PRELOAD": str(shim)}


def command(
    *arguments: str | Path,
    env: Mapping[str, str | None] | None = None,
    before: str = "",
    name: str = "mse_run",
    cwd: Path = ROOT,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """A command by its entry point. `env`: changes, None removes; `before`: code to run first."""
    changed = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})}
    code = f"{before}\nfrom mse_runtime.entry import {name}; {name}()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        env={key: value for key, value in changed.items() if value is not None},
        capture_output=True, encoding="utf-8", errors="surrogateescape", cwd=cwd, timeout=240,
        check=False, **options,
    )  # fmt: skip


def batch_list(folder: Path, count: int) -> Path:
    """A list of `count` rows with ready features: no decoding, the same answer everywhere."""
    rng = np.random.default_rng(0)
    np.savez(
        folder / "f.npz",
        audio=rng.normal(size=(40, 13)).astype(np.float32),
        video=rng.normal(size=(10, 167)).astype(np.float32),
    )
    listing = folder / "list.csv"
    with listing.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["id", "features", "text"])
        table.writerows([f"r{i}", "f.npz", f"This is sentence number {i}."] for i in range(count))
    return listing


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@contextmanager
def tiny_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of `kib` KiB; the test is skipped by name where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=700", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("no file system may be mounted here; test_batch.py has RLIMIT_FSIZE instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
