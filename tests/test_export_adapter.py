"""The torch adapter and its ONNX graph against the golden sets and against each other."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens import (
    AdapterGolden,
    compare_adapter_outputs,
    detgen,
    load_adapter_golden,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from mse_export.adapter import Adapter, adapter_from_state, init_random  # noqa: E402
from mse_export.adapter_shapes import AdapterDims, infer_dims, parameter_shapes  # noqa: E402
from mse_export.onnx_graph import build, optimise  # noqa: E402
from mse_runtime.errors import BundleError  # noqa: E402

SETS = (
    "chatglm3-cherma",
    "chatglm3-mosei",
    "llama2-cherma",
    "llama2-meld",
    "llama2-mosei",
    "qwen-iemocap",
    "qwen-meld",
    "qwen-mosei",
    "qwen-simsv2",
)
TOLERANCE = 1e-5


def session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def as_torch(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def random_inputs(dims: AdapterDims, lengths: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Inputs whose padded tails are huge: any leak shows."""
    batch = len(lengths)
    columns = list(zip(*lengths, strict=True))
    inputs: dict[str, Any] = {}
    for i, (name, width) in enumerate(
        (("audio", dims.audio_dim), ("video", dims.video_dim), ("text", dims.n_embd))
    ):
        steps = max(*columns[i], 1) + 2
        values = detgen(zlib.crc32(name.encode()), (batch, steps, width))
        for row, length in enumerate(columns[i]):
            values[row, length:] = 1e4
        inputs[name] = values
        inputs[f"{name}_len"] = np.array(columns[i], np.int64)
    return inputs


@pytest.mark.parametrize("name", SETS)
def test_golden_set(name: str, test_data: Callable[[str], Path]) -> None:
    golden = load_adapter_golden(test_data("golden/adapter"), name)
    adapter = adapter_from_state({k: torch.from_numpy(v) for k, v in golden.weights.items()})
    with torch.no_grad():
        traced = adapter.trace(**as_torch(golden.inputs))
    errors = compare_adapter_outputs({k: v.numpy() for k, v in traced.items()}, golden)
    assert len(errors) == 11
    assert max(errors.values()) <= TOLERANCE, errors

    for model in (build(golden.weights), optimise(build(golden.weights))):
        (pseudo,) = session(model).run(["pseudo"], golden.inputs)
        errors = compare_adapter_outputs({"pseudo": pseudo}, golden)
        assert max(errors.values()) <= TOLERANCE, errors


def test_half_precision_weights(test_data: Callable[[str], Path]) -> None:
    golden: AdapterGolden = load_adapter_golden(test_data("golden/adapter"), "qwen-meld")
    full, half = build(golden.weights), optimise(build(golden.weights, "fp16"))
    assert half.ByteSize() < 0.52 * full.ByteSize()
    (pseudo,) = session(half).run(["pseudo"], golden.inputs)
    assert compare_adapter_outputs({"pseudo": pseudo}, golden)["pseudo"] <= 3e-3


SMALL = AdapterDims(n_embd=64, audio_dim=5, video_dim=7, audio_hidden=6, video_hidden=4, n_pseudo=3)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4
    )
)
def test_torch_equals_onnx_for_any_lengths(lengths: list[tuple[int, int, int]]) -> None:
    adapter = init_random(SMALL, 3)
    inputs = random_inputs(SMALL, lengths)
    with torch.no_grad():
        expected = adapter(**as_torch(inputs)).numpy()
    (found,) = _small_session().run(["pseudo"], inputs)
    assert found.shape == (len(lengths), 3, 64)
    assert relative_error(found, expected) <= TOLERANCE


_SESSIONS: dict[str, Any] = {}


def _small_session() -> Any:
    if "small" not in _SESSIONS:
        _SESSIONS["small"] = session(build(init_random(SMALL, 3).state_dict()))
    return _SESSIONS["small"]


@pytest.mark.parametrize(
    "dims",
    [
        AdapterDims(192, 13, 167, 64, 32, 4),
        AdapterDims(40, 1, 1, 1, 2, 1),
        AdapterDims(896, 25, 177, 16, 48, 8),
    ],
)
def test_any_dimensions(dims: AdapterDims) -> None:
    adapter = init_random(dims, 1)
    assert sum(p.numel() for p in adapter.parameters()) == dims.parameters
    assert {k: tuple(v.shape) for k, v in adapter.state_dict().items()} == parameter_shapes(dims)
    inputs = random_inputs(dims, [(4, 1, 3), (0, 5, 1)])
    with torch.no_grad():
        expected = adapter(**as_torch(inputs)).numpy()
    (found,) = session(build(adapter.state_dict())).run(["pseudo"], inputs)
    assert relative_error(found, expected) <= TOLERANCE


def test_length_zero_is_the_linear_bias() -> None:
    adapter = init_random(SMALL, 5)
    with torch.no_grad():
        traced = adapter.trace(**as_torch(random_inputs(SMALL, [(0, 3, 2), (2, 0, 2)])))
    assert torch.equal(traced["audio_h"][0], adapter.audio_LSTM.linear.bias)
    assert torch.equal(traced["video_h"][1], adapter.video_LSTM.linear.bias)
    assert not torch.equal(traced["audio_h"][1], adapter.audio_LSTM.linear.bias)


def test_nan_in_the_padding_reaches_neither_output_nor_gradient() -> None:
    adapter = init_random(SMALL, 5).train()
    inputs = random_inputs(SMALL, [(2, 3, 2), (4, 1, 1)])
    for name in ("audio", "video", "text"):
        inputs[name][inputs[name] == 1e4] = np.nan
    pseudo = adapter(**as_torch(inputs))
    pseudo.square().mean().backward()
    assert torch.isfinite(pseudo).all()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)


def test_parameter_counts_of_the_published_runs() -> None:
    """Figures from the published logs (published-model spec, section 9)."""
    assert AdapterDims(4096, 74, 35, 64, 32, 4).parameters == 2_631_692
    assert AdapterDims(4096, 25, 177, 64, 64, 4).parameters == 2_680_716


def test_random_initialisation_is_reproducible_and_local() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = (init_random(SMALL, s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    name = "text_guide_mixer.text_mlp.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_wrong_state_names_the_first_parameter() -> None:
    state = dict(Adapter(SMALL).state_dict())
    missing = {k: v for k, v in state.items() if k != "mutli_scale_fusion.scale2.0.bias"}
    with pytest.raises(BundleError, match=r"scale2\.0\.bias.*missing"):
        adapter_from_state(missing)
    misshapen = state | {"video_LSTM.linear.weight": torch.zeros(256, 9)}
    with pytest.raises(BundleError, match=r"video_LSTM\.linear\.weight.*\[256, 9\].*\[256, 4\]"):
        adapter_from_state(misshapen)
    with pytest.raises(BundleError, match="not an MSE-Adapter"):
        infer_dims({"lm_head.weight": (2, 2)})


def test_graph_has_dynamic_axes_and_one_lstm_per_modality() -> None:
    model = build(init_random(SMALL, 3).state_dict())
    shapes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "audio": ["B", "Ta", 5],
        "audio_len": ["B"],
        "video": ["B", "Tv", 7],
        "video_len": ["B"],
        "text": ["B", "Tt", 64],
        "text_len": ["B"],
        "pseudo": ["B", 3, 64],
    }
    lstms = [node for node in model.graph.node if node.op_type == "LSTM"]
    assert len(lstms) == 2
    assert all(len(node.input) == 5 for node in lstms)
