"""Compile `fusion.cu` for every target with NVRTC, with no GPU, driver or CUDA toolkit.

    pip install nvidia-cuda-nvrtc-cu12
    python -m mse_kernels._build_cubins        # writes mse_kernels/cubin/

NVRTC of the 12 series, so that drivers of the 12 and the 13 series load the result. A GPU whose own
target is missing takes the cubin of its family with a lower minor version, or the PTX.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["PTX_TARGET", "TARGETS", "Usage", "build", "compile_source", "load_nvrtc", "source_path"]

TARGETS = (75, 80, 86, 89, 90, 100, 103, 120)
PTX_TARGET = 75
OPTIONS = ("--std=c++17", "--fmad=true", "--ptxas-options=-v")
FOLDER = Path(__file__).parent / "cubin"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one target: registers per thread, bytes of spills and stack."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


def source_path() -> Path:
    """`fusion.cu` of the source tree; a wheel ships what was built from it."""
    return Path(__file__).resolve().parent.parent / "src" / "fusion.cu"


def source_hash(path: Path) -> str:
    """sha256 of the source and the compiler's options."""
    text = path.read_text(encoding="utf-8") + "\n" + "\n".join(OPTIONS)
    return hashlib.sha256(text.encode()).hexdigest()


def _candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        lib = Path(folder) / "cuda_nvrtc"
        yield from (str(p) for p in sorted(lib.glob("lib/libnvrtc.so.12*")))
        yield from (str(p) for p in sorted(lib.glob("bin/nvrtc64_12*.dll")))
    yield "libnvrtc.so.12"


def load_nvrtc() -> ctypes.CDLL:
    """The NVRTC library of the wheel, or of the system; OSError says how to get it."""
    for name in _candidates():
        if "builtins" in name or ".alt." in name:
            continue
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        lib.nvrtcGetErrorString.restype = c_char_p
        program = [c_void_p]
        lib.nvrtcCreateProgram.argtypes = [
            POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p,
        ]  # fmt: skip
        lib.nvrtcCompileProgram.argtypes = [c_void_p, c_int, POINTER(c_char_p)]
        for what in ("CUBIN", "PTX", "ProgramLog"):
            getattr(lib, f"nvrtcGet{what}Size").argtypes = [*program, POINTER(c_size_t)]
            getattr(lib, f"nvrtcGet{what}").argtypes = [*program, c_char_p]
        lib.nvrtcDestroyProgram.argtypes = [POINTER(c_void_p)]
        return lib
    raise OSError("NVRTC 12 is not installed; run `pip install nvidia-cuda-nvrtc-cu12`")


def _read(lib: ctypes.CDLL, program: c_void_p, what: str) -> bytes:
    size = c_size_t()
    getattr(lib, f"nvrtcGet{what}Size")(program, byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw[: size.value]


def compile_source(
    lib: ctypes.CDLL, source: bytes, target: int, *, ptx: bool = False
) -> tuple[bytes, dict[str, Usage]]:
    """(image, kernel name -> Usage) of `source` for sm_`target`, or its PTX (usage empty)."""
    program = c_void_p()
    lib.nvrtcCreateProgram(byref(program), source, b"fusion.cu", 0, None, None)
    try:
        kind = "compute" if ptx else "sm"
        options = [f"--gpu-architecture={kind}_{target}", *OPTIONS[: 2 if ptx else 3]]
        array = (c_char_p * len(options))(*(o.encode() for o in options))
        code = lib.nvrtcCompileProgram(program, len(options), array)
        log = _read(lib, program, "ProgramLog").rstrip(b"\0").decode()
        if code != 0:
            raise RuntimeError(f"NVRTC refused sm_{target}: {log}")
        if ptx:
            return _read(lib, program, "PTX"), {}
        return _read(lib, program, "CUBIN"), parse_usage(log)
    finally:
        lib.nvrtcDestroyProgram(byref(program))


def parse_usage(log: str) -> dict[str, Usage]:
    """Kernels and their resources from the assembler's verbose log."""
    out: dict[str, Usage] = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]

        def number(pattern: str, text: str = part) -> int:
            found = re.search(pattern, text)
            return int(found.group(1)) if found else 0

        out[name] = Usage(
            registers=number(r"Used (\d+) registers"),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
            stack=number(r"(\d+) bytes stack frame"),
            shared=number(r"(\d+) bytes smem"),
        )
    return out


def _packed(image: bytes) -> bytes:
    # mtime 0: the same source gives the same files.
    return gzip.compress(image, 9, mtime=0)


def version(lib: ctypes.CDLL) -> str:
    """NVRTC's version, "12.9"."""
    major, minor = c_int(), c_int()
    lib.nvrtcVersion(byref(major), byref(minor))
    return f"{major.value}.{minor.value}"


def build(folder: Path = FOLDER) -> dict[str, Any]:
    """Write every target's cubin, the PTX and `index.json`; returns the index."""
    lib = load_nvrtc()
    source = source_path().read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "source_sha256": source_hash(source_path()),
        "nvrtc": version(lib),
        "images": {},
    }
    for target in TARGETS:
        image, usage = compile_source(lib, source, target)
        name = f"fusion.sm_{target}.cubin.gz"
        (folder / name).write_bytes(_packed(image))
        index["images"][str(target)] = {
            "file": name,
            "sha256": hashlib.sha256(image).hexdigest(),
            "kernels": {kernel: asdict(u) for kernel, u in usage.items()},
        }
    image, _ = compile_source(lib, source, PTX_TARGET, ptx=True)
    (folder / "fusion.ptx.gz").write_bytes(_packed(image.rstrip(b"\0")))
    index["ptx"] = {"file": "fusion.ptx.gz", "target": PTX_TARGET}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


if __name__ == "__main__":
    for target, image in build()["images"].items():
        for kernel, use in image["kernels"].items():
            print(f"sm_{target} {kernel}: {use}", file=sys.stdout)
