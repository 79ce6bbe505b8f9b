"""The rotary table of published runs: rounded in llama.cpp's graph as NumPy and torch round it."""

from __future__ import annotations

import ctypes
import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backbone_cases import TOLERANCE, Open, worst
from make_fixtures import ARCHES, toy_gguf
from numpy.typing import NDArray

from mse_runtime import Analyzer, kept_prefix, load_bundle
from mse_runtime.backbone import Backbone, rotary
from mse_runtime.bundle.hub import resolve_bundle
from mse_runtime.errors import BackboneError
from mse_runtime.features.spec import Features

pytest_plugins = ("backbone_fixtures",)

IDS = np.arange(5, 65)


def bf16(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eight significant bits, to nearest; the slow way."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def turned(
    x: NDArray[np.float64], cos: NDArray[np.float64], sin: NDArray[np.float64], paired: bool
) -> NDArray[np.float64]:
    """x [L, heads, head], its first 2 n columns turned by cos and sin [L, n]; `paired` neighbours
    or the halves."""
    n = cos.shape[1]
    result = x.copy()
    for i in range(n):
        a, b = (2 * i, 2 * i + 1) if paired else (i, i + n)
        c, s = cos[:, i, None], sin[:, i, None]
        result[..., a] = x[..., a] * c - x[..., b] * s
        result[..., b] = x[..., b] * c + x[..., a] * s
    return result


@pytest.mark.parametrize("arch", ARCHES)
def test_every_rotation_is_that_of_the_rounded_table(
    open_toy: Open, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact values turned back and forth in float64 against what the graph goes on with."""
    backbone = open_toy(arch, rope_table="bf16")
    rounding = backbone._rounding
    assert rounding is not None
    change, seen = rounding._turn_on, []

    def watched(tensor: Any) -> None:
        before = rounding._read(tensor, rotary.F32, np.float32)[0].astype(np.float64)
        change(tensor)
        after = rounding._read(tensor, rotary.F32, np.float32)[0]
        seen.append((tensor.name.decode(), before, after))

    monkeypatch.setattr(rounding, "_turn_on", watched)
    backbone.prefill(IDS[:20], logits="none")
    backbone.prefill(IDS[20:])
    names = [f"{letter}cur-{layer}" for layer in range(backbone.n_layer) for letter in "QK"]
    assert sorted(name for name, _, _ in seen) == sorted(names * 2)
    head = backbone.n_embd // 4
    n = head // 4 if arch == "chatglm" else head // 2
    for number, (_, before, after) in enumerate(seen):
        start = 0 if number < len(names) else 20
        angles = np.arange(start, start + len(before))[:, None] / 10000.0 ** (np.arange(n) / n)
        cos, sin = np.cos(angles), np.sin(angles)
        paired = arch in ("llama", "chatglm")
        plain = turned(before, cos, -sin, paired)
        expected = turned(plain, bf16(cos), bf16(sin), paired)
        # An angle's last bit may fall on the other side of a tie: 2^-8 of a value, hardly ever.
        wrong = np.abs(after - expected) > 1e-4
        assert wrong.mean() < 1e-3
        assert worst(after, expected) < 0.02
        assert worst(after, before) > 1e-3


def test_the_exact_table_is_the_default_and_comes_back(open_toy: Open) -> None:
    backbone = open_toy()
    assert backbone.info["rope_table"] == "exact"
    assert backbone._rounding is None
    exact = backbone.prefill(IDS)
    assert backbone.renew(kv_type="f32", rope_table="bf16")
    assert backbone.info["rope_table"] == "bf16"
    assert backbone.length() == 0
    rounded = backbone.prefill(IDS)
    assert 10 * TOLERANCE < worst(exact, rounded) < 0.1
    assert not backbone.renew(kv_type="f32", rope_table="bf16")
    assert backbone.length() == len(IDS)
    assert backbone.renew(kv_type="f32", rope_table="exact")
    assert worst(backbone.prefill(IDS), exact) == 0
    assert backbone.renew(kv_type="f16", rope_table="exact")
    assert (backbone.info["kv_type"], backbone.length()) == ("f16", 0)
    with pytest.raises(BackboneError, match="rope_table must be"):
        backbone.renew(kv_type="f16", rope_table="fp8")  # type: ignore[arg-type]
    assert 0 < worst(backbone.prefill(IDS), exact) < 0.05


def test_trees_sequences_and_single_steps_are_rounded_alike(open_toy: Open) -> None:
    one, other = open_toy(rope_table="bf16"), open_toy(rope_table="bf16")
    whole = one.prefill(IDS)
    other.prefill(IDS[:50], logits="none")
    for token in IDS[50:]:
        steps = other.prefill([token])
    assert worst(whole, steps) <= TOLERANCE
    tree = one.prefill_tree([7], [8, 9, 10], [-1, -1, 0])
    assert worst(tree[0], other.prefill([7])) <= TOLERANCE
    assert worst(tree[2], other.prefill([9])) <= TOLERANCE
    many = one.prefill_many([(1, IDS[:9]), (2, IDS)])
    assert worst(many[1], whole) <= TOLERANCE


def test_larger_and_smaller_contexts_stay_rounded(open_toy: Open) -> None:
    backbone = open_toy(rope_table="bf16")
    expected = backbone.prefill(np.append(IDS, 7))
    backbone.clear()
    backbone.prefill(IDS, logits="none")
    assert backbone.reserve(600, 40)
    gc.collect()  # nothing but the backbone holds the callback
    assert worst(backbone.prefill([7]), expected) <= TOLERANCE
    backbone.shrink(16)
    gc.collect()
    assert backbone.n_batch <= 64
    assert worst(backbone.prefill(np.append(IDS, 7)), expected) <= TOLERANCE
    assert backbone.info["rope_table"] == "bf16"


def test_states_are_not_shared(open_toy: Open) -> None:
    exact, rounded = open_toy(), open_toy(rope_table="bf16")
    for one, other in ((exact, rounded), (rounded, exact)):
        one.clear()
        one.prefill(IDS, logits="none")
        with pytest.raises(BackboneError, match="rotary table"):
            other.load_state(1, one.save_state(0))
        one.load_state(1, one.save_state(0))


class Boom(BaseException):
    """Like KeyboardInterrupt, no Exception."""


def test_what_is_raised_in_the_callback_surfaces(
    open_toy: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Carried past llama.cpp's frames; the sequence is as it was, and the next pass works."""
    backbone = open_toy(rope_table="bf16")
    expected = backbone.prefill(IDS)
    backbone.clear()
    backbone.prefill(IDS[:20], logits="none")
    rounding: Any = backbone._rounding
    change, left = rounding._turn_on, [2]

    def fails(tensor: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Boom
        change(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(rounding, "_turn_on", fails)
        with pytest.raises(Boom):
            backbone.prefill(IDS[20:])
        assert left == [-1]  # not asked again in that pass
        with pytest.raises(Boom):
            backbone.prefill_tree(IDS[20:30], [1, 2], [-1, 0])
    assert backbone.length() == 20
    assert worst(backbone.prefill(IDS[20:]), expected) <= TOLERANCE


def test_a_model_that_shows_no_rotation_is_refused(open_toy: Open) -> None:
    backbone = open_toy(rope_table="bf16")
    rounding: Any = backbone._rounding
    rounding._rope = 99
    with pytest.raises(BackboneError, match="No rotation was seen"):
        backbone.prefill(IDS)
    assert backbone.length() == 0
    with pytest.raises(BackboneError, match="do not fit"):  # that stays the message
        backbone.prefill(np.zeros(300, np.int32))


@pytest.mark.parametrize(
    ("index", "value", "why"),
    [(6, 0.5, "scaled"), (7, 1.0, "scaled"), (8, 1.2, "scaled"), (2, 8, "multi"), (15, 4, "begin")],
)
def test_rotations_of_other_kinds_are_refused(
    open_toy: Open, index: int, value: float, why: str
) -> None:
    backbone = open_toy(rope_table="bf16")
    rounding: Any = backbone._rounding
    known = rounding._rotation

    def other(tensor: Any) -> Any:
        changed = rotary.Tensor.from_buffer_copy(tensor)
        raw = np.float32(value).view(np.int32) if 5 <= index < 9 else value
        changed.op_params[index] = int(raw)
        return known(changed)

    rounding._rotation = other
    with pytest.raises(BackboneError, match=why):
        backbone.prefill(IDS)


def test_scaled_angles_in_a_file_are_refused(tmp_path: Path) -> None:
    """Linear scaling, as llama.cpp itself hands it to the rotation."""
    path = toy_gguf(tmp_path / "m.gguf", "llama")
    with Backbone.open(path, threads=1, kv_type="f32") as backbone:
        defaults = backbone._lib.llama_context_default_params

        def scaled() -> Any:
            params = defaults()
            params.rope_freq_scale = 0.5
            return params

        backbone._lib.llama_context_default_params = scaled
        try:
            backbone.renew(kv_type="f32", rope_table="bf16")
        finally:
            backbone._lib.llama_context_default_params = defaults
        with pytest.raises(BackboneError, match="scaled for longer contexts"):
            backbone.prefill(IDS)


FIELDS = [name for name, *_ in rotary.Tensor._fields_]


@pytest.mark.parametrize("shifted", ["buffer", "ne", "op", "op_params", "flags", "src", "name"])
def test_another_layout_of_tensors_is_found_before_anything_runs(
    toys: dict[str, Path], shifted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tensor(ctypes.Structure):
        pass

    fields: list[Any] = [
        (name, ctypes.POINTER(Tensor) * 10 if name == "src" else kind)
        for name, kind in rotary.Tensor._fields_
    ]
    at = FIELDS.index(shifted)
    fields.insert(at, ("new", ctypes.c_int64))
    Tensor._fields_ = fields
    monkeypatch.setattr(rotary, "Tensor", Tensor)
    with pytest.raises(BackboneError, match="keeps its tensors in another way"):
        Backbone.open(toys["llama"], threads=1, rope_table="bf16")
    with Backbone.open(toys["llama"], threads=1) as backbone:  # the exact one needs none of it
        with pytest.raises(BackboneError, match="in another way"):
            backbone.renew(kv_type="f32", rope_table="bf16")
        assert len(backbone.prefill(IDS)) == backbone.n_vocab


def test_a_build_without_the_functions_is_told_from_others() -> None:
    with pytest.raises(BackboneError, match="ggml_init"):
        rotary._check_layout(object())


def test_prefixes_of_the_two_tables_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published-parity answer in between changes nothing, neither here nor in the files."""
    monkeypatch.setattr(kept_prefix, "SMALL_MODEL", 0)
    monkeypatch.setenv("MSE_CACHE", str(tmp_path / "cache"))
    plain = load_bundle(resolve_bundle("tiny"))
    bundle = replace(plain, backbone=replace(plain.backbone, rope_table="bf16"))
    nothing, text = Features(None, None, 1.0, (), {}), "Thank you so much for everything."

    def files() -> int:
        for thread in threading.enumerate():
            if thread.name == "mse-prefix":
                thread.join()
        return len(list((tmp_path / "cache" / kept_prefix.FOLDER).glob("*")))

    def scores(analyzer: Analyzer, parity: Any = None) -> Any:
        prediction = analyzer.analyze_features(nothing, text, parity=parity)
        table = prediction.backend["backbone"]["rope_table"]
        assert table == ("bf16" if parity else "exact")
        return prediction.answer.log_scores

    with Analyzer(bundle, adapter="onnx", threads=1) as analyzer:
        exact = scores(analyzer)
        assert files() == 1
        rounded = scores(analyzer, "published")
        assert files() == 2
        assert worst(scores(analyzer), exact) == 0
        assert worst(scores(analyzer, "published"), rounded) == 0
        assert files() == 2
    with Analyzer(plain, adapter="onnx", threads=1) as analyzer:  # no such table: the exact one
        same = analyzer.analyze_features(nothing, text, parity="published")
        assert same.backend["backbone"]["rope_table"] == "exact"
        assert worst(same.answer.log_scores, rounded) > 1e-5
        assert worst(same.answer.log_scores, exact) < 0.01  # the output matrix rounds otherwise
