"""What every bench shares: statistics, records as JSON lines, turns, machine, command line.

A record is one JSON object: `machine` (first line of a run), `time` (a case's samples with median,
mean, standard deviation and spread), `ratio` (paired samples of two cases, with its demand) or
`value`. Times are seconds of wall clock. A record is `wide` where the middle half of its samples
spans more than a tenth of the median: on a busy machine believe the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import mmap
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [str(ROOT), str(ROOT / "export"), str(ROOT / "kernels")]
WIDE = 0.10
SHAPES = ("tiny", "qwen-1.8b", "chatglm3-6b", "llama2-7b")
LIBRARIES = ("llama_cpp_python", "onnxruntime", "numpy", "av", "torch", "transformers")

Record = dict[str, Any]
Samples = Sequence[float]
_always_small: set[Path] = set()
"""Files whose cached pages this kernel or file system maps one by one."""


def use_sources() -> None:
    """Let a checkout run without being installed."""
    for folder in PACKAGES:
        if folder not in sys.path:
            sys.path.append(folder)


use_sources()


def child_environment(**extra: str) -> dict[str, str]:
    """The environment of child processes: this checkout's packages, no network."""
    # An installed package is compiled: nobody waits for that at every start.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    known = [os.environ.get("PYTHONPATH", ""), *PACKAGES]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, known)),
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


# Statistics


def quartiles(samples: Samples) -> tuple[float, float]:
    """First and third quartile; linear between samples."""
    if len(samples) < 2:
        return samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


def describe(samples: Samples) -> Record:
    """median, avg, stddev, min, max, spread (middle half / median), wide, samples."""
    if not samples:
        raise ValueError("no samples")
    median = statistics.median(samples)
    first, third = quartiles(samples)
    spread = (third - first) / median if median else 0.0
    return {
        "median": median,
        "avg": statistics.fmean(samples),
        "stddev": statistics.stdev(samples) if len(samples) > 1 else 0.0,
        "min": min(samples),
        "max": max(samples),
        "spread": round(spread, 4),
        "wide": spread > WIDE,
        "n": len(samples),
        "samples": [round(x, 6) for x in samples],
    }


def timing(bench: str, case: str, samples: Samples, **about: Any) -> Record:
    """A `time` record: seconds."""
    return {"kind": "time", "bench": bench, "case": case, **about, **describe(samples)}


def ratio(
    bench: str, case: str, upper: Samples, lower: Samples, *, demand: str = "", **about: Any
) -> Record:
    """A `ratio` record from samples that were taken in the same turns; `demand` like "<= 1.05"."""
    pairs = [a / b for a, b in zip(upper, lower, strict=True)]
    found = {"kind": "ratio", "bench": bench, "case": case, **about, **describe(pairs)}
    found["of_minima"] = min(upper) / min(lower)
    return found | judged(found["median"], demand)


def value(
    bench: str, case: str, number: float, unit: str, *, demand: str = "", **about: Any
) -> Record:
    """A `value` record: something that is measured once, such as peak memory."""
    found = {"kind": "value", "bench": bench, "case": case, **about, "value": number, "unit": unit}
    return found | judged(number, demand)


def judged(number: float, demand: str) -> Record:
    """`demand` and whether `number` meets it; nothing for an empty demand."""
    if not demand:
        return {}
    sign, _, limit = demand.partition(" ")
    met = number <= float(limit) if sign == "<=" else number >= float(limit)
    return {"demand": demand, "met": met}


# Turns


def turns(
    cases: Mapping[str, Callable[[], float]],
    *,
    repeat: int = 7,
    seconds: float = 60.0,
    least: int = 3,
    pause: float = 0.02,
) -> dict[str, list[float]]:
    """Samples of every case, one call of each per turn; each case returns its own seconds.

    A turn to warm up comes first; every second turn runs backwards. Stops after `repeat` turns,
    or, once there are `least`, when `seconds` have passed. `pause` lets threads of the case before
    go to sleep.
    """
    for work in cases.values():
        work()
    samples: dict[str, list[float]] = {name: [] for name in cases}
    begun = time.perf_counter()
    for turn in range(repeat):
        if turn >= least and time.perf_counter() - begun > seconds:
            break
        order = list(cases.items())
        for name, work in order if turn % 2 == 0 else reversed(order):
            time.sleep(pause)
            samples[name].append(work())
    return samples


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# Machine


def machine() -> Record:
    """CPU, memory, GPU, load, versions and llama.cpp's build, as every run's first line."""
    from mse_runtime.backbone import library

    lib = library.load()
    return {
        "kind": "machine",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "cpu_info": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "ram_gb": round(_meminfo("MemTotal") / 1e9, 1),
        "gpu_info": gpus(),
        "load": round(os.getloadavg()[0], 2),
        "os": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := version(name))},
        "build": library.build_id(),
        "system": lib.llama_print_system_info().decode(errors="replace").strip(),
    }


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs; empty without a driver."""
    from mse_runtime.nvml import NvmlError, read

    try:
        return [device.name for device in read()[1]]
    except NvmlError:
        return []


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine_ready(folder: Path) -> None:
    """Have a bundle's GGUFs in the page cache, and as much free memory as their copy takes.

    A virtual machine gives both back to its host within seconds. Getting them again may take
    longer than everything else that a new process does, or no time at all: a throw of dice. Nor is
    it all one how the cache has a file: in large pieces where it was read in one go, page by page
    where it was written, or parts of it went and came again; that takes a process longer to map.
    """
    for path in folder.glob("*.gguf"):
        _read(path)
        if not _maps_large(path) and path not in _always_small:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            _read(path)
            if not _maps_large(path):
                _always_small.add(path)
        with mmap.mmap(-1, path.stat().st_size + (1 << 28)) as memory:
            for page in range(0, len(memory), mmap.PAGESIZE):
                memory[page] = 1


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        block = bytearray(1 << 23)
        while file.readinto(block):
            pass


def _maps_large(path: Path) -> bool:
    """Whether most of its cached pages are mapped in pieces of 2 MB; true where none can say."""
    if not hasattr(mmap, "MAP_POPULATE") or not path.stat().st_size:
        return True
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    with path.open("rb") as file, mmap.mmap(
        file.fileno(), 0, flags=flags, prot=mmap.PROT_READ
    ):  # fmt: skip
        sizes = dict(re.findall(r"^(Rss|FilePmdMapped):\s+(\d+) kB", _smaps(path), re.MULTILINE))
    if "FilePmdMapped" not in sizes:
        return True
    return 10 * int(sizes["FilePmdMapped"]) > 8 * int(sizes["Rss"])


def _smaps(path: Path) -> str:
    """What the kernel says of this process's mapping of a file."""
    text = Path("/proc/self/smaps").read_text("utf-8", "replace") if sys.platform == "linux" else ""
    _, _, found = text.partition(f" {path.resolve()}\n")
    return found.partition("VmFlags")[0]


def available_bytes() -> int:
    """Memory the kernel can give without swapping; 0 where it does not say."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# Command line and output


def parser(doc: str | None, *, shapes: Sequence[str] = ("tiny",)) -> argparse.ArgumentParser:
    """The options that all benches share."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--shapes",
        type=lambda text: text.split(","),
        default=list(shapes),
        metavar="A,B",
        help=f"backbones, of {', '.join(SHAPES)} (default {','.join(shapes)})",
    )
    made.add_argument(
        "--quants",
        type=lambda text: text.split(","),
        default=["q4_0"],
        metavar="A,B",
        help="quantisations of the synthetic backbones, e.g. q4_0,q4_k_m,q8_0 (default q4_0)",
    )
    made.add_argument("--threads", type=int, help="default: physical cores")
    made.add_argument("--repeat", type=int, default=7, help="turns of each case (default 7)")
    made.add_argument(
        "--seconds", type=float, default=60.0, help="no further turn after that long (default 60)"
    )
    made.add_argument("--quick", action="store_true", help="3 turns, the essential cases only")
    made.add_argument(
        "--bundles",
        type=Path,
        default=Path(os.environ.get("MSE_BENCH_BUNDLES", "/tmp/mse-bench")),
        help="where synthetic bundles are made and kept (default /tmp/mse-bench)",
    )
    made.add_argument("--out", type=Path, help="append the records to this file, as JSON lines")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, `--quick` applied."""
    args = made.parse_args(argv)
    if args.quick:
        args.repeat = min(args.repeat, 3)
    return args


class Writer:
    """Prints records as they come, and appends them to a file as JSON lines."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[Record] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, *records: Record) -> None:
        for record in records:
            record.setdefault("load", round(os.getloadavg()[0], 2))
            self.records.append(record)
            print(line(record), flush=True)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file."""
    return [json.loads(text) for text in path.read_text("utf-8").splitlines() if text.strip()]


def seconds(number: float) -> str:
    """0.0123 -> "12.3 ms"."""
    return f"{number * 1e3:.3g} ms" if number < 1 else f"{number:.2f} s"


def figure(record: Record) -> str:
    """A record's number for people, with a mark where its spread is wide."""
    if record["kind"] == "value":
        return f"{record['value']:.4g} {record['unit']}"
    shown = seconds(record["median"]) if record["kind"] == "time" else f"{record['median']:.3f} x"
    return shown + (" (wide)" if record.get("wide") else "")


def verdict(record: Record) -> str:
    """The demand and whether it is met; empty without one."""
    if "demand" not in record:
        return ""
    return f"{record['demand']}: {'met' if record['met'] else 'MISSED'}"


def line(record: Record) -> str:
    """One record as a line of text."""
    if record["kind"] == "machine":
        return f"{record['cpu_info']}, {record['cores']} cores, load {record['load']}"
    if record["kind"] == "note":
        return f"{record['bench']}: {record['text']}"
    where = " ".join(str(record[key]) for key in ("shape", "quant") if record.get(key))
    return f"{where:20} {record['case']:46} {figure(record):>18}  {verdict(record)}".rstrip()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    body = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body) + "\n"


def note(bench: str, text: str, **about: Any) -> Record:
    """A `note` record: what was not measured, and why."""
    return {"kind": "note", "bench": bench, **about, "text": text}
