"""The C ABI under random shapes (kernels/checks/fuzz.cpp), built afresh with sanitizers.

The same program, cross-compiled, runs the NEON path where an aarch64 compiler and qemu are there.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_cases import builds_tiles, cxx

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
COMMON = ("abi", "dispatch", "forward", "model", "pack", "threads", "isa_scalar")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
X86 = platform.machine().lower() in ("x86_64", "amd64")


def build(
    folder: Path, compiler: str, options: Sequence[str], units: dict[str, Sequence[str]]
) -> Path:
    """Compile fuzz.cpp and the library's sources; units: name -> flags of its own."""
    base = (compiler, "-std=c++17", "-ffp-contract=off", "-pthread", "-w", *options)

    def compile_one(item: tuple[Path, Sequence[str]]) -> str:
        source, flags = item
        out = folder / f"{source.stem}.o"
        command = [*base, *flags, "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return str(out)

    sources = [(KERNELS / "src" / f"{name}.cpp", flags) for name, flags in units.items()]
    sources.append((KERNELS / "checks" / "fuzz.cpp", ()))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    out = folder / "fuzz"
    subprocess.run([*base, *objects, "-o", str(out)], check=True, capture_output=True, text=True)
    return out


def fuzz(command: Sequence[str], rounds: int, seed: int) -> str:
    done = subprocess.run(
        [*command, str(rounds), str(seed)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def native_units() -> tuple[dict[str, Sequence[str]], tuple[str, ...]]:
    units: dict[str, Sequence[str]] = dict.fromkeys(COMMON, ())
    if X86:
        units |= {"isa_avx2": AVX2, "isa_avx512": AVX512}
        if builds_tiles():  # sanitizers do not see the bounds of their loads
            return {**units, "isa_amx": AVX512}, ("-DMSE_X86", "-DMSE_AMX")
        return units, ("-DMSE_X86",)
    return {**units, "isa_neon": ()}, ("-DMSE_NEON",)


@pytest.mark.parametrize(
    ("kind", "rounds"), [("address,undefined", 12), ("thread", 4)], ids=["asan-ubsan", "tsan"]
)
def test_sanitizers(kind: str, rounds: int, tmp_path: Path) -> None:
    compiler = cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    units, defines = native_units()
    options = ("-O1", "-g1", f"-fsanitize={kind}", "-fno-sanitize-recover=all", *defines)
    program = build(tmp_path, compiler, options, units)
    assert fuzz([str(program)], rounds, 1).startswith(f"ok: {rounds} rounds on")


def test_without_any_compiler_feature_the_scalar_path_is_left(tmp_path: Path) -> None:
    compiler = cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = build(tmp_path, compiler, ("-O1",), dict.fromkeys(COMMON, ()))
    assert fuzz([str(program)], 3, 2).strip() == "ok: 3 rounds on scalar"


def test_neon_under_emulation(tmp_path: Path) -> None:
    compiler, qemu = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or qemu is None:
        pytest.skip("no aarch64 cross compiler with qemu (g++-aarch64-linux-gnu, qemu-user)")
    units: dict[str, Sequence[str]] = dict.fromkeys((*COMMON, "isa_neon"), ())
    program = build(tmp_path, compiler, ("-O2", "-static", "-DMSE_NEON"), units)
    assert fuzz([qemu, str(program)], 6, 3).strip() == "ok: 6 rounds on neon scalar"
