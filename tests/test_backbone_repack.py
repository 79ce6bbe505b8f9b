"""Q4_0 weights in the layout that our product reads, and what stays as the file has it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_fixtures import toy_gguf

from mse_kernels import ggml
from mse_runtime.backbone import Backbone, library, repack
from mse_runtime.gguf import Gguf, TensorInfo

ours = pytest.mark.skipif(
    not ggml.kernels(), reason="our product of Q4_0 weights does not run here"
)


def names(*tensors: tuple[str, tuple[int, ...], str]) -> list[str]:
    table = {name: TensorInfo(name, shape, kind, 0, 1) for name, shape, kind in tensors}
    return repack._names(SimpleNamespace(tensors=table))  # type: ignore[arg-type]


def test_only_where_every_matrix_of_the_layers_can_be_repacked() -> None:
    model = (
        ("token_embd.weight", (512, 64), "Q4_0"),
        ("output.weight", (512, 64), "Q6_K"),
        ("blk.0.attn_norm.weight", (64,), "F32"),
        ("blk.0.attn_q.weight", (64, 64), "Q4_0"),
        ("blk.11.attn_q.weight", (64, 64), "Q4_0"),
        ("blk.0.attn_q.bias", (64,), "F32"),
        ("blk.0.ffn_down.weight", (64, 96), "Q4_0"),
    )
    assert names(*model) == ["attn_q", "ffn_down"]
    for other in (
        ("blk.11.ffn_down.weight", (64, 96), "Q4_1"),
        ("blk.0.ffn_up.weight", (60, 64), "Q4_0"),  # llama.cpp repacks eight rows at a time
        ("blk.0.ffn_gate_exps.weight", (8, 96, 64), "Q4_0"),
    ):
        assert names(*model, other) == []


@ours
@pytest.mark.parametrize("arch", ["llama", "qwen", "qwen2", "chatglm"])
def test_layers_are_repacked_and_the_output_matrix_stays(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "mapped_types", lambda: ())
    lib, path = library.load(), toy_gguf(tmp_path / "m.gguf", arch, dtype="q4_0")
    with Gguf.open(path) as gguf:
        overrides = repack.repacked_q4_0(lib, gguf)
        taken = [name for name in gguf.tensors if re.search(overrides[0].pattern.decode(), name)]
        assert taken == [
            name for name, info in gguf.tensors.items() if "blk." in name and len(info.shape) > 1
        ]
        output = gguf.tensors.get("output.weight", gguf.tensors["token_embd.weight"]).size
        whole = sum(info.size for info in gguf.tensors.values())
    rows = np.arange(30)
    with Backbone.open(path, threads=2, extra_bufts=True) as backbone:
        assert backbone.info["product"] == library.q4_0_product()
        buffers = backbone.info["buffers_mib"]
        assert {name for name in buffers if name.endswith(" model")} == {
            "CPU_REPACK model", "CPU_Mapped model",
        }  # fmt: skip
        assert 0 < buffers["CPU_REPACK model"] * 2**20 < whole - output
        before = ggml.calls()
        found = backbone.prefill(rows)
        assert ggml.calls() > before
    with Backbone.open(path, threads=2, extra_bufts=False) as backbone:
        assert not backbone.info["repacked"]
        plain = backbone.prefill(rows)
    assert np.abs(found - plain).max() <= 0.02 * np.abs(plain).max()  # activations are rounded


@ours
def test_llama_cpp_looks_after_what_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another product, another type in a layer, an output matrix that is not all, AMX."""
    monkeypatch.setattr(library, "mapped_types", lambda: ())
    lib = library.load()
    with Gguf.open(toy_gguf(tmp_path / "m.gguf", "llama", dtype="q4_0")) as gguf:
        assert repack.output_stays_mapped(gguf)
        name = "blk.0.ffn_down.weight"
        for change in (
            (library, "mapped_types", lambda: ("Q4_0",)),
            (library, "q4_0_product", lambda: "llama.cpp"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(*change)
                assert repack.repacked_q4_0(lib, gguf) is None
        with monkeypatch.context() as patch:
            patch.setitem(gguf.metadata, "llama.logit_scale", 2.0)
            assert repack.repacked_q4_0(lib, gguf) is None
        monkeypatch.setitem(gguf.tensors, name, replace(gguf.tensors[name], type="Q4_1"))
        assert repack.repacked_q4_0(lib, gguf) is None


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
