"""The memory plan against llama.cpp's own buffers and the kernel's account."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_fixtures import ARCHES, SHAPES, Shape, synthetic_gguf, toy_gguf

from mse_runtime import placement
from mse_runtime.backbone import Backbone
from mse_runtime.backbone.mapped import CopiedPages
from mse_runtime.errors import BackboneError, DeviceError
from mse_runtime.gguf import Gguf
from mse_runtime.memory import measured
from mse_runtime.placement import MB, check_gpu, gpu_problem, open_planned, plan

MIB = 1 << 20


def item(planned: placement.Plan, name: str) -> placement.Item:
    return next(part for part in planned.items if part.name.startswith(name))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few wide layers of each architecture, so that buffers are more than their headers."""
    folder = tmp_path_factory.mktemp("wide")
    return {
        arch: toy_gguf(
            folder / arch, arch, n_embd=512, n_layer=3, n_head=8, n_ff=1376, dtype="q4_0"
        )
        for arch in ARCHES
    }


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("n_ctx", [256, 1024])
def test_the_plan_is_what_llama_cpp_allocates(
    wide: dict[str, Path], arch: str, low_memory: bool, n_ctx: int
) -> None:
    with Gguf.open(wide[arch]) as gguf:
        planned = plan(gguf, n_ctx=n_ctx, low_memory=low_memory)
        # The output matrix stays in the file where llama.cpp has no other layout for its shape.
        slack = gguf.tensors["output.weight"].size
    with Backbone.open(
        wide[arch], n_ctx=n_ctx, low_memory=low_memory, extra_bufts=None if low_memory else True,
        threads=1,
    ) as backbone:  # fmt: skip
        buffers = backbone.info["buffers_mib"]
    if (
        copied := CopiedPages.of(wide[arch]) is not None and not low_memory
    ):  # the table stays in the file
        buffers = {name: size for name, size in buffers.items() if "Mapped" not in name}
    sums = {
        kind: sum(size for name, size in buffers.items() if name.endswith(kind)) * MIB
        for kind in ("model", "KV", "compute", "output")
    }
    weights = item(planned, "weights").ram
    if copied:  # norms stay in the file, too
        assert sums["model"] <= weights <= sums["model"] + slack + 0.05 * MIB
    else:
        assert weights == pytest.approx(sums["model"], rel=0.01, abs=0.02 * MIB)
    assert item(planned, "KV").ram == pytest.approx(sums["KV"], rel=0.01, abs=0.02 * MIB)
    assert item(planned, "compute").ram == pytest.approx(sums["compute"], rel=0.15)
    assert item(planned, "logits").ram == pytest.approx(2 * sums["output"], rel=0.5)
    table = item(planned, "embedding").ram
    assert planned.reclaimable == (weights if low_memory else table)


def test_a_tied_output_is_counted_once_in_ram_and_again_on_the_gpu(tmp_path: Path) -> None:
    path = toy_gguf(tmp_path / "m.gguf", "llama")
    data = path.read_bytes().replace(b"output.weight", b"unused.weight")
    path.write_bytes(data)
    with Gguf.open(path) as gguf:
        table = gguf.tensors["token_embd.weight"].size
        cpu = plan(gguf, n_gpu_layers=0)
        gpu = plan(gguf, n_gpu_layers=1)
    assert item(cpu, "weights").vram == 0
    assert item(gpu, "weights").vram >= table


SEVEN_B = SHAPES["llama2-7b"]


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 7B shape's header over a sparse file: no weights are written."""
    path = tmp_path_factory.mktemp("7b") / "7b.gguf"
    return synthetic_gguf(path, SEVEN_B, sparse=True)


def test_the_7b_shape_has_known_sizes(seven_b: Path) -> None:
    with Gguf.open(seven_b) as gguf:
        planned = plan(gguf, n_ctx=512, n_gpu_layers=0)
        stored = gguf.tensors["token_embd.weight"].size  # it is not copied
    assert item(planned, "KV").ram == 512 * 512 * 1024  # 512 KiB for each position
    weights, table = item(planned, "weights").ram, item(planned, "embedding").ram
    assert weights + stored == pytest.approx(3.98e9, rel=0.01)
    later = sum(item(planned, name).ram for name in ("KV", "compute", "logits"))
    assert table == max(0, stored - later)  # what comes later takes its place


@settings(max_examples=40, deadline=None)
@given(free=st.integers(0, 12_000), more=st.integers(0, 4_000), n_ctx=st.integers(1, 4096))
def test_as_many_layers_as_fit_and_never_more(
    seven_b: Path, free: int, more: int, n_ctx: int
) -> None:
    with Gguf.open(seven_b) as gguf:
        planned = plan(gguf, n_ctx=n_ctx, free_vram=free * MB)
        roomier = plan(gguf, n_ctx=n_ctx, free_vram=(free + more) * MB)
        one_more = plan(gguf, n_ctx=n_ctx, n_gpu_layers=min(planned.n_gpu_layers + 1, 33))
    assert planned.vram <= free * MB
    assert roomier.n_gpu_layers >= planned.n_gpu_layers
    assert planned.n_gpu_layers == 33 or one_more.vram > free * MB
    assert (planned.vram == 0) == (planned.n_gpu_layers == 0)


def test_what_lies_on_the_gpu_does_not_lie_in_ram(seven_b: Path) -> None:
    with Gguf.open(seven_b) as gguf:
        none, half, every = (plan(gguf, n_gpu_layers=k, program=0) for k in (0, 16, -1))
        tensors = gguf.tensors
        table = tensors["token_embd.weight"].size  # it is not copied
    assert (none.n_gpu_layers, half.n_gpu_layers, every.n_gpu_layers) == (0, 16, 33)
    for planned in (none, half, every):
        weights, cache = item(planned, "weights"), item(planned, "KV")
        # Without a GPU the weights are copied from the mapping, and the table is not.
        mapped = table if planned is none and CopiedPages.of(seven_b) else 0
        assert weights.ram + weights.vram + mapped == sum(t.size for t in tensors.values())
        assert cache.ram + cache.vram == item(none, "KV").ram
    assert item(every, "weights").ram == table  # rows are looked up on the CPU
    assert item(half, "KV").vram == 15 / 32 * item(none, "KV").ram  # the output is a layer, too
    assert none.summary == "CPU"
    assert half.summary == "16 of 33 layers on the GPU"


def test_the_table_a_person_reads(seven_b: Path) -> None:
    with Gguf.open(seven_b) as gguf:
        planned = plan(gguf, free_vram=500 * MB, adapter=30 * MB, features=80 * MB, program=50 * MB)
    head, *body = planned.rows()
    assert all(len(row) == len(head) for row in body)
    assert body[-1][:2] == ("planned", f"{planned.ram / MB:.0f}")
    assert "no layer fits in 500 MB" in body[-1][-1]
    last = planned.rows(measured_rss_mb=planned.ram / MB / 1.05)[-1]
    assert last[0] == "measured"
    assert last[-1] == "plan is +5 % off"


def test_too_little_memory_is_said_before_loading(seven_b: Path) -> None:
    with Gguf.open(seven_b) as gguf:
        planned, mapped = plan(gguf), plan(gguf, low_memory=True)
    planned.check_ram(planned.ram + 1)
    with pytest.raises(DeviceError, match="1000 MB are available"):
        planned.check_ram(1000 * MB)
    mapped.check_ram(1000 * MB)  # the mapped file can be dropped
    planned.check_ram(1 << 50)


def test_a_required_gpu_that_is_not_there(
    wide: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gguf.open(wide["llama"]) as gguf:
        planned = plan(gguf, n_gpu_layers=1)
        nothing = plan(gguf, free_vram=0)
    if problem := gpu_problem():
        with pytest.raises(DeviceError, match="required"):
            check_gpu(planned)
        assert "GPU" in problem
    monkeypatch.setattr(placement, "gpu_problem", lambda: None)
    check_gpu(planned)
    with pytest.raises(DeviceError, match="no layer fits"):
        check_gpu(nothing)
    with pytest.raises(DeviceError, match="put no layer there: because"):
        check_gpu(planned, {"offloaded_layers": 0, "warnings": ["because"]})
    check_gpu(planned, {"offloaded_layers": 1})


@pytest.mark.parametrize("room", [33, 24, 20, 5, 0])
def test_a_gpu_that_takes_fewer_layers_than_planned(
    wide: dict[str, Path], seven_b: Path, room: int
) -> None:
    """The GPU is played: more than `room` layers fail, as a load does that runs out of memory."""
    tried: list[int] = []

    def opener(path: Path, *, n_gpu_layers: int, **options: Any) -> Backbone:
        tried.append(n_gpu_layers)
        if n_gpu_layers > room:
            raise BackboneError("cudaMalloc failed: out of memory")
        return Backbone.open(path, **options)

    with Gguf.open(seven_b) as gguf:
        planned = plan(gguf, n_gpu_layers=-1)
    with open_planned(wide["llama"], planned, opener=opener, threads=1, low_memory=True) as got:
        assert tried[0] == 33
        assert tried[-1] <= room
        assert sorted(tried, reverse=True) == tried
        told = [text for text in got.info["warnings"] if "planned layers" in text]
        assert len(told) == (room < 33)
        assert all("out of memory" in text for text in told)


def test_the_first_error_counts_if_nothing_opens(tmp_path: Path, seven_b: Path) -> None:
    with Gguf.open(seven_b) as gguf:
        planned = plan(gguf, n_gpu_layers=2)
    with pytest.raises(BackboneError, match="does not exist"):
        open_planned(tmp_path / "nothing", planned)


def test_asking_for_layers_without_a_gpu_is_not_silent(wide: dict[str, Path]) -> None:
    if not gpu_problem():
        pytest.skip("there is a GPU")
    with Backbone.open(wide["llama"], n_gpu_layers=1, threads=1, extra_bufts=True) as backbone:
        assert backbone.info["offloaded_layers"] == 0
        assert any("no layer runs on a GPU" in text for text in backbone.info["warnings"])


CHILD = """
import json, sys
import numpy as np
from mse_runtime.backbone import Backbone
from mse_runtime.gguf import Gguf
from mse_runtime.memory import measured
from mse_runtime.placement import plan
path, low = sys.argv[1], sys.argv[2] == "low"
with Gguf.open(path) as gguf:
    planned = plan(gguf, low_memory=low, positions=110)
with Backbone.open(path, low_memory=low, extra_bufts=None if low else True, threads=1) as backbone:
    backbone.prefill(backbone.embed(np.arange(110)))
    backbone.prefill_tree([1], np.arange(18), [-1] * 2 + [0] * 8 + [1] * 8)
print(json.dumps([planned.ram, measured().peak_rss]))
"""


@pytest.mark.parametrize("mode", ["default", "low"])
def test_planned_is_measured(tmp_path_factory: pytest.TempPathFactory, mode: str) -> None:
    """A tenth of a real model (0.24 GB, Q4_0), in a process of its own; the demand is 10 %."""
    path = tmp_path_factory.getbasetemp() / "tenth.gguf"
    if not path.exists():
        synthetic_gguf(path, Shape("llama", 2048, 6, 16, 16, 5632, 8000))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), mode],
        capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    planned, peak = json.loads(done.stdout)
    assert peak > 240e6
    assert planned == pytest.approx(peak, rel=0.10)


def test_the_kernels_account_of_this_process() -> None:
    found = measured()
    assert 0 < found.rss <= found.peak_rss
    assert found.anonymous + found.mapped <= found.rss
