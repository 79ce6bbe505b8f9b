"""Our attention in place of llama.cpp's, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_fixtures import toy_gguf
from numpy.typing import NDArray

from mse_kernels import attention, theirs
from mse_kernels.attention import Inputs
from mse_runtime.backbone import Backbone, library

FOLDER = library.folder()
library.load()
KERNELS = attention.kernels() if library.attention() else ()
pytestmark = pytest.mark.skipif(
    not KERNELS, reason="no x86-64 with AVX2, no Linux, or the kernel library was not built"
)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture(autouse=True)
def ours_afterwards() -> Iterator[None]:
    yield
    attention.use(KERNELS[0], FOLDER)


def ours(kernel: str | None, inputs: Inputs, threads: int = 1) -> NDArray[np.float32]:
    """By a kernel, or None: by llama.cpp's own."""
    attention.use(kernel, FOLDER)
    before = attention.calls()
    found = attention.compute(FOLDER, inputs, threads)
    assert found is not None
    assert attention.calls() - before == (threads if kernel else 0)
    return found


def random_inputs(
    rows: int, keys: int, heads: int = 4, group: int = 2, depth: int = 64, seed: int = 0
) -> Inputs:
    """Each row sees half of the keys, but the first row none of them."""
    rng = np.random.default_rng(seed)
    queries = 3 * rng.standard_normal((heads, rows, depth), np.float32)
    cache = rng.standard_normal((2, heads // group, keys, depth), np.float32).astype(np.float16)
    mask = np.where(rng.random((rows, keys)) < 0.5, -np.inf, rng.integers(-3, 4, (rows, keys)))
    mask[0] = -np.inf
    return Inputs(queries, *cache, mask.astype(np.float16))


def plain(inputs: Inputs) -> NDArray[np.float64]:
    q, k, v, mask = (x.astype(np.float64) for x in inputs)
    mask = mask[: q.shape[1]]
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + mask
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return (weights @ v / np.where(total == 0, 1, total)).transpose(1, 0, 2)


@every_kernel
@given(
    st.integers(2, 70), st.integers(1, 20), st.sampled_from([(4, 1), (4, 2), (6, 6), (3, 3)]),
    st.sampled_from([32, 64, 96, 128, 256]), st.sampled_from([0, 3, 32]), st.integers(1, 3),
    st.integers(0, 1000),
)  # fmt: skip
def test_attention_is_the_plain_one(
    kernel: str, rows: int, eights: int, of: tuple[int, int], depth: int, more: int, threads: int,
    seed: int,
) -> None:  # fmt: skip
    inputs = random_inputs(rows, 8 * eights, *of, depth, seed)
    inputs = Inputs(*inputs[:3], np.concatenate([inputs.mask, inputs.mask[:1].repeat(more, 0)]))
    found = ours(kernel, inputs, threads)
    assert np.abs(found - plain(inputs)).max() <= 2e-5
    assert not found[0].any()  # a row that sees nothing


@every_kernel
def test_scores_far_apart(kernel: str) -> None:
    """The exponentials of most are zero, and none is infinite."""
    inputs = random_inputs(20, 64)
    inputs.queries[:] *= 300
    assert np.abs(ours(kernel, inputs) - plain(inputs)).max() <= 2e-5


@every_kernel
def test_a_row_depends_neither_on_rows_beside_it_nor_on_threads(kernel: str) -> None:
    inputs = random_inputs(90, 128)
    together = ours(kernel, inputs)
    assert np.array_equal(ours(kernel, inputs, threads=3), together)
    for start, stop in ((0, 2), (2, 15), (15, 16 + 2), (18, 90)):
        some = Inputs(inputs.queries[:, start:stop], *inputs[1:3], inputs.mask[start:stop])
        assert np.array_equal(ours(kernel, some), together[start:stop])


@every_kernel
def test_keys_that_nobody_sees_may_hold_anything(kernel: str) -> None:
    """Places of the cache that another clip has left."""
    inputs = random_inputs(9, 40)
    inputs.mask[:, 3::7] = -np.inf
    expected = ours(kernel, inputs)
    for broken in (np.nan, np.inf, -np.inf):
        inputs.keys[:, 3::7] = inputs.values[:, 3::7] = broken
        assert np.array_equal(ours(kernel, inputs), expected)


@every_kernel
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
def test_what_is_no_number_stays_none_and_with_those_that_see_it(
    kernel: str, bad: float, where: str
) -> None:
    """The runtime refuses logits that are not numbers; a finite answer would pass for one."""
    inputs = random_inputs(37, 48)
    expected, seen = ours(kernel, inputs), np.isfinite(inputs.mask)
    if where == "queries":
        inputs.queries[:, 7] = bad
        hit = np.arange(37) == 7
    else:
        inputs.mask[:, 5] = np.where(np.arange(37) % 5 == 1, 0, -np.inf)
        expected, seen = ours(kernel, inputs), np.isfinite(inputs.mask)
        getattr(inputs, where)[:, 5, 3] = bad
        hit = seen[:, 5]
    found = ours(kernel, inputs)
    assert np.array_equal(found[~hit], expected[~hit])
    whole = found[hit].reshape(hit.sum(), 4, -1)
    if where == "values":
        assert not np.isfinite(whole[..., 3]).any()
    elif where == "queries" or np.isnan(bad):
        assert not np.isfinite(whole).any()
    else:  # an infinite score has all the weight, or none
        queries = inputs.queries[:, hit, 3].T
        assert not np.isfinite(whole[queries * bad > 0]).any()
        assert np.isfinite(whole[queries * bad < 0]).all()


@every_kernel
def test_what_ours_has_not_goes_on_to_llama_cpp(kernel: str) -> None:
    few = random_inputs(5, 64)
    assert ours(kernel, few) is not None
    before = attention.calls()
    for inputs in (
        random_inputs(5, 1032),  # more keys than stay in a cache
        random_inputs(5, 60),  # not eight at a time
        random_inputs(5, 64, depth=40),  # not whole vectors
        Inputs(few.queries[:, :1], *few[1:3], few.mask[:1]),  # a single row
    ):
        found = attention.compute(FOLDER, inputs)
        assert found is not None
        assert np.abs(found - plain(inputs)).max() <= 2e-2
    for options in ({"cap": 2.0}, {"bias": 8.0}, {"kind": 0}, {"sinks": True}, {"mask": False}):
        expected, found = ([], [])
        for result, which in ((expected, None), (found, kernel)):
            attention.use(which, FOLDER)
            result.append(_other(few, **options))
        assert np.array_equal(expected[0], found[0]), options
    assert attention.calls() == before


def _other(
    inputs: Inputs, cap: float = 0, bias: float = 0, kind: int = 1, sinks: bool = False,
    mask: bool = True,
) -> Any:  # fmt: skip
    """Attention with a cap of the scores, ALiBi, a cache of floats, sinks, or without a mask."""
    heads, rows, depth = inputs.queries.shape
    with theirs.graph(FOLDER, 1 << 22) as g:
        assert g is not None
        tensors: list[int | None] = []
        for number, values in zip((0, kind, kind, 1), inputs, strict=True):
            tensors.append(g.tensor(number, *values.shape[::-1]))
            g.fill(tensors[-1], np.ascontiguousarray(values, np.float16 if number else np.float32))
        if not mask:
            tensors[3] = None
        result = g.base.ggml_flash_attn_ext(g.context, *tensors, depth**-0.5, bias, cap)
        if sinks:
            more = g.tensor(0, heads)
            g.fill(more, np.ones(heads, np.float32))
            theirs._Tensor.from_address(result).source[4] = more
        return g.compute(result, (rows, heads, depth))


def test_llama_cpp_is_left_alone_where_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.attention() == KERNELS[0]
    real = attention.compute
    counts = iter(range(100))
    for module, *change in (
        (attention, "compute", lambda *of: real(*of) + next(counts)),  # other numbers
        (attention, "compute", lambda *_: None),  # no graph
        (attention, "calls", lambda: 7),  # ours is not called
        (theirs, "knows_tensors", lambda _: False),  # tensors laid out in another way
        (attention, "kernels", lambda: ()),  # another processor
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, *change)
            assert attention.settle(FOLDER) is None
        before = attention.calls()
        assert real(FOLDER, attention.sample()) is not None
        assert attention.calls() == before
    with monkeypatch.context() as patch:
        patch.setattr(attention, "kernels", lambda: KERNELS[-1:])
        assert attention.settle(FOLDER) == KERNELS[-1]
    assert attention.settle(FOLDER) == KERNELS[0]


def test_tensors_that_are_laid_out_in_another_way_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert theirs.knows_tensors(FOLDER)
    fields = theirs._Tensor._fields_
    for moved in range(1, len(fields)):
        other = [*fields[:moved], ("more", fields[0][1] * 2), *fields[moved:]]
        kind = type("_Tensor", (theirs.ctypes.Structure,), {"_fields_": other})
        with monkeypatch.context() as patch:
            patch.setattr(theirs, "_Tensor", kind)
            assert not theirs.knows_tensors(FOLDER), fields[moved]
    monkeypatch.setattr(theirs, "_functions", lambda _: (None, None))
    assert not theirs.knows_tensors(FOLDER)


@pytest.mark.parametrize("arch", ["llama", "qwen", "qwen2", "chatglm"])
def test_a_model_by_every_kernel(arch: str, tmp_path: Path) -> None:
    path = toy_gguf(tmp_path / "m.gguf", arch, n_head=2)
    with Backbone.open(path, threads=2) as backbone:
        assert backbone.info["attention"] == f"mse_kernels, {KERNELS[0]}"
        found, counts = [], []
        for kernel in (*KERNELS, None):
            attention.use(kernel, FOLDER)
            before = attention.calls()
            backbone.clear()
            backbone.prefill(np.arange(30), logits="none")
            found.append(backbone.prefill(np.arange(70)))
            counts.append(attention.calls() - before)
    assert all(counts[:-1])
    assert counts[-1] == 0
    for logits in found[:-1]:
        assert np.abs(logits - found[-1]).max() <= 2e-3 * np.abs(found[-1]).max()
