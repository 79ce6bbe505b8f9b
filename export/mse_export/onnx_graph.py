"""The adapter as an ONNX graph, built node by node.

torch's exporters drop the LSTM's `sequence_lens` or refuse it; without it padding would leak into
the recurrence. Foldings (published-model spec, section 1.4): the two LSTM biases are added, the
(1, 3) convolution goes into the experts' second layers, and the three experts become one pair of
matrices, so the graph has two LSTM nodes and seven small matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mse_export.adapter_shapes import AdapterDims, infer_dims

__all__ = ["as_array", "build", "optimise", "save"]

Precision = Literal["fp32", "fp16"]
Array = NDArray[np.float32]

OPSET = 20  # the first with Gelu
IR_VERSION = 10


class _Graph:
    """Collects nodes and initialisers; weights may be stored as fp16 and cast when loaded."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        value = np.ascontiguousarray(value)
        # Biases stay fp32: they are a thousandth of the bytes and keep the additions exact.
        if self.precision == "fp16" and value.dtype == np.float32 and max(value.shape) < value.size:
            self.initializers.append(
                numpy_helper.from_array(value.astype(np.float16), f"{name}_fp16")
            )
            return self.node("Cast", [f"{name}_fp16"], name, to=TensorProto.FLOAT)
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def linear(self, x: str, weight: Array, bias: Array, name: str) -> str:
        """x [B,in] -> [B,out] with torch's weight [out,in]."""
        w = self.constant(f"{name}.weight", weight)
        b = self.constant(f"{name}.bias", bias)
        return self.node("Gemm", [x, w, b], name, transB=1)


def _gates(matrix: Array) -> Array:
    """Gate rows from torch's i,f,g,o to ONNX's i,o,f,c."""
    i, f, g, o = np.split(matrix, 4, axis=0)
    return np.concatenate([i, o, f, g], axis=0)


def _encoder(graph: _Graph, weights: Mapping[str, Array], modality: str) -> str:
    """The final hidden state after `<modality>_len` steps, then the linear map: [B,256]."""
    prefix = f"{modality}_LSTM"
    recurrent = weights[f"{prefix}.rnn.weight_hh_l0"]
    hidden = recurrent.shape[1]
    bias = weights[f"{prefix}.rnn.bias_ih_l0"] + weights[f"{prefix}.rnn.bias_hh_l0"]
    w = graph.constant(f"{prefix}.W", _gates(weights[f"{prefix}.rnn.weight_ih_l0"])[None])
    r = graph.constant(f"{prefix}.R", _gates(recurrent)[None])
    b = graph.constant(f"{prefix}.B", np.concatenate([_gates(bias), np.zeros_like(bias)])[None])
    # The LSTM operator wants time first and int32 lengths.
    frames = graph.node("Transpose", [modality], f"{modality}_time_major", perm=[1, 0, 2])
    lengths = graph.node("Cast", [f"{modality}_len"], f"{modality}_len32", to=TensorProto.INT32)
    last = f"{modality}_last"
    graph.nodes.append(
        helper.make_node(
            "LSTM", [frames, w, r, b, lengths], ["", last], name=prefix, hidden_size=hidden
        )
    )
    flat = graph.node("Squeeze", [last, "axis0"], f"{modality}_hidden")
    return graph.linear(
        flat,
        weights[f"{prefix}.linear.weight"],
        weights[f"{prefix}.linear.bias"],
        f"{prefix}.linear",
    )


def _pooled_text(graph: _Graph) -> str:
    """Mean of the first `text_len` rows of text [B,Tt,D]; no row at all gives zeros."""
    shape = graph.node("Shape", ["text"], "text_steps", start=1, end=2)
    steps = graph.node("Squeeze", [shape, "axis0"], "text_steps_scalar")
    index = graph.node("Range", ["zero", steps, "one"], "text_index")
    lengths = graph.node("Unsqueeze", ["text_len", "axis1"], "text_len_column")
    valid = graph.node("Less", [index, lengths], "text_valid")
    mask = graph.node("Unsqueeze", [valid, "axis2"], "text_mask")
    kept = graph.node("Where", [mask, "text", "zero_f"], "text_kept")
    total = graph.node("ReduceSum", [kept, "axis1"], "text_total", keepdims=0)
    count = graph.node("Max", [lengths, "one"], "text_count")
    divisor = graph.node("Cast", [count], "text_divisor", to=TensorProto.FLOAT)
    return graph.node("Div", [total, divisor], "text_mean")


def _experts(weights: Mapping[str, Array]) -> tuple[Array, Array, Array, Array]:
    """The three experts and the convolution as one two-layer map (W1, b1, W2, b2)."""
    fusion = "mutli_scale_fusion"
    mix = weights[f"{fusion}.integrating.Integrating_layer.0.weight"].reshape(3)
    bias = weights[f"{fusion}.integrating.Integrating_layer.0.bias"].reshape(1)
    scales = [f"{fusion}.scale{i}" for i in (1, 2, 3)]
    w1 = np.concatenate([weights[f"{s}.0.weight"] for s in scales], axis=0)
    b1 = np.concatenate([weights[f"{s}.0.bias"] for s in scales])
    w2 = np.concatenate(
        [weights[f"{s}.2.weight"] * m for s, m in zip(scales, mix, strict=True)], axis=1
    )
    b2 = bias + sum(weights[f"{s}.2.bias"] * m for s, m in zip(scales, mix, strict=True))
    return w1, b1, w2, b2.astype(np.float32)


def build(state: Mapping[str, Any], precision: Precision = "fp32") -> onnx.ModelProto:
    """ONNX model of the adapter, checked and shape-inferred.

    state: parameters without `Model.`, as torch tensors or numpy arrays.
    precision: "fp16" stores matrices as fp16 and computes in fp32 (half the file).
    Inputs: audio f32 [B,Ta,da], audio_len int64 [B], video f32 [B,Tv,dv], video_len int64 [B],
    text f32 [B,Tt,D], text_len int64 [B]; output pseudo f32 [B,P,D]. A length of 0 gives h = 0.
    Raises BundleError for a missing or misshapen parameter.
    """
    weights = {name: as_array(value) for name, value in state.items()}
    dims = infer_dims({name: value.shape for name, value in weights.items()})
    graph = _Graph(precision)
    for name, value in (
        ("axis0", np.array([0], np.int64)),
        ("axis1", np.array([1], np.int64)),
        ("axis2", np.array([2], np.int64)),
        ("zero", np.array(0, np.int64)),
        ("one", np.array(1, np.int64)),
        ("zero_f", np.array(0, np.float32)),
    ):
        graph.initializers.append(numpy_helper.from_array(value, name))
    mixer = "text_guide_mixer.text_mlp"
    fusion = "mutli_scale_fusion"
    audio, video = (_encoder(graph, weights, m) for m in ("audio", "video"))
    gate = graph.linear(
        _pooled_text(graph), weights[f"{mixer}.weight"], weights[f"{mixer}.bias"], mixer
    )
    both = graph.node("Add", [audio, video], "encoders")
    z = graph.node("Mul", [gate, both], "tgm")
    w1, b1, w2, b2 = _experts(weights)
    inner = graph.node("Gelu", [graph.linear(z, w1, b1, "experts.0")], "experts.gelu")
    mixed = graph.linear(inner, w2, b2, "experts.2")
    wide = graph.linear(
        mixed,
        weights[f"{fusion}.multi_scale_projector.weight"],
        weights[f"{fusion}.multi_scale_projector.bias"],
        "multi_scale",
    )
    rows = graph.node("Unsqueeze", [wide, "axis1"], "multi_scale_row")
    scale = weights[f"{fusion}.projector.weight"].reshape(1, dims.n_pseudo, 1)
    shift = weights[f"{fusion}.projector.bias"].reshape(1, dims.n_pseudo, 1)
    scaled = graph.node("Mul", [rows, graph.constant("projector.weight", scale)], "pseudo_scaled")
    graph.node("Add", [scaled, graph.constant("projector.bias", shift)], "pseudo")
    return _finish(graph, dims)


def as_array(value: Any) -> Array:
    """A torch tensor or array-like as float32 numpy array."""
    if hasattr(value, "detach"):
        value = value.detach().to("cpu").float().numpy()
    return np.asarray(value, dtype=np.float32)


def _finish(graph: _Graph, dims: AdapterDims) -> onnx.ModelProto:
    def info(name: str, kind: int, shape: list[str | int]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        info("audio", f32, ["B", "Ta", dims.audio_dim]),
        info("audio_len", i64, ["B"]),
        info("video", f32, ["B", "Tv", dims.video_dim]),
        info("video_len", i64, ["B"]),
        info("text", f32, ["B", "Tt", dims.n_embd]),
        info("text_len", i64, ["B"]),
    ]
    outputs = [info("pseudo", f32, ["B", dims.n_pseudo, dims.n_embd])]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "mse_adapter", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mse-export",
    )
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def optimise(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's hardware-independent graph optimisations, applied now instead of at load.

    Only the basic level: the extended one writes operators that exist for one execution
    provider alone. fp16 weights keep their Cast (folding it would store them as fp32 again).
    """
    import tempfile

    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if any(init.data_type == TensorProto.FLOAT16 for init in model.graph.initializer):
        disabled = ["ConstantFolding"]
    else:
        disabled = []
    with tempfile.TemporaryDirectory(prefix="mse-export-") as folder:
        target = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=disabled,
        )
        optimised = onnx.load(target)
    onnx.checker.check_model(optimised)
    return optimised


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model; the caller owns atomicity (bundles are written under a temporary name)."""
    path.write_bytes(model.SerializeToString())
