"""Our product of weights as the file has them, against NumPy on dequantised weights."""

from __future__ import annotations

import ctypes
import mmap
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
from numpy.typing import NDArray

from mse_kernels import ggml, mapped, theirs
from mse_runtime.backbone import Backbone, library
from mse_runtime.backbone.file_checks import repacking_pays
from mse_runtime.gguf import Gguf
from mse_runtime.probe_model import N_VOCAB, write_probe_model

quants = pytest.importorskip("gguf.quants")

FOLDER = library.folder()
library.load()
TYPES = tuple(mapped.TYPES)
KERNELS = ggml.kernels()
CASES = [(kernel, name) for kernel in KERNELS for name in mapped.types_of(kernel, FOLDER)]
BEST = KERNELS[0] if KERNELS else None
Bytes = NDArray[np.uint8]
pytestmark = pytest.mark.skipif(
    not KERNELS, reason="no x86-64 with AVX2, no Linux, or the kernel library was not built"
)
every_case = pytest.mark.parametrize(("kernel", "name"), CASES)
tiles = pytest.mark.skipif("amx" not in KERNELS, reason="no AMX tiles")


@pytest.fixture(autouse=True)
def ours_afterwards() -> Iterator[None]:
    yield
    mapped.use(BEST, FOLDER)


def ours(kernel: str, name: str, weights: Bytes, rows: Bytes, threads: int = 1) -> Any:
    """The product [M, N] by a kernel."""
    mapped.use(kernel, FOLDER)
    return mapped.product(mapped.ours(), name, weights, rows, threads)


def random_weights(name: str, columns: int, blocks: int, seed: int) -> Bytes:
    rng = np.random.default_rng(seed)
    _, _, size, _ = mapped.TYPES[name]
    made = rng.integers(0, 256, (columns, blocks, size)).astype(np.uint8)
    for at in mapped._SCALES.get(size, (0,)):
        scales = rng.standard_normal((columns, blocks, 1)).astype("<f2")
        made[..., at : at + 2] = scales.view(np.uint8)
    return made.reshape(columns, -1)


def random_rows(name: str, count: int, blocks: int, seed: int) -> tuple[Bytes, NDArray[np.float64]]:
    """As ggml stores them, and their values [count, depth]."""
    rng = np.random.default_rng(seed + 1)
    _, _, _, (_, depth, size) = mapped.TYPES[name]
    values = rng.integers(-127, 128, (count, blocks, depth)).astype(np.int8)
    made = np.zeros((count, blocks, size), np.uint8)
    if depth == 32:
        scale = rng.standard_normal((count, blocks, 1)).astype("<f2")
        made[..., :2], made[..., 2:] = scale.view(np.uint8), values.view(np.uint8)
    else:
        scale = rng.standard_normal((count, blocks, 1)).astype("<f4")
        sums = values.reshape(count, blocks, 16, 16).sum(-1).astype("<i2")
        made[..., :4], made[..., 4:260] = scale.view(np.uint8), values.view(np.uint8)
        made[..., 260:] = sums.view(np.uint8)
    exact = values * scale.astype(np.float64)
    return made.reshape(count, -1), exact.reshape(count, -1)


def plain(name: str, weights: Bytes, rows: NDArray[np.float64]) -> tuple[Any, Any]:
    """[M, N] in float64, and the sum of the absolute products."""
    kind = quants.GGMLQuantizationType[name]
    w = quants.dequantize(weights, kind).astype(np.float64)
    return rows @ w.T, np.abs(rows) @ np.abs(w).T


def close(found: Any, expected: Any, size: Any) -> bool:
    return bool((np.abs(found - expected) <= 2e-6 * size + 1e-6).all())


@every_case
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 80), st.integers(1, 4), st.integers())
def test_the_product_is_the_plain_one(
    kernel: str, name: str, strips: int, blocks: int, count: int, threads: int, seed: int
) -> None:
    seed = abs(seed) % 1000
    blocks *= 8 if seed % 2 and name in ("Q4_0", "Q5_0", "Q8_0") else 1
    weights = random_weights(name, 16 * strips, blocks + seed % 3, seed)
    rows, values = random_rows(name, count, blocks + seed % 3, seed)
    expected, size = plain(name, weights, values)
    assert close(ours(kernel, name, weights, rows, threads), expected, size)


@every_case
@pytest.mark.parametrize("byte", [0x00, 0x88, 0x7F, 0x81, 0xFF])
def test_weights_at_the_ends_of_their_ranges(kernel: str, name: str, byte: int) -> None:
    scaled = random_weights(name, 16, 3, 0)
    weights = np.full_like(scaled, byte).reshape(16, 3, -1)
    for at in mapped._SCALES.get(mapped.TYPES[name][2], (0,)):
        weights[..., at : at + 2] = scaled.reshape(weights.shape)[..., at : at + 2]
    weights = weights.reshape(16, -1)
    rows, values = random_rows(name, 3, 3, 0)
    expected, size = plain(name, weights, values)
    assert close(ours(kernel, name, weights, rows), expected, size)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("byte", [0x00, 0x88, 0xFF])
@pytest.mark.parametrize("value", [-128, 127])
def test_sums_of_q4_0_at_the_ends_of_their_ranges(kernel: str, byte: int, value: int) -> None:
    """Products are added in 16 bits where there is no VNNI."""
    weights, rows = np.full((16, 54), byte, np.uint8), np.full((5, 102), value, np.int8)
    half = np.array([1.0], "<f2").view(np.uint8)
    for array, size in ((weights, 18), (rows.view(np.uint8), 34)):
        array.reshape(len(array), -1, size)[..., :2] = half
    expected = 96.0 * value * ((byte & 15) - 8)
    assert (ours(kernel, "Q4_0", weights, rows.view(np.uint8)) == expected).all()


@every_case
def test_a_row_does_not_depend_on_the_rows_beside_it(kernel: str, name: str) -> None:
    weights, (rows, _) = random_weights(name, 48, 37, 0), random_rows(name, 90, 37, 0)
    together = ours(kernel, name, weights, rows)
    some = [ours(kernel, name, weights, rows[i : i + 5]) for i in range(0, 90, 5)]
    assert np.array_equal(together, np.concatenate(some))
    with ThreadPoolExecutor(4) as pool:
        again = list(
            pool.map(lambda n: mapped.product(mapped.ours(), name, weights, rows, n + 1), range(4))
        )
    assert all(np.array_equal(one, together) for one in again)


@every_case
def test_threads_that_share_a_product_do_all_of_it(kernel: str, name: str) -> None:
    """At once, as llama.cpp's: whoever comes late may find nothing left."""
    weights, (rows, _) = random_weights(name, 16 * 37, 3, 0), random_rows(name, 20, 3, 0)
    expected = ours(kernel, name, weights, rows)
    number, _, size, (rows_number, _, rows_size) = mapped.TYPES[name]
    blocks, function = weights.shape[1] // size, mapped.ours()
    out = np.empty_like(expected)

    def share(thread: int) -> bool:
        params = mapped._Params(thread, 3)
        return bool(
            function(
                ctypes.addressof(params), len(weights), len(rows), blocks, weights.ctypes.data,
                blocks, rows.ctypes.data, rows.shape[1] // rows_size, out.ctypes.data,
                len(weights), number, rows_number, 0,
            )
        )  # fmt: skip

    with ThreadPoolExecutor(3) as pool:
        for _ in range(50):  # the same place for the result each time
            out[:] = np.nan
            assert all(pool.map(share, range(3)))
            assert np.array_equal(out, expected)


@every_case
def test_nothing_is_read_beyond_weights_and_rows(kernel: str, name: str) -> None:
    """The last byte is the last one of a page, and the next page may not be read."""
    weights, (rows, values) = random_weights(name, 32, 3, 1), random_rows(name, 17, 3, 1)
    fenced = [_fenced(array) for array in (weights, rows)]
    found = ours(kernel, name, fenced[0][1], fenced[1][1])
    assert close(found, *plain(name, weights, values))


def _fenced(array: Bytes) -> tuple[mmap.mmap, Bytes]:
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    copy = np.frombuffer(pages, np.uint8, array.nbytes, size - array.nbytes).reshape(array.shape)
    copy[:] = array
    end = copy.ctypes.data + array.nbytes
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return pages, copy


def test_what_ours_has_not_goes_on_to_llama_cpp() -> None:
    rows, values = random_rows("Q4_0", 5, 4, 0)
    before = mapped.calls()
    odd = random_weights("Q4_0", 20, 4, 0)  # not sixteen columns at a time
    assert close(mapped.product(mapped.ours(), "Q4_0", odd, rows), *plain("Q4_0", odd, values))
    even = random_weights("Q4_0", 32, 4, 0)
    mapped.use(None, FOLDER)
    assert close(mapped.product(mapped.ours(), "Q4_0", even, rows), *plain("Q4_0", even, values))
    assert mapped.calls() == before
    assert mapped.settle(FOLDER) == BEST
    mapped.product(mapped.ours(), "Q4_0", even, rows)
    assert mapped.calls() > before


@pytest.mark.parametrize("kernel", KERNELS)
def test_llama_cpp_calls_the_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.kernel() == BEST
    monkeypatch.setattr(ggml, "kernels", lambda: KERNELS[KERNELS.index(kernel) :])
    assert mapped.settle(FOLDER) == kernel
    for name in TYPES:
        before = mapped.calls()
        assert mapped.graph_product(FOLDER, name) is not None
        assert (mapped.calls() > before) == (name in mapped.types_of(kernel, FOLDER))


def test_another_product_is_left_to_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later llama.cpp might do: the samples tell."""
    real = mapped.graph_product
    counts = iter(range(100))
    for change in (
        ("graph_product", lambda *of: real(*of) + next(counts)),  # other numbers
        ("graph_product", lambda *_: None),  # no graph
        ("calls", lambda: 7),  # ours is not called
    ):
        with monkeypatch.context() as patch:
            patch.setattr(mapped, *change)
            assert mapped.settle(FOLDER) is None
        before = mapped.calls()
        assert real(FOLDER, "Q4_0") is not None
        assert mapped.calls() == before
    with monkeypatch.context() as patch:  # tensors that are laid out in another way
        patch.setattr(theirs, "knows_tensors", lambda _: False)
        assert mapped.settle(FOLDER) == BEST
        assert set(mapped.types_of(KERNELS[0], FOLDER)) <= set(mapped._PLAIN)
    assert mapped.settle(FOLDER) == BEST


@tiles
def test_a_kernel_that_differs_makes_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mapped.graph_product

    def wrong_q6_k(folder: Path, name: str) -> Any:
        before = mapped.calls()
        found = real(folder, name)
        return found + 1 if name == "Q6_K" and mapped.calls() > before else found

    monkeypatch.setattr(mapped, "graph_product", wrong_q6_k)
    assert mapped.settle(FOLDER) == "avx512_vnni"


@tiles
def test_a_model_of_several_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer each in Q4_0, Q8_0, Q4_K and Q6_K: K-quants have another way through llama.cpp."""
    path = write_probe_model(tmp_path / "m.gguf")
    ids = np.arange(40) % N_VOCAB
    with Backbone.open(path, threads=2, extra_bufts=False) as backbone:
        assert backbone.info["product"] == f"mse_kernels, {BEST}"
        assert backbone.info["mapped"]
        found, counts = [], []
        real = theirs.knows_tensors
        for kernel, knows in (("amx", real), ("amx", lambda _: False), (None, real)):
            monkeypatch.setattr(theirs, "knows_tensors", knows)
            mapped.use(kernel, FOLDER)
            before = mapped.calls()
            backbone.clear()
            found.append(np.stack([backbone.prefill(ids), backbone.prefill([3])]))
            counts.append(mapped.calls() - before)
    assert counts[0] > counts[1] > 0 == counts[2]
    for logits in found[:2]:
        # The plain path rounds alike; only the order of the sums differs.
        assert np.abs(logits - found[2]).max() <= 2e-3 * np.abs(found[2]).max()


@pytest.mark.parametrize("arch", ["llama", "qwen", "qwen2", "chatglm"])
def test_a_model_in_q4_0_by_every_kernel(arch: str, tmp_path: Path) -> None:
    path, rows = toy_gguf(tmp_path / "m.gguf", arch, dtype="q4_0"), np.arange(30)
    with Backbone.open(path, threads=2) as backbone:
        assert backbone.info["product"] == f"mse_kernels, {BEST}"
        assert not backbone.info["repacked"]
        assert {name for name in backbone.info["buffers_mib"] if name.endswith(" model")} == {
            "CPU_Mapped model"
        }
        found, counts = [], []
        for kernel in (*KERNELS, None):
            mapped.use(kernel, FOLDER)
            before = mapped.calls()
            backbone.clear()
            found.append(backbone.prefill(rows))
            counts.append(mapped.calls() - before)
    assert all(counts[:-1])
    assert counts[-1] == 0
    for logits in found[:-1]:
        assert np.abs(logits - found[-1]).max() <= 2e-3 * np.abs(found[-1]).max()


@tiles
def test_models_of_these_types_are_not_repacked(tmp_path: Path) -> None:
    code = (
        "import sys; from mse_runtime.backbone import Backbone\n"
        "with Backbone.open(sys.argv[1], threads=1) as model: print(model.info['product'])"
    )
    path = write_probe_model(tmp_path / "m.gguf")
    with Gguf.open(path) as gguf:
        assert not repacking_pays(gguf)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.strip() == f"mse_kernels, {BEST}", done.stderr
