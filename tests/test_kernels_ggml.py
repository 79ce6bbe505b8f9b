"""Our product of Q4_0 weights in llama.cpp's place, against llama.cpp's and against plain NumPy."""

from __future__ import annotations

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
BUILD = (
    *("-std=c++17", "-O1", "-g", "-w", "-fsanitize=address,undefined"),
    *("-fno-sanitize-recover=all", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mavx512vnni", "-mavx2", "-mfma", "-mf16c"),
)
pytestmark = pytest.mark.skipif(
    library.q4_0_product() != "mse_kernels",  # loaded in conftest.py
    reason="no AVX-512 VNNI here, or the kernel library was not built",
)
FOLDER = library.folder() if library.q4_0_product() == "mse_kernels" else Path()


@pytest.fixture(autouse=True)
def ours_afterwards() -> Iterator[None]:
    yield
    ggml.use(True, FOLDER)


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


@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 6), st.integers(0, 99))
def test_the_product_is_the_plain_one(blocks: int, groups: int, eights: int, seed: int) -> None:
    weights, rows = operands(blocks, groups, eights, seed)
    own = ggml._GEMM(("mse_ggml_gemm_q4_0", ggml.preload()))
    found, expected = ggml.product(own, weights, rows), plain(weights, rows)
    assert np.abs(found - expected).max() <= 1e-5 * (1 + np.abs(expected).max())
    theirs = ggml.product(ggml.theirs(FOLDER), weights, rows)
    assert np.abs(theirs - expected).max() <= 1e-4 * (1 + np.abs(expected).max())


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    own = ggml._GEMM(("mse_ggml_gemm_q4_0", ggml.preload()))
    weights, rows = operands(5, 7, 3, 0)
    together = ggml.product(own, weights, rows)
    alone = [ggml.product(own, weights, rows[i : i + 1]) for i in range(7)]
    assert np.array_equal(together, np.concatenate(alone))
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: ggml.product(own, weights, rows), range(16)))
    assert all(np.array_equal(one, together) for one in again)


def test_llama_cpp_calls_ours_by_name(tmp_path: Path) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    logits, counts = [], []
    with Backbone.open(path, threads=2, extra_bufts=True) as backbone:
        assert backbone.info["q4_0"] == "mse_kernels"
        for own in (True, False):
            ggml.use(own, FOLDER)
            before = ggml.calls()
            backbone.clear()
            logits.append(backbone.prefill(np.arange(30)))
            counts.append(ggml.calls() - before)
    assert counts[0] > 0
    assert counts[1] == 0
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4 * np.abs(logits[1]).max()


def test_a_llama_cpp_that_was_loaded_before_keeps_its_own() -> None:
    code = (
        "import llama_cpp; from mse_runtime.backbone import library; library.load(); "
        "print(library.q4_0_product())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "llama.cpp", done.stderr


def test_another_layout_is_left_to_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later llama.cpp might do: the sample tells."""
    real = ggml.theirs(FOLDER)

    def other(n: int, out: int, stride: int, w: int, a: int, rows: int, columns: int) -> None:
        real(n, out, stride, a, a, rows, columns)

    monkeypatch.setattr(ggml, "theirs", lambda _: ggml._GEMM(other))
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
    monkeypatch.setattr(ggml, "_FLAGS", ("avx512f", "another"))
    assert not ggml._suits()
    assert ggml.preload.__wrapped__() is None


def test_what_llama_cpp_calls_under_the_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "ggml"
    sources = [KERNELS / "checks" / "ggml.cpp", *(KERNELS / "src").glob("ggml_q4_0.cpp")]
    sources.append(KERNELS / "src" / "tap.cpp")
    subprocess.run(["c++", *BUILD, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "300", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "300 products" in done.stdout
