"""The rewritten face graphs: every operator and rewrite against PyTorch, and the shipped files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from mse_export.face_graph import _padding, to_onnx  # noqa: E402
from mse_export.face_models import NETWORKS  # noqa: E402
from mse_export.face_tflite import Network, Operator  # noqa: E402
from mse_runtime.errors import UsageError  # noqa: E402
from mse_runtime.features.mesh import MODEL_FOLDER  # noqa: E402

SIZE = 16


class Sketch:
    """Builds a small Network, and what PyTorch makes of it."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.operators: list[Operator] = []
        self.shapes: dict[int, tuple[int, ...]] = {0: (1, SIZE, SIZE, 3)}
        self.count = 0

    def add(self, kind: str, *inputs: int, shape: tuple[int, ...], **options: Any) -> int:
        self.count += 1
        self.shapes[self.count] = shape
        self.operators.append(Operator(kind, inputs, self.count, **options))
        return self.count

    def weights(self, *shape: int) -> Any:
        values = self.random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        return values.astype(np.float16).astype(np.float32)

    def conv(self, source: int, out: int, kernel: int, stride: int = 1, same: bool = True) -> int:
        _, rows, columns, channels = self.shapes[source]
        side = -(-rows // stride) if same else (rows - kernel) // stride + 1
        assert rows == columns
        return self.add(
            "CONV_2D", source, shape=(1, side, side, out), stride=stride, same=same,
            weight=self.weights(out, kernel, kernel, channels), bias=self.weights(out),
        )  # fmt: skip

    def depthwise(self, source: int, stride: int = 1) -> int:
        _, rows, _, channels = self.shapes[source]
        side = -(-rows // stride)
        return self.add(
            "DEPTHWISE_CONV_2D", source, shape=(1, side, side, channels), stride=stride, same=True,
            weight=self.weights(1, 3, 3, channels), bias=self.weights(channels),
        )  # fmt: skip

    def bend(self, source: int, kind: str) -> int:
        shape = self.shapes[source]
        slopes = self.random.uniform(-0.5, 1.5, shape[-1]).astype(np.float32)
        weight = slopes if kind == "PRELU" else None
        return self.add(kind, source, shape=shape, weight=weight)

    def network(self, **outputs: int) -> Network:
        ends = tuple(outputs.items())
        return Network(tuple(self.operators), 0, "picture", ends, self.shapes)


def by_torch(network: Network, picture: Any) -> dict[str, Any]:
    """The network by its definition: channels first, TensorFlow's padding spelt out."""
    functional = torch.nn.functional
    values = {network.input: torch.from_numpy(picture.transpose(0, 3, 1, 2).copy())}
    for o in network.operators:
        x = [values[t] for t in o.inputs]
        if "CONV_2D" in o.kind:
            depthwise = o.kind.startswith("DEPTHWISE")
            assert o.weight is not None
            order = (3, 0, 1, 2) if depthwise else (0, 3, 1, 2)
            weight = torch.from_numpy(o.weight.transpose(order).copy())
            top, bottom = _padding(x[0].shape[2], weight.shape[2], o.stride, o.same)
            padded = functional.pad(x[0], (top, bottom, top, bottom))
            groups = padded.shape[1] if depthwise else 1
            bias = torch.from_numpy(o.bias)
            y = functional.conv2d(padded, weight, bias, stride=o.stride, groups=groups)
        elif o.kind == "PRELU":
            y = functional.prelu(x[0], torch.from_numpy(o.weight))
        elif o.kind == "RELU":
            y = functional.relu(x[0])
        elif o.kind == "ADD":
            y = x[0] + x[1]
        elif o.kind == "MAX_POOL_2D":
            y = functional.max_pool2d(x[0], 2)
        elif o.kind == "PAD":
            more = network.shapes[o.output][3] - x[0].shape[1]
            y = functional.pad(x[0], (0, 0, 0, 0, 0, more))
        elif o.kind == "RESHAPE":
            y = x[0].permute(0, 2, 3, 1).reshape(len(picture), *network.shapes[o.output][1:])
        else:
            y = torch.cat(x, o.axis)
        values[o.output] = y
    ends = {}
    for name, tensor in network.outputs:
        value = values[tensor]
        ends[name] = (value.permute(0, 2, 3, 1) if value.ndim == 4 else value).numpy()
    return ends


def agree(network: Network) -> Any:
    """Compare on a batch of three; the session's graph after ONNX Runtime's rewriting."""
    model = to_onnx(network)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    picture = np.random.default_rng(9).random((3, SIZE, SIZE, 3), dtype=np.float32)
    expected = by_torch(network, picture)
    values = session.run(None, {"picture": picture})
    for output, value in zip(session.get_outputs(), values, strict=True):
        assert value.shape == expected[output.name].shape
        assert np.abs(value - expected[output.name]).max() < 1e-5
    return model


@pytest.mark.parametrize("bend", ["PRELU", "RELU"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("narrow", "wide"), [(16, 32), (24, 28), (24, 40)])
def test_residual_network(bend: str, kernel: int, narrow: int, wide: int) -> None:
    """Strided start, residual block, stride with pooling and channel padding, two heads."""
    net = Sketch(kernel)
    x = net.bend(net.conv(0, narrow, kernel, stride=2), bend)
    y = net.conv(net.depthwise(x), narrow, 1)
    x = net.bend(net.add("ADD", x, y, shape=net.shapes[x]), bend)
    y = net.conv(net.depthwise(x, stride=2), wide, 1)
    side = SIZE // 4
    pooled = net.add("MAX_POOL_2D", x, shape=(1, side, side, narrow), stride=2)
    padded = net.add("PAD", pooled, shape=(1, side, side, wide))
    x = net.bend(net.add("ADD", padded, y, shape=(1, side, side, wide)), bend)
    point = net.conv(x, 7, side, same=False)
    boxes = net.add("RESHAPE", net.conv(x, 6, 1), shape=(1, side * side * 2, 3))
    more = net.add("RESHAPE", net.conv(x, 3, 1), shape=(1, side * side, 3))
    joined = net.add("CONCATENATION", boxes, more, shape=(1, side * side * 3, 3), axis=1)
    agree(net.network(point=point, boxes=joined))


def test_bottleneck_carries_the_other_sign() -> None:
    net = Sketch(3)
    x = net.bend(net.conv(0, 32, 3, stride=2), "PRELU")
    y = net.bend(net.conv(x, 16, 1), "PRELU")  # read by a depthwise convolution alone
    y = net.conv(net.depthwise(y), 32, 1)
    x = net.bend(net.add("ADD", x, y, shape=net.shapes[x]), "PRELU")
    end = net.add("RESHAPE", net.conv(x, 5, SIZE // 2, same=False), shape=(1, 5))
    model = agree(net.network(end=end))
    relus = [node for node in model.graph.node if node.op_type == "Relu"]
    makers = {output: node for node in model.graph.node for output in node.output}
    groups = [makers[relu.input[0]].attribute for relu in relus]
    depthwise = [any(a.name == "group" and a.i > 1 for a in each) for each in groups]
    assert depthwise == [True, False, True]  # the middle one needed no change of sign


def test_only_the_wanted_part_is_kept() -> None:
    net = Sketch(4)
    trunk = net.bend(net.conv(0, 16, 3, stride=2), "PRELU")
    one, two = (net.conv(trunk, n, SIZE // 2, same=False) for n in (4, 5))
    network = net.network(one=one, two=two)
    part = network.only(("two",))
    assert len(part.operators) == len(network.operators) - 1
    agree(part)
    with pytest.raises(UsageError, match="three"):
        network.only(("three",))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_shipped_files(network: Any) -> None:
    """Batch stays symbolic, outputs are the named ones, a row doesn't depend on its batch."""
    path = Path(MODEL_FOLDER) / f"{network.name}.onnx"
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert tuple(output.name for output in session.get_outputs()) == network.outputs
    port = session.get_inputs()[0]
    assert port.shape[0] == "N"
    pictures = np.random.default_rng(5).random((2, *port.shape[1:]), dtype=np.float32)
    both = session.run(None, {port.name: pictures})
    alone = session.run(None, {port.name: pictures[1:]})
    for batch, single in zip(both, alone, strict=True):
        assert np.allclose(batch[1], single[0], atol=1e-3)
