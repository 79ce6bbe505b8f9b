"""Read a small TFLite network into plain Python: operators, their weights and shapes.

Just what the three face networks use: convolutions (also depthwise), PRelu, Relu, Add, channel
padding, max pooling, reshapes, concatenation, and weights stored as float16. Needs the package
`tflite` (the generated schema, 2 MB).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mse_runtime.errors import UsageError

__all__ = ["Network", "Operator", "read_tflite"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Operator:
    """One operator; constants are taken out of `inputs`.

    kind: TFLite's name; inputs, output: tensor numbers; stride: rows and columns alike; same:
    TensorFlow's SAME padding; weight: TFLite's layout ([out, h, w, in], depthwise [1, h, w, c]).
    """

    kind: str
    inputs: tuple[int, ...]
    output: int
    weight: Floats | None = None
    bias: Floats | None = None
    stride: int = 1
    same: bool = False
    axis: int = 0


@dataclass(frozen=True)
class Network:
    """Operators in order; `shapes` are NHWC, `outputs` (name, tensor) in the file's order."""

    operators: tuple[Operator, ...]
    input: int
    input_name: str
    outputs: tuple[tuple[str, int], ...]
    shapes: dict[int, tuple[int, ...]] = field(repr=False)

    def only(self, names: tuple[str, ...]) -> Network:
        """The part that the named outputs need."""
        kept = tuple((name, tensor) for name, tensor in self.outputs if name in names)
        if len(kept) != len(names):
            raise UsageError(f"the network has outputs {self.outputs}, not all of {names}.")
        wanted = {tensor for _, tensor in kept}
        needed = []
        for operator in reversed(self.operators):
            if operator.output in wanted:
                wanted.update(operator.inputs)
                needed.append(operator)
        return Network(tuple(needed[::-1]), self.input, self.input_name, kept, self.shapes)


def read_tflite(data: bytes) -> Network:
    """The network in a .tflite file's bytes; UsageError for operators that are not expected."""
    try:
        tflite = importlib.import_module("tflite")
    except ImportError as error:
        raise UsageError("reading .tflite needs `pip install tflite`.") from error
    return _Reader(tflite, tflite.Model.GetRootAsModel(data, 0)).network()


class _Reader:
    def __init__(self, schema: Any, model: Any) -> None:
        self._schema, self._model = schema, model
        self._graph = model.Subgraphs(0)
        names = vars(schema.BuiltinOperator).items()
        self._kinds = {number: name for name, number in names if isinstance(number, int)}
        self._constants: dict[int, NDArray[Any]] = {}

    def network(self) -> Network:
        graph = self._graph
        tensors = range(graph.TensorsLength())
        shapes = {t: tuple(int(n) for n in self._shape(t)) for t in tensors}
        for tensor in tensors:
            self._load(tensor)
        operators = []
        for index in range(graph.OperatorsLength()):
            operator = self._operator(graph.Operators(index))
            if operator is not None:
                operators.append(operator)
        first = int(graph.Inputs(0))
        outputs = [int(graph.Outputs(i)) for i in range(graph.OutputsLength())]
        return Network(
            tuple(operators),
            first,
            self._name(first),
            tuple((self._name(t), t) for t in outputs),
            shapes,
        )

    def _shape(self, tensor: int) -> Any:
        found = self._graph.Tensors(tensor)
        return found.ShapeAsNumpy() if found.ShapeLength() else ()

    def _name(self, tensor: int) -> str:
        return str(self._graph.Tensors(tensor).Name().decode())

    def _load(self, tensor: int) -> None:
        found = self._graph.Tensors(tensor)
        buffer = self._model.Buffers(found.Buffer())
        if not buffer.DataLength():
            return
        types = self._schema.TensorType
        kind = {types.FLOAT32: "<f4", types.FLOAT16: "<f2", types.INT32: "<i4"}[found.Type()]
        raw = np.frombuffer(buffer.DataAsNumpy().tobytes(), kind)
        self._constants[tensor] = raw.reshape(self._shape(tensor))

    def _operator(self, raw: Any) -> Operator | None:
        kind = self._kinds[self._model.OperatorCodes(raw.OpcodeIndex()).BuiltinCode()]
        inputs = [int(raw.Inputs(i)) for i in range(raw.InputsLength())]
        output = int(raw.Outputs(0))
        if kind == "DEQUANTIZE":  # float16 storage: the value is a constant
            self._constants[output] = self._constants[inputs[0]].astype(np.float32)
            return None
        live = tuple(t for t in inputs if t not in self._constants)
        constant = [self._constants[t] for t in inputs if t in self._constants]
        options = self._options(kind, raw)
        if options is not None and options.FusedActivationFunction():
            raise UsageError(f"{kind} with a fused activation is not handled.")
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            if options.DilationHFactor() != 1 or options.StrideH() != options.StrideW():
                raise UsageError(f"{kind} with dilation or uneven strides is not handled.")
            weight, bias = (c.astype(np.float32) for c in constant)
            same = options.Padding() == self._schema.Padding.SAME
            return Operator(kind, live, output, weight, bias, int(options.StrideH()), same)
        if kind == "MAX_POOL_2D":
            if (options.FilterHeight(), options.FilterWidth()) != (2, 2) or options.StrideH() != 2:
                raise UsageError("only 2x2 max pooling with stride 2 is handled.")
            return Operator(kind, live, output, stride=2)
        if kind == "PRELU":
            return Operator(kind, live, output, weight=constant[0].astype(np.float32).ravel())
        if kind == "PAD":
            if constant[0][:3].any() or constant[0][3, 0]:
                raise UsageError("only padding after the last channel is handled.")
            return Operator(kind, live, output)
        if kind == "CONCATENATION":
            return Operator(kind, live, output, axis=int(options.Axis()))
        if kind in ("ADD", "RELU", "RESHAPE"):
            return Operator(kind, live, output)
        raise UsageError(f"the operator {kind} is not one of the face networks'.")

    def _options(self, kind: str, raw: Any) -> Any:
        tables = {
            "CONV_2D": "Conv2DOptions",
            "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
            "MAX_POOL_2D": "Pool2DOptions",
            "ADD": "AddOptions",
            "CONCATENATION": "ConcatenationOptions",
        }
        if kind not in tables or raw.BuiltinOptions() is None:
            return None
        options = getattr(self._schema, tables[kind])()
        table = raw.BuiltinOptions()
        options.Init(table.Bytes, table.Pos)
        return options
