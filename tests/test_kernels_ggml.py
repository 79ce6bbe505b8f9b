"""The library that stands in for llama.cpp's functions: when it is loaded, and under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from make_fixtures import toy_gguf

from mse_kernels import ggml, mapped
from mse_runtime.backbone import library

SOURCES = Path(__file__).resolve().parent.parent / "kernels"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
UNITS = {
    "ggml_mapped": ("-DMSE_AVX_VNNI", "-DMSE_AVX512_VNNI", "-DMSE_AMX"),
    "ggml_q4_0_avx2": AVX2,
    "ggml_q4_0_avx2 ": (*AVX2, "-mavxvnni", "-DMSE_AVX_VNNI"),
    "ggml_q4_0_avx512": (*AVX2, *AVX512),
    "ggml_mapped_amx": (*AVX2, *AVX512),
    "ggml_attention": (),
    "ggml_attention_avx2": AVX2,
    "ggml_attention_avx512": (*AVX2, *AVX512),
    "ggml_threads": (),
    "ggml_opening": (),
    "tap": (),
    "reports": (),
    "strings": (),
}
NAMES = ggml.kernels()
pytestmark = pytest.mark.skipif(
    not NAMES, reason="no x86-64 with AVX2, no Linux, or the kernel library was not built"
)


def test_a_llama_cpp_that_was_loaded_before_keeps_its_own() -> None:
    code = (
        "import llama_cpp; from mse_runtime.backbone import library; library.load(); "
        "print(library.kernel())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr


def test_the_whole_package_imported_afterwards_takes_nothing_away(tmp_path: Path) -> None:
    """It also takes llama.cpp's log, which tells what was loaded."""
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    code = (
        "from mse_runtime.backbone import Backbone, library\n"
        "library.load(); import llama_cpp\n"
        f"with Backbone.open({str(path)!r}, threads=1) as model:\n"
        "    print(model.info['product'], *model.info['buffers_mib'], sep=';')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(f"mse_kernels, {NAMES[0]};"), done.stderr
    assert "CPU_Mapped model" in done.stdout


def test_without_the_instructions_or_llama_cpp_nothing_stands_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Without llama.cpp there the runtime does not even load ours.
    code = (
        "from mse_runtime.backbone import library\n"
        f"with library._faster_functions(library.Path({str(tmp_path)!r})): pass\n"
        "print(library._kernel, 'mse_ggml' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["None", "False"], done.stderr
    vnni = frozenset(ggml._AVX512)
    for flags, names in (
        (vnni, ("avx512_vnni", "avx2")),
        (vnni - {"avx512_vnni"}, ()),
        (frozenset(ggml._AVX2), ("avx2",)),
        (frozenset(ggml._AVX2) - {"f16c"}, ()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(ggml, "flags", lambda flags=flags: flags)
            assert ggml.kernels() == names
    monkeypatch.setattr(ggml, "flags", frozenset)
    assert ggml.preload.__wrapped__() is None
    assert mapped.settle(library.folder()) is None
    monkeypatch.undo()
    assert mapped.settle(library.folder()) == NAMES[0]


def test_what_llama_cpp_calls_under_the_sanitizers(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    base = ["c++", "-std=c++17", "-O1", "-g", "-w", "-pthread", "-fsanitize=address,undefined"]
    base.append("-fno-sanitize-recover=all")

    def compiled(unit: tuple[str, tuple[str, ...]]) -> str:
        out = tmp_path / f"{unit[0].replace(' ', '_')}.o"
        source = SOURCES / "src" / f"{unit[0].strip()}.cpp"
        subprocess.run([*base, *unit[1], "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, UNITS.items()))
    program = tmp_path / "ggml"
    check = str(SOURCES / "checks" / "ggml.cpp")
    subprocess.run([*base, check, *objects, "-o", str(program)], check=True)
    numbers = [str(ggml.KERNELS[name][0]) for name in NAMES]
    done = subprocess.run([str(program), "300", "1", *numbers], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{4 * 300 * len(NAMES)} products" in done.stdout  # one thread, then three
