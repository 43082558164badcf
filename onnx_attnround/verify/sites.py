"""The layers of a model of any make: float, with Q/DQ nodes, with operators on codes, or dynamic.

What a layer reads and makes is told by names of float tensors. Where there are codes alone, a
DequantizeLinear is added that makes floats of them, to a copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_attnround import graph
from onnx_attnround.ops import WEIGHTED_OPS
from onnx_attnround.qdq.arithmetic import dequantize, dynamic_grid, quantize
from onnx_attnround.records import Array

CHAIN = 4
"""Nodes behind a layer that a runtime or a converter may have folded into it, at most."""

_ABSORBED = frozenset(
    {"Add", "BatchNormalization", "Clip", "Div", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul",
     "PRelu", "Relu", "Sigmoid", "Sub", "Tanh"}
)  # fmt: skip
_BIASED = frozenset({"Add"})
"""What may come behind a layer of a quantised file that is part of one in the float model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """How a tensor is stored: scale, zero point, and the ends of its codes."""

    scale: Array
    zero_point: Array
    low: int
    high: int

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value of codes with one scale."""
        scale, zero = float(self.scale.flat[0]), int(self.zero_point.flat[0])
        return (self.low - zero) * scale, (self.high - zero) * scale

    @classmethod
    def of_range(cls, values: Array) -> Codes:
        """Those that DynamicQuantizeLinear gives to ``values``: of 8 bits, with 0 among them."""
        scale, zero = dynamic_grid(values)
        return cls(scale=np.atleast_1d(scale), zero_point=np.atleast_1d(zero), low=0, high=255)

    def rounded(self, values: Array) -> Array:
        """``values`` as codes with one scale have them."""
        scale, zero = float(self.scale.flat[0]), float(self.zero_point.flat[0])
        codes = quantize(values, scale, zero, self.low, self.high)
        rounded: Array = dequantize(codes, scale, zero)
        return rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A layer: ``node`` of the kind ``op``, which reads ``x`` and makes ``ys``.

    Each of ``ys`` is what one more node behind the layer makes of it: a bias, a
    normalization, an activation. ``weight`` is a matrix with a row for each output, up to a
    factor in files whose scales are computed, and ``None`` where it is packed. ``levels`` is
    the largest magnitude of its codes, ``None`` of floats; ``scales`` counts their scales.
    ``input`` tells how ``x`` is stored, unless that is ``dynamic``, by the range of each run;
    ``output`` how the layer itself stores what it makes.
    """

    node: str
    op: str
    x: str
    ys: tuple[str, ...]
    weight: Array | None
    levels: int | None = None
    scales: int = 1
    input: Codes | None = None
    output: Codes | None = None
    dynamic: bool = False
    channel_axis: int = 1


def find_sites(model: ir.Model, *, quantised: bool) -> tuple[ir.Model, tuple[Site, ...]]:
    """A copy of ``model`` and its layers with constant weights, in the order of the graph.

    Of a ``quantised`` one only a bias may come behind a layer; of a float model all that
    converters fold.
    """
    copy = model.clone()
    graph.name_nodes(copy)
    reader = _Reader(copy, _BIASED if quantised else _ABSORBED)
    found = [site for node in list(copy.graph) if (site := reader.site(node)) is not None]
    return copy, tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A constant weight in the layout of its operator, and what :class:`Site` tells of it."""

    values: Array | None
    levels: int | None = None
    scales: int = 1


class _Reader:
    """Reads the layers of one copy, to which it adds what makes floats of codes."""

    def __init__(self, model: ir.Model, behind: frozenset[str]) -> None:
        self.model = model
        self._behind = behind
        self._floats: dict[ir.Value, ir.Value] = {}
        self._constant: dict[ir.Value, bool] = {}

    def site(self, node: ir.Node) -> Site | None:
        """What ``node`` is, if it is a layer."""
        how = {
            "QLinearConv": self._on_codes,
            "QLinearMatMul": self._on_codes,
            "QGemm": self._on_codes,
            "ConvInteger": self._dynamic,
            "MatMulInteger": self._dynamic,
            "DynamicQuantizeMatMul": self._packed,
            "MatMulIntegerToFloat": self._packed,
            "MatMulNBits": self._packed,
        }
        if node.op_type in WEIGHTED_OPS:
            return self._plain(node)
        return how[node.op_type](node) if node.op_type in how else None

    def _plain(self, node: ir.Node) -> Site | None:
        """A float operator, whose weight may come out of a DequantizeLinear."""
        x, weight = node.inputs[0], node.inputs[1]
        if x is None or weight is None:
            return None
        maker = weight.producer()
        if maker is not None and maker.op_type == "DequantizeLinear":
            data, scale, zero = (*maker.inputs, None, None)[:3]
            axis, block = _axis(maker), maker.attributes.get_int("block_size", 0)
            codes, matrix = _codes(data, zero), _dequantised(data, scale, zero, axis, block)
            if codes is None or matrix is None:
                return None
            found = _Weight(values=matrix, levels=_levels(codes), scales=_size(scale))
        elif (constant := _value(weight)) is not None:
            found = _Weight(values=constant)
        else:
            return None
        return self._made(node, node.op_type, x, node.outputs[0], found, _stored(x))

    def _on_codes(self, node: ir.Node) -> Site | None:
        """An operator that reads and makes codes, with all scales as inputs."""
        x, x_scale, x_zero, weight, w_scale, w_zero = node.inputs[:6]
        first = 7 if node.op_type == "QGemm" else 6
        y_scale, y_zero = (*node.inputs[first : first + 2], None, None)[:2]
        op = {"QLinearConv": "Conv", "QLinearMatMul": "MatMul", "QGemm": "Gemm"}[node.op_type]
        codes = _codes(weight, w_zero)
        axis = 0 if op == "Conv" or node.attributes.get_int("transB", 0) == 1 else 1
        matrix = _dequantised(weight, w_scale, w_zero, axis, 0)
        if x is None or codes is None or matrix is None:
            return None
        made = node.outputs[0]
        return self._made(
            node,
            op,
            self._as_float(x, x_scale, x_zero),
            made if y_scale is None else self._as_float(made, y_scale, y_zero),
            _Weight(values=matrix, levels=_levels(codes), scales=_size(w_scale)),
            _known_codes(x_scale, x_zero),
            _known_codes(y_scale, y_zero),
        )

    def _dynamic(self, node: ir.Node) -> Site | None:
        """An operator with sums of 32 bits, which a Cast and a Mul behind it make floats of."""
        x, weight, _, zero = (*node.inputs, None, None)[:4]
        codes = _codes(weight, zero)
        maker = None if x is None else x.producer()
        if codes is None or maker is None or maker.inputs[0] is None:
            return None
        if maker.op_type not in ("DynamicQuantizeLinear", "QuantizeLinear"):
            return None
        made = node.outputs[0]
        for op_type in ("Cast", "Mul"):
            reader = graph.only_reader(made)
            if reader is None or reader.op_type != op_type:
                return None
            made = reader.outputs[0]
        op = node.op_type.removesuffix("Integer")
        found = _Weight(values=codes, levels=_levels(codes))
        site = self._made(node, op, maker.inputs[0], made, found)
        return replace(site, dynamic=True)

    def _packed(self, node: ir.Node) -> Site | None:
        """An operator of ONNX Runtime that reads floats, or codes that it has made of them."""
        x = node.inputs[0]
        if x is None or node.op_type == "MatMulIntegerToFloat":
            maker = None if x is None else x.producer()
            x = None if maker is None else maker.inputs[0]
        if x is None:
            return None
        return self._made(node, "MatMul", x, node.outputs[0], _Weight(values=None))

    def _made(
        self,
        node: ir.Node,
        op: str,
        x: ir.Value,
        y: ir.Value,
        weight: _Weight,
        stored: Codes | None = None,
        made: Codes | None = None,
    ) -> Site:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        row = WEIGHTED_OPS[op]
        matrix, values = None, weight.values
        if values is not None and row.rank_error(attributes, values.shape) is None:
            whole = row.to_matrix(values, attributes)
            matrix = whole.reshape(-1, whole.shape[-1])
        return Site(
            node=node.name or "",
            op=op,
            x=x.name or "",
            ys=tuple(value.name or "" for value in self._chain(y)),
            weight=matrix,
            levels=weight.levels,
            scales=weight.scales,
            input=stored,
            output=made,
            channel_axis=1 if op.startswith("Conv") else -1,
        )

    def _chain(self, value: ir.Value) -> Iterator[ir.Value]:
        """What a layer makes, and what nodes with constants make of it, one after another."""
        yield value
        for _ in range(CHAIN):
            reader = graph.only_reader(value)
            if reader is None or reader.op_type not in self._behind:
                return
            if not all(each is value or self._is_constant(each) for each in reader.inputs):
                return
            value = reader.outputs[0]
            yield value

    def _is_constant(self, value: ir.Value | None) -> bool:
        if value is None or value.const_value is not None:
            return True
        if value not in self._constant:
            maker = value.producer()
            self._constant[value] = maker is not None and all(map(self._is_constant, maker.inputs))
        return self._constant[value]

    def _as_float(
        self, codes: ir.Value, scale: ir.Value | None, zero: ir.Value | None
    ) -> ir.Value:
        """What makes floats of ``codes``, added if it is not there yet."""
        if codes not in self._floats:
            made = ir.node("DequantizeLinear", [codes, scale, zero])
            made.name = made.outputs[0].name = f"{codes.name}/as_float"
            made.outputs[0].dtype = ir.DataType.FLOAT
            self.model.graph.append(made)
            self._floats[codes] = made.outputs[0]
        return self._floats[codes]


def _value(value: ir.Value | None) -> Array | None:
    """The constant that ``value`` is, behind a Cast too; ``None`` if it is computed."""
    if value is None:
        return None
    maker = value.producer()
    if maker is not None and maker.op_type == "Cast":
        value = maker.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _codes(data: ir.Value | None, zero: ir.Value | None) -> Array | None:
    """Constant codes less their zero point, ``None`` unless there is one such point or none."""
    codes, point = _value(data), _value(zero)
    if codes is None:
        return None
    plain = codes.astype(np.int32)
    if point is None or not point.size:
        return plain
    first = int(point.astype(np.int32).flat[0])
    return plain - first


def _levels(codes: Array) -> int:
    """The largest magnitude of codes."""
    return int(np.abs(codes).max(initial=1))


def _dequantised(
    data: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int, block: int
) -> Array | None:
    """Constant codes as floats."""
    codes, scales, points = _value(data), _value(scale), _value(zero)
    if codes is None or scales is None:
        return None
    plain = codes.astype(np.float32)
    if points is not None:
        plain = plain - _spread(points, codes.shape, axis, block).astype(np.float32)
    result: Array = plain * _spread(scales, codes.shape, axis, block).astype(np.float32)
    return result


def _spread(values: Array, shape: Sequence[int], axis: int, block: int) -> Array:
    """Scales or points so that they broadcast: one, one per channel, or one per block."""
    if values.size == 1:
        return values.reshape([1] * len(shape))
    if block and values.ndim == len(shape):
        rows = np.repeat(values, block, axis)
        return np.take(rows, range(shape[axis]), axis)
    wide = [1] * len(shape)
    wide[axis] = values.size
    return values.reshape(wide)


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 1 if attribute is None else attribute.as_int()


def _size(value: ir.Value | None) -> int:
    found = _value(value)
    return 1 if found is None else int(found.size)


def _stored(x: ir.Value) -> Codes | None:
    """How a tensor that comes out of a DequantizeLinear is stored."""
    maker = x.producer()
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    data, scale, zero = (*maker.inputs, None)[:3]
    found = _known_codes(scale, zero)
    clip = None if data is None else data.producer()
    if found is None or clip is None or clip.op_type != "Clip":
        return found
    ends = [_value(each) for each in (*clip.inputs[1:], None, None)[:2]]
    low = found.low if ends[0] is None else int(ends[0].flat[0])
    high = found.high if ends[1] is None else int(ends[1].flat[0])
    return Codes(scale=found.scale, zero_point=found.zero_point, low=low, high=high)


def _known_codes(scale: ir.Value | None, zero: ir.Value | None) -> Codes | None:
    """The codes of a tensor with one constant scale."""
    scales, points = _value(scale), _value(zero)
    if scales is None or scales.size != 1 or not float(scales.flat[0]) > 0:
        return None
    points = np.zeros(1, np.uint8) if points is None else points
    if points.dtype.kind not in "iu":
        return None
    ends = np.iinfo(points.dtype)
    return Codes(scale=scales, zero_point=points, low=int(ends.min), high=int(ends.max))
