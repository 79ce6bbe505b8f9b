"""Q4_0 weights in the layout that our product reads, also where llama.cpp would take AMX tiles."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_fixtures import toy_gguf

from mse_kernels import ggml
from mse_runtime.backbone import Backbone, cpu, library, repack
from mse_runtime.gguf import Gguf, TensorInfo

ours = pytest.mark.skipif(
    not ggml.kernels(), reason="our product of Q4_0 weights does not run here"
)


def pattern(*tensors: tuple[str, tuple[int, ...], str]) -> str | None:
    table = {name: TensorInfo(name, shape, kind, 0, 1) for name, shape, kind in tensors}
    return repack._pattern(SimpleNamespace(tensors=table))  # type: ignore[arg-type]


def test_only_matrices_that_are_q4_0_in_every_layer() -> None:
    found = pattern(
        ("token_embd.weight", (512, 64), "Q4_0"),
        ("blk.0.attn_norm.weight", (64,), "F32"),
        ("blk.0.attn_q.weight", (64, 64), "Q4_0"),
        ("blk.11.attn_q.weight", (64, 64), "Q4_0"),
        ("blk.0.attn_q.bias", (64,), "F32"),
        ("blk.0.ffn_down.weight", (64, 96), "Q4_0"),
        ("blk.11.ffn_down.weight", (64, 96), "Q4_1"),
        ("blk.0.ffn_up.weight", (60, 64), "Q4_0"),  # llama.cpp repacks eight rows at a time
        ("blk.0.ffn_gate_exps.weight", (8, 96, 64), "Q4_0"),
    )
    assert found is not None
    assert re.search(found, "blk.7.attn_q.weight")
    for name in ("attn_norm.weight", "attn_q.bias", "ffn_down.weight", "ffn_up.weight"):
        assert not re.search(found, f"blk.0.{name}")
    assert not re.search(found, "blk.0.ffn_gate_exps.weight")
    assert pattern(("blk.0.attn_q.weight", (64, 64), "Q8_0")) is None


@ours
@pytest.mark.parametrize("arch", ["llama", "qwen", "qwen2", "chatglm"])
def test_a_processor_with_amx_takes_it_too(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is no AMX: then llama.cpp chooses the same, and must not be disturbed."""
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    path = toy_gguf(tmp_path / "m.gguf", arch, dtype="q4_0")
    rows = np.arange(30)
    with Backbone.open(path, threads=2, extra_bufts=True) as backbone:
        assert backbone.info["repacked"]
        assert backbone.info["q4_0"] == library.q4_0_product()
        before = ggml.calls()
        found = backbone.prefill(rows)
        assert ggml.calls() > before
    with Backbone.open(path, threads=2, extra_bufts=False) as backbone:
        assert not backbone.info["repacked"]
        plain = backbone.prefill(rows)
    assert np.abs(found - plain).max() <= 0.02 * np.abs(plain).max()  # activations are rounded


@ours
@pytest.mark.parametrize("amx", [True, False])
def test_layers_are_repacked_and_the_output_matrix_stays(
    amx: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    lib, path = library.load(), toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")
    with Gguf.open(path) as gguf:
        assert repack.repacked_q4_0(lib, gguf) is not None
        assert repack.output_stays_mapped(gguf)
        output = gguf.tensors["output.weight"].size
        whole = sum(info.size for info in gguf.tensors.values())
    with Backbone.open(path, threads=1, extra_bufts=True) as backbone:
        buffers = backbone.info["buffers_mib"]
        assert {name for name in buffers if name.endswith(" model")} == {
            "CPU_REPACK model", "CPU_Mapped model",
        }  # fmt: skip
        assert 0 < buffers["CPU_REPACK model"] * 2**20 < whole - output
    with Gguf.open(path) as gguf:
        monkeypatch.setattr(library, "q4_0_product", lambda: "llama.cpp")
        assert repack.repacked_q4_0(lib, gguf) is None
        assert not repack.output_stays_mapped(gguf)


@ours
def test_llama_cpp_looks_after_what_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another type in a layer, or an output matrix whose product is not all: its own choice."""
    lib = library.load()
    with Gguf.open(toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")) as gguf:
        with monkeypatch.context() as patch:
            patch.setitem(gguf.metadata, "llama.logit_scale", 2.0)
            assert not repack.output_stays_mapped(gguf)
        name = "blk.0.ffn_down.weight"
        other = replace(gguf.tensors[name], type="Q4_1")
        monkeypatch.setitem(gguf.tensors, name, other)
        assert not repack.output_stays_mapped(gguf)
        for amx in (True, False):
            monkeypatch.setattr(cpu, "has_amx", lambda amx=amx: amx)
            assert (repack.repacked_q4_0(lib, gguf) is not None) == amx


@ours
def test_a_llama_cpp_without_that_list_or_layout_chooses_itself() -> None:
    """An override for a type that has no layout for Q4_0 would crash it."""
    lib = library.load()
    system = lib.llama_print_system_info
    known = SimpleNamespace(_lib=lib._lib, llama_print_system_info=system)
    assert repack._buffer_type(known) is not None
    another = SimpleNamespace(_lib=SimpleNamespace(), llama_print_system_info=system)
    assert repack._buffer_type(another) is None
    older = SimpleNamespace(_lib=lib._lib, llama_print_system_info=lambda: b"CPU : SSE3 = 1 | ")
    assert repack._buffer_type(older) is None
