"""A face network as an ONNX graph that ONNX Runtime can keep in its blocked layout throughout.

The plain translation is three times slower: PRelu, channel padding and transposes all leave the
NCHWc layout that its fast convolutions use. Standard operators only (opset 13), same values:

- The picture [N, H, W, 3] is seen as [N, 1, H, 3W] by a first convolution of width 3k and stride
  3s: no transpose.
- PRelu(x) = x + (1 - a) Relu(-x): two depthwise 1x1 convolutions, Relu fused into the first, the
  addition into the second. Between a convolution and a depthwise one the value is carried with the
  opposite sign, which both take for nothing: -PRelu(x) = s + (a - 1) Relu(s), s = -x.
- Channel padding before an addition: the convolution that is added is cut in two along its output
  channels; only the first half gets the residual, and the halves are put side by side.
- Channel counts are filled up with zero weights to a multiple of BLOCK.
- Weights that are float16 numbers are stored as such and widened when the session is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_export.face_tflite import Network, Operator
from mse_runtime.errors import UsageError

__all__ = ["to_onnx"]

BLOCK = 16  # channels in a block of the NCHWc layout with AVX-512; a multiple of AVX2's 8
OPSET, IR_VERSION = 13, 7
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Value:
    """A tensor of the new graph: its channels with and without filling, the sign it carries."""

    name: str
    channels: int
    filled: int
    sign: int = 1


def to_onnx(network: Network) -> Any:
    """The ONNX model (onnx.ModelProto) of a face network, batch symbolic."""
    return _Converter(network).model()


def _fill(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK


def _padding(size: int, kernel: int, stride: int, same: bool) -> tuple[int, int]:
    """TensorFlow's SAME padding before and after, which is uneven for strides over 1."""
    if not same:
        return 0, 0
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class _Converter:
    def __init__(self, network: Network) -> None:
        from onnx import helper

        self._helper = helper
        self._network = network
        self._nodes: list[Any] = []
        self._constants: dict[tuple[Any, ...], tuple[str, NDArray[Any]]] = {}
        self._values: dict[int, Value] = {}
        self._waiting: dict[int, Operator] = {}  # padding and convolutions, until their Add
        self._bends = any(o.kind == "PRELU" for o in network.operators)
        self._names = {tensor: name for name, tensor in network.outputs}
        self._heads = self._find_heads()

    def _find_heads(self) -> set[int]:
        """Convolutions whose result leaves the network rather than being convolved again."""
        ends = set(self._names)
        for operator in reversed(self._network.operators):
            if operator.output in ends and operator.kind in ("RESHAPE", "CONCATENATION"):
                ends.update(operator.inputs)
        return {o.output for o in self._network.operators if o.output in ends and "CONV" in o.kind}

    # --- the graph's parts ----------------------------------------------------------------------

    def _constant(self, value: NDArray[Any]) -> str:
        value = np.ascontiguousarray(value)
        key = (value.dtype.str, value.shape, value.tobytes())
        name = f"{'w' if value.dtype == np.float32 else 'k'}{len(self._constants)}"
        return self._constants.setdefault(key, (name, value))[0]

    def _node(self, kind: str, inputs: list[str], output: str | None = None, **options: Any) -> str:
        output = output or f"v{len(self._nodes)}"
        self._nodes.append(
            self._helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **options)
        )
        return output

    def _scaled(self, value: str, factors: Floats) -> str:
        """Each channel times its factor: a depthwise 1x1 convolution stays in the layout."""
        weight = factors.reshape(-1, 1, 1, 1).astype(np.float32)
        return self._node(
            "Conv", [value, self._constant(weight)], kernel_shape=[1, 1], group=len(factors)
        )

    def _conv(
        self, operator: Operator, source: Value, sign: int = 1, part: slice = slice(None)
    ) -> Value:
        """One convolution, or the output channels `part` of it."""
        assert operator.weight is not None
        assert operator.bias is not None
        depthwise = operator.kind.startswith("DEPTHWISE")
        weight = operator.weight.transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
        bias = operator.bias
        out, height, width = len(bias), *weight.shape[2:]
        filled = out if operator.output in self._heads else _fill(out)
        full = np.zeros((filled, 1 if depthwise else source.filled, height, width), np.float32)
        full[:out, : weight.shape[1]] = weight
        full_bias = np.zeros(filled, np.float32)
        full_bias[:out] = bias
        rows, columns = self._network.shapes[operator.inputs[0]][1:3]
        top, bottom = _padding(rows, height, operator.stride, operator.same)
        left, right = _padding(columns, width, operator.stride, operator.same)
        name = self._node(
            "Conv",
            [
                source.name,
                self._constant(full[part] * np.float32(source.sign * sign)),
                self._constant(full_bias[part] * np.float32(sign)),
            ],
            kernel_shape=[height, width],
            strides=[operator.stride] * 2,
            pads=[top, left, bottom, right],
            group=filled if depthwise else 1,
        )
        return Value(name, out, len(full_bias[part]), sign)

    def _first_conv(self, operator: Operator) -> Value:
        """The convolution of the picture, without moving its channels to the front."""
        assert operator.weight is not None
        assert operator.bias is not None
        _, rows, columns, channels = self._network.shapes[self._network.input]
        out, height, width, _ = operator.weight.shape
        filled, stride = _fill(out), operator.stride
        weight = np.zeros((filled, 1, height, width * channels), np.float32)
        weight[:out, 0] = operator.weight.reshape(out, height, width * channels)
        bias = np.zeros(filled, np.float32)
        bias[:out] = operator.bias
        top, bottom = _padding(rows, height, stride, operator.same)
        left, right = _padding(columns, width, stride, operator.same)
        shape = self._constant(np.array([0, 1, rows, columns * channels], np.int64))
        flat = self._node("Reshape", [self._network.input_name, shape])
        name = self._node(
            "Conv",
            [flat, self._constant(weight), self._constant(bias)],
            kernel_shape=[height, width * channels],
            strides=[stride, stride * channels],
            pads=[top, left * channels, bottom, right * channels],
        )
        return Value(name, out, filled)

    # --- operators ------------------------------------------------------------------------------

    def _emit(self, operator: Operator) -> None:
        method = getattr(self, f"_emit_{operator.kind.lower()}", None)
        if method is None:
            raise UsageError(f"no translation for {operator.kind}.")
        method(operator)

    def _emit_conv_2d(self, operator: Operator) -> None:
        output = operator.output
        if operator.inputs[0] == self._network.input:
            self._values[output] = self._first_conv(operator)
        elif self._feeds_padded_add(output):
            self._waiting[output] = operator
        else:
            sign = -1 if self._bends_between_convs(output) else 1
            self._values[output] = self._conv(operator, self._values[operator.inputs[0]], sign)

    def _emit_depthwise_conv_2d(self, operator: Operator) -> None:
        source = self._values[operator.inputs[0]]
        self._values[operator.output] = self._conv(operator, source)

    def _bends_between_convs(self, tensor: int) -> bool:
        """Whether only a PRelu reads the tensor, and only a depthwise convolution reads that."""
        bend = self._sole_reader(tensor)
        if bend is None or bend.kind != "PRELU":
            return False
        after = self._sole_reader(bend.output)
        return after is not None and after.kind == "DEPTHWISE_CONV_2D"

    def _sole_reader(self, tensor: int) -> Operator | None:
        readers = [o for o in self._network.operators if tensor in o.inputs]
        return readers[0] if len(readers) == 1 and tensor not in self._names else None

    def _feeds_padded_add(self, tensor: int) -> bool:
        add = self._sole_reader(tensor)
        if add is None or add.kind != "ADD":
            return False
        pads = {o.output for o in self._network.operators if o.kind == "PAD"}
        return any(other in pads for other in add.inputs)

    def _emit_pad(self, operator: Operator) -> None:
        self._waiting[operator.output] = operator

    def _emit_add(self, operator: Operator) -> None:
        waiting = {
            self._waiting[t].kind: self._waiting[t] for t in operator.inputs if t in self._waiting
        }
        if waiting:
            self._values[operator.output] = self._padded_add(waiting["CONV_2D"], waiting["PAD"])
            return
        a, b = (self._values[t] for t in operator.inputs)
        name = self._node("Add", [b.name, a.name])
        self._values[operator.output] = Value(name, a.channels, a.filled)

    def _padded_add(self, conv: Operator, pad: Operator) -> Value:
        residual = self._values[pad.inputs[0]]
        source = self._values[conv.inputs[0]]
        assert conv.bias is not None
        out = len(conv.bias)
        if _fill(out) == residual.filled:  # the filling already is the padding
            whole = self._conv(conv, source)
            return Value(self._node("Add", [whole.name, residual.name]), out, residual.filled)
        low = self._conv(conv, source, part=slice(0, residual.filled))
        high = self._conv(conv, source, part=slice(residual.filled, _fill(out)))
        halves = [self._node("Add", [low.name, residual.name]), high.name]
        if not self._bends:  # a plain Relu follows: done before joining, it is fused
            halves = [self._node("Relu", [half]) for half in halves]
        return Value(self._node("Concat", halves, axis=1), out, _fill(out))

    def _emit_relu(self, operator: Operator) -> None:
        source = self._values[operator.inputs[0]]
        last = self._nodes[-1]
        if source.name == last.output[0] and last.op_type == "Concat":
            self._values[operator.output] = source  # both halves went through it
            return
        name = self._node("Relu", [source.name])
        self._values[operator.output] = Value(name, source.channels, source.filled)

    def _emit_prelu(self, operator: Operator) -> None:
        assert operator.weight is not None
        source = self._values[operator.inputs[0]]
        factors = np.zeros(source.filled, np.float32)
        factors[: source.channels] = source.sign * (1 - operator.weight)
        below = source.name
        if source.sign > 0:
            below = self._scaled(below, -np.ones(source.filled, np.float32))
        bent = self._scaled(self._node("Relu", [below]), factors)
        name = self._node("Add", [bent, source.name])
        self._values[operator.output] = Value(name, source.channels, source.filled, source.sign)

    def _emit_max_pool_2d(self, operator: Operator) -> None:
        source = self._values[operator.inputs[0]]
        name = self._node("MaxPool", [source.name], kernel_shape=[2, 2], strides=[2, 2])
        self._values[operator.output] = Value(name, source.channels, source.filled)

    def _emit_reshape(self, operator: Operator) -> None:
        """From NCHW back to TFLite's order, then to the shape it wants."""
        source = self._values[operator.inputs[0]]
        rows, columns = self._network.shapes[operator.inputs[0]][1:3]
        name = source.name
        if rows * columns > 1:
            name = self._node("Transpose", [name], perm=[0, 2, 3, 1])
        wanted = self._network.shapes[operator.output]
        shape = self._constant(np.array([0, *wanted[1:]], np.int64))
        out = self._node("Reshape", [name, shape], self._names.get(operator.output))
        self._values[operator.output] = Value(out, source.channels, source.channels)

    def _emit_concatenation(self, operator: Operator) -> None:
        parts = [self._values[t].name for t in operator.inputs]
        name = self._node("Concat", parts, self._names.get(operator.output), axis=operator.axis)
        self._values[operator.output] = Value(name, 0, 0)

    # --- the whole ------------------------------------------------------------------------------

    def model(self) -> Any:
        import onnx

        for operator in self._network.operators:
            self._emit(operator)
        for name, tensor in self._network.outputs:  # a convolution that is itself an output
            if self._values[tensor].name != name:
                shape = self._constant(np.array([0, *self._network.shapes[tensor][1:]], np.int64))
                self._node("Reshape", [self._values[tensor].name, shape], name)
        casts, initializers = self._storage()
        graph = self._helper.make_graph(
            [*casts, *self._nodes],
            "face",
            [self._port(self._network.input_name, self._network.input)],
            [self._port(name, tensor) for name, tensor in self._network.outputs],
            initializers,
        )
        model = self._helper.make_model(
            graph,
            opset_imports=[self._helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="mse-export",
        )
        onnx.checker.check_model(model)
        return model

    def _port(self, name: str, tensor: int) -> Any:
        from onnx import TensorProto

        shape = ["N", *self._network.shapes[tensor][1:]]
        return self._helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def _storage(self) -> tuple[list[Any], list[Any]]:
        from onnx import TensorProto, numpy_helper

        casts, stored = [], []
        for name, value in self._constants.values():
            half = value.astype(np.float16) if value.dtype == np.float32 else None
            if half is not None and value.size >= 64 and (half.astype(np.float32) == value).all():
                stored.append(numpy_helper.from_array(half, f"{name}h"))
                casts.append(
                    self._helper.make_node(
                        "Cast", [f"{name}h"], [name], name=f"Cast_{name}", to=TensorProto.FLOAT
                    )
                )
            else:
                stored.append(numpy_helper.from_array(value, name))
        return casts, stored
