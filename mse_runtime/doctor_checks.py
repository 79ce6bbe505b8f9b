"""What `mse-doctor` looks at. Every check is a function that yields findings and never raises
for a missing library; the heavy imports happen inside."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from mse_runtime import cache
from mse_runtime.errors import MSEError

__all__ = ["CHECKS", "Finding", "run_checks"]

Status = Literal["ok", "info", "warning", "error"]

AMX_FLAGS = "-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"
LIGHT_BUILD = "-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF"
CPU_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
ONNX_WHEELS = ("onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Finding:
    """One line of the report. "error": something needed is missing; `fix` is the command for it."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


def run_checks() -> dict[str, list[Finding]]:
    """Every group of findings; a check that fails unexpectedly becomes a finding itself."""
    report: dict[str, list[Finding]] = {}
    for group, check in CHECKS.items():
        found = report.setdefault(group, [])
        try:
            found.extend(check())
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            status: Status = "error" if isinstance(error, MSEError) else "warning"
            found.append(Finding("check", status, f"could not be finished ({text[:300]})"))
    return report


def machine() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", "ok", f"{platform.platform()}, {platform.machine()}")
    fields = _cpu_fields()
    flags = set(re.split(r"\s+", fields.get("flags") or fields.get("Features") or ""))
    known = [flag for flag in CPU_FLAGS if flag in flags]
    name = fields.get("model name") or platform.processor() or "unknown"
    yield Finding("CPU", "ok", f"{name}; {', '.join(known) or 'no known vector extension'}")
    cores = importlib.import_module("mse_runtime.cpu").physical_cores
    yield Finding("cores", "ok", f"{cores()} physical cores for this process: default threads")
    yield _memory()


def gpu() -> Iterator[Finding]:
    from mse_runtime.nvml import NvmlError, read

    try:
        driver, devices = read()
    except NvmlError as error:
        yield Finding("NVIDIA GPU", "info", f"none: {error}")
        return
    for device in devices:
        room = f"{device.free / 2**30:.1f} of {device.total / 2**30:.1f} GiB free"
        yield Finding("NVIDIA GPU", "ok", f"{device.name}, {room}, driver {driver}")
    if not devices:
        yield Finding("NVIDIA GPU", "info", f"driver {driver}, but no GPU is visible")


def libraries() -> Iterator[Finding]:
    yield Finding("mse-runtime", "ok", _version("mse-runtime") or "run from a source folder")
    for module, name in (
        ("numpy", "numpy"), ("av", "av"), ("PIL", "pillow"), ("click", "click"), ("rich", "rich"),
        ("safetensors", "safetensors"), ("gguf", "gguf"), ("huggingface_hub", "huggingface_hub"),
    ):  # fmt: skip
        yield _library(module, name)
    yield _library("matplotlib", "matplotlib", optional="--plot")
    if importlib.util.find_spec("opensmile"):
        yield Finding("opensmile", "ok", f"{_version('opensmile')}, non-commercial use only")
    else:
        use = "not installed; needed for egemaps25/1 only, and free for non-commercial use only"
        yield Finding("opensmile", "info", use, "pip install --no-deps opensmile")


def onnx_runtime() -> Iterator[Finding]:
    wheels = [name for name in ONNX_WHEELS if _version(name)]
    if len(wheels) > 1:
        yield Finding(
            "wheels",
            "error",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'mse-runtime[gpu]'"
            " (without a GPU: [cpu])",
        )
    try:
        runtime: Any = importlib.import_module("onnxruntime")
        providers = runtime.get_available_providers()
    except Exception as error:
        yield Finding(
            "onnxruntime",
            "error",
            f"cannot be imported ({_short(error)}); it runs the adapter and the face models",
            "pip install 'mse-runtime[cpu]' (with an NVIDIA GPU: [gpu])",
        )
        return
    names = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    yield Finding("onnxruntime", "ok", f"{runtime.__version__}; providers: {names}")


def llama_cpp() -> Iterator[Finding]:
    build = f'CMAKE_ARGS="{LIGHT_BUILD} {AMX_FLAGS}" pip install'
    rebuild = f"{build} --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
    wanted = f"'{_requirement('llama-cpp-python', '>=0.3.36,<0.4')}'"
    try:
        library: Any = importlib.import_module("mse_runtime.backbone.library")
        library.folder()
    except (MSEError, ImportError) as error:
        yield Finding("llama-cpp-python", "error", _short(error), f"{build} {wanted}")
        return
    try:
        probe = importlib.import_module("mse_runtime.probe").fast_path()
    except MSEError as error:
        yield Finding("fast path", "error", _short(error), rebuild + wanted)
        return
    how = "remembered from an earlier run" if probe.remembered else f"{probe.seconds:.1f} s"
    if probe.extra_bufts:
        yield Finding("fast path", "ok", f"used: the probe came back alive ({how})")
    else:
        yield Finding(
            "fast path", "warning", f"not used: {probe.outcome} ({how})", rebuild + wanted
        )
    bindings = library.load()
    version = _version("llama-cpp-python") or "version unknown"
    system = bindings.llama_print_system_info().decode(errors="replace")
    built = ", ".join(re.findall(r"(\w+) = 1", system))
    yield Finding("llama-cpp-python", "ok", f"{version}, build {library.build_id()} with {built}")
    types = ", ".join(library.mapped_types())
    by = f"by mse_kernels, {library.kernel()}: {types}" if types else "by llama.cpp"
    yield Finding("product of mapped weights", "ok", by)
    kernel = library.attention()
    yield Finding("attention", "ok", f"by mse_kernels, {kernel}" if kernel else "by llama.cpp")
    kinds = [f"{device.kind} {device.description}" for device in library.devices()]
    yield Finding("devices", "ok", "; ".join(kinds) or "the CPU")
    if not bindings.llama_supports_gpu_offload() and _has_gpu():
        yield Finding(
            "GPU offload",
            "warning",
            "there is an NVIDIA GPU, but llama.cpp was built without CUDA",
            rebuild.replace(LIGHT_BUILD, f"-DGGML_CUDA=ON {LIGHT_BUILD}") + wanted,
        )


def kernels() -> Iterator[Finding]:
    from mse_runtime.adapter import kernel_reasons

    for name, reason in kernel_reasons().items():
        fix = None
        if reason and name == "kernels-cpu":
            fix = "pip install --force-reinstall --no-deps mse-runtime (needs a C++ compiler)"
        detail = "can run" if reason is None else f"cannot run: {reason}"
        yield Finding(name, "ok" if reason is None else "info", detail, fix)
    from mse_runtime.adapter import auto as adapter_auto

    for fact in cache.read_json(adapter_auto.FILE).values():
        if isinstance(fact, dict) and {"adapter", "backend"} <= fact.keys():
            detail = f"{fact['adapter']}: {fact['backend']}: {fact.get('why', '')}"
            yield Finding("auto", "ok", detail)
        elif isinstance(fact, dict) and "trying" in fact:
            yield Finding(
                "auto",
                "warning",
                f"avoids {fact['trying']}: an earlier run ended while it tried it",
                f"rm {cache.cache_dir() / adapter_auto.FILE}",
            )


def bundles() -> Iterator[Finding]:
    from mse_runtime.bundle import load_bundle
    from mse_runtime.bundle.hub import builtin_bundles, resolve_bundle

    reinstall = "pip install --force-reinstall --no-deps mse-runtime"
    if not builtin_bundles():
        yield Finding("built-in", "error", "there is none", reinstall)
    for name in builtin_bundles():
        try:
            bundle = load_bundle(resolve_bundle(name), offline=True)
        except (MSEError, ImportError) as error:
            yield Finding(name, "error", f"does not load: {_short(error)}", reinstall)
            continue
        tasks = ", ".join(bundle.tasks)
        yield Finding(name, "ok", f"{bundle.version}, {bundle.training.status}; tasks: {tasks}")


def cache_folder() -> Iterator[Finding]:
    folder = cache.cache_dir()
    if cache.write_json("doctor.json", {"python": platform.python_version()}):
        (folder / "doctor.json").unlink(missing_ok=True)
        yield Finding("cache", "ok", f"{folder} can be written")
        return
    yield Finding(
        "cache",
        "warning",
        f"{folder} cannot be written: files are hashed and speeds measured on every start",
        "export MSE_CACHE=/a/folder/of/yours",
    )


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "machine": machine,
    "gpu": gpu,
    "libraries": libraries,
    "onnx runtime": onnx_runtime,
    "llama.cpp": llama_cpp,
    "adapter backends": kernels,
    "bundles": bundles,
    "cache": cache_folder,
}


def _library(module: str, name: str, optional: str = "") -> Finding:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken library may raise anything
        fix = f"pip install '{_requirement(name)}'"
        if optional:
            return Finding(name, "info", f"not installed; needed for {optional} only", fix)
        return Finding(name, "error", f"cannot be imported ({_short(error)})", fix)
    return Finding(name, "ok", _version(name) or "version unknown")


def _requirement(name: str, default: str = "") -> str:
    """The requirement as this package declares it, such as "av>=14.0"."""
    try:
        declared = metadata.requires("mse-runtime") or []
    except metadata.PackageNotFoundError:
        declared = []
    for line in declared:
        found = re.match(r"[\w.-]+", line)
        if found and found[0].lower().replace("_", "-") == name.lower().replace("_", "-"):
            return line.partition(";")[0].strip()
    return name + default


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _has_gpu() -> bool:
    from mse_runtime.nvml import NvmlError, read

    try:
        return bool(read()[1])
    except NvmlError:
        return False


def _memory() -> Finding:
    """Total and available memory, and the limit of the container if it is lower."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
        detail = (
            f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib['MemAvailable'] / 2**20:.1f} GiB available"
        )
    except (OSError, ValueError, KeyError, IndexError):
        return Finding("memory", "info", "unknown on this system")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit.isdigit() and int(limit) < kib["MemTotal"] * 1024:
            detail += f"; this process may use {int(limit) / 2**30:.1f} GiB"
    except OSError:
        pass
    return Finding("memory", "ok", detail)


def _cpu_fields() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty elsewhere."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return fields
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:397]}..."
