"""Our product of Q4_0 weights in llama.cpp's place, against llama.cpp's and against plain NumPy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_fixtures import toy_gguf

from mse_kernels import ggml
from mse_runtime.backbone import Backbone, library

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
UNITS = {
    "ggml_q4_0": ("-DMSE_AVX_VNNI", "-DMSE_AVX512_VNNI"),
    "ggml_q4_0_avx2": AVX2,
    "ggml_q4_0_avx2 ": (*AVX2, "-mavxvnni", "-DMSE_AVX_VNNI"),
    "ggml_q4_0_avx512": (*AVX2, *AVX512),
    "ggml_mapped": ("-DMSE_AMX",),
    "ggml_mapped_amx": (*AVX2, *AVX512),
    "tap": (),
    "reports": (),
}
NAMES = ggml.kernels()
pytestmark = pytest.mark.skipif(
    not NAMES, reason="no x86-64 with AVX2, no Linux, or the kernel library was not built"
)
FOLDER = library.folder()


@pytest.fixture(autouse=True)
def ours_afterwards() -> Iterator[None]:
    yield
    ggml.use(NAMES[0], FOLDER)


def operands(blocks: int, groups: int, eights: int, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    weights, rows = (
        np.zeros((eights, blocks), ggml.WEIGHTS),
        np.zeros((groups, blocks), ggml.ACTIVATIONS),
    )
    weights["scale"] = rng.standard_normal(weights["scale"].shape)
    weights["values"] = rng.integers(0, 256, weights["values"].shape)
    rows["scale"] = rng.standard_normal(rows["scale"].shape)
    rows["values"] = rng.integers(-128, 128, rows["values"].shape)
    return weights, rows


def ours(name: str, weights: Any, rows: Any) -> np.ndarray:
    ggml.use(name, FOLDER)
    return ggml.product(ggml._GEMM((ggml.SYMBOL, ggml.preload())), weights, rows)


def plain(weights: Any, rows: Any) -> np.ndarray:
    """[M, N] in float64, from the layouts as ggml interleaves them."""
    eights, blocks = weights.shape
    nibbles = weights["values"].reshape(eights, blocks, 2, 8, 8).astype(np.int64)
    both = np.stack([nibbles & 15, nibbles >> 4], axis=2)  # low halves come first
    signed = np.where(both < 8, both, both - 16)  # stored with the sign bit flipped
    w = signed.transpose(0, 4, 1, 2, 3, 5).reshape(eights * 8, blocks, 32)
    a = rows["values"].reshape(len(rows), blocks, 4, 4, 8).astype(np.int64)
    a = a.transpose(0, 3, 1, 2, 4).reshape(len(rows) * 4, blocks, 32)
    dots = np.einsum("mbk,nbk->mnb", a, w).astype(np.float64)
    by_column = weights["scale"].astype(np.float64).transpose(0, 2, 1).reshape(eights * 8, blocks)
    by_row = rows["scale"].astype(np.float64).transpose(0, 2, 1).reshape(len(rows) * 4, blocks)
    return np.einsum("mnb,nb,mb->mn", dots, by_column, by_row)


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
def test_the_product_is_the_plain_one(
    name: str, blocks: int, groups: int, eights: int, seed: int
) -> None:
    weights, rows = operands(blocks, groups, eights, seed)
    expected = plain(weights, rows)
    scale = 1 + np.abs(expected).max()
    assert np.abs(ours(name, weights, rows) - expected).max() <= 1e-5 * scale
    theirs = ggml.product(ggml.theirs(FOLDER), weights, rows)
    assert np.abs(theirs - expected).max() <= 1e-4 * scale


@pytest.mark.parametrize("name", NAMES)
def test_sums_at_the_ends_of_their_ranges(name: str) -> None:
    weights, rows = operands(3, 2, 1, 0)
    for nibbles in (0x00, 0x88, 0x77, 0xFF):
        for value in (-128, 127):
            weights["values"], rows["values"] = nibbles, value
            expected = plain(weights, rows)
            found = ours(name, weights, rows)
            assert np.abs(found - expected).max() <= 1e-5 * (1 + np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str) -> None:
    weights, rows = operands(21, 19, 3, 0)
    together = ours(name, weights, rows)
    alone = [ours(name, weights, rows[i : i + 1]) for i in range(19)]
    assert np.array_equal(together, np.concatenate(alone))
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: ours(name, weights, rows), range(16)))
    assert all(np.array_equal(one, together) for one in again)


def test_llama_cpp_calls_ours_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "mapped_types", lambda: ())  # else nothing is repacked for ours
    assert library.q4_0_product() == f"mse_kernels, {NAMES[0]}"  # loaded so in conftest.py
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    logits, counts = [], []
    with Backbone.open(path, threads=2, extra_bufts=True) as backbone:
        assert backbone.info["product"] == f"mse_kernels, {NAMES[0]}"
        for kernel in (*NAMES, None):
            ggml.use(kernel, FOLDER)
            before = ggml.calls()
            backbone.clear()
            logits.append(backbone.prefill(np.arange(30)))
            counts.append(ggml.calls() - before)
    assert all(counts[:-1])
    assert counts[-1] == 0
    for found in logits[:-1]:
        assert np.abs(found - logits[-1]).max() <= 1e-4 * np.abs(logits[-1]).max()


def test_a_llama_cpp_that_was_loaded_before_keeps_its_own() -> None:
    code = (
        "import llama_cpp; from mse_runtime.backbone import library; library.load(); "
        "print(library.q4_0_product())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "llama.cpp", done.stderr


def test_the_whole_package_imported_afterwards_takes_nothing_away(tmp_path: Path) -> None:
    """It also takes llama.cpp's log, which tells what was repacked."""
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    code = (
        "from mse_runtime.backbone import Backbone, library\n"
        "library.load(); library.mapped_types = lambda: (); import llama_cpp\n"
        f"with Backbone.open({str(path)!r}, threads=1, extra_bufts=True) as model:\n"
        "    print(model.info['product'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"mse_kernels, {NAMES[0]}", done.stderr


def test_another_layout_is_left_to_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later llama.cpp might do: the sample tells."""
    real = ggml.theirs(FOLDER)

    def other(n: int, out: int, stride: int, w: int, a: int, rows: int, columns: int) -> None:
        real(n, out, stride, a, a, rows, columns)

    monkeypatch.setattr(ggml, "theirs", lambda *_, **__: ggml._GEMM(other))
    assert not ggml.settle(FOLDER)
    before = ggml.calls()
    by_name = ggml._GEMM((ggml.SYMBOL, ggml.preload()))
    ggml.product(by_name, *operands(2, 2, 3, 0))
    assert ggml.calls() == before
    monkeypatch.undo()
    assert ggml.settle(FOLDER)


def test_without_the_instructions_or_the_function_nothing_stands_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not ggml.settle(tmp_path)  # no llama.cpp there
    # Then the runtime does not even load ours.
    code = (
        "from mse_runtime.backbone import library\n"
        f"with library._faster_products(library.Path({str(tmp_path)!r})): pass\n"
        "print(library.q4_0_product(), 'mse_ggml' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["llama.cpp", "False"], done.stderr
    with monkeypatch.context() as patch:
        patch.setattr(ggml, "flags", lambda: frozenset(ggml.AVX512) - {"avx512_vnni"})
        assert ggml.kernels() == ()
        patch.setattr(ggml, "flags", lambda: frozenset(ggml._AVX2))
        assert ggml.kernels() == ("avx2",)
    with monkeypatch.context() as patch:
        patch.setattr(ggml, "KERNELS", {"avx2": (1, ("avx2", "another"))})
        assert ggml.kernels() == ()
        assert ggml.preload.__wrapped__() is None


def test_what_llama_cpp_calls_under_the_sanitizers(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    base = ["c++", "-std=c++17", "-O1", "-g", "-w", "-fsanitize=address,undefined"]
    base.append("-fno-sanitize-recover=all")

    def compiled(unit: tuple[str, tuple[str, ...]]) -> str:
        out = tmp_path / f"{unit[0].replace(' ', '_')}.o"
        source = KERNELS / "src" / f"{unit[0].strip()}.cpp"
        subprocess.run([*base, *unit[1], "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, UNITS.items()))
    program = tmp_path / "ggml"
    check = str(KERNELS / "checks" / "ggml.cpp")
    subprocess.run([*base, check, *objects, "-o", str(program)], check=True)
    numbers = [str(ggml.KERNELS[name][0]) for name in NAMES]
    done = subprocess.run([str(program), "300", "1", *numbers], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{300 * len(NAMES)} products" in done.stdout
