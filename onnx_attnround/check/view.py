"""A QDQ model as the rules read it: its Q and DQ nodes, and the layers that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import onnx
import onnx_ir as ir

from onnx_attnround import graph
from onnx_attnround.errors import ModelError
from onnx_attnround.graph import is_standard
from onnx_attnround.ops import WEIGHTED_OPS
from onnx_attnround.records import Array
from onnx_attnround.targets import Target

QUANTISE, DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
DYNAMIC = "DynamicQuantizeLinear"
_ABSORBED = ("Relu", "Clip")


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A Q or DQ node; ``scale`` and ``point`` are ``None`` where absent or not constant.

    ``codes`` is the integer type, ``stored`` the type of the constant codes that a
    DQ unpacks, also where a Cast stands between, and ``None`` for an activation.
    """

    node: ir.Node
    scale: Array | None
    point: Array | None
    has_point: bool
    codes: ir.DataType
    stored: ir.DataType | None
    axis: int
    block_size: int

    @property
    def name(self) -> str:
        """The name of the node."""
        return self.node.name or ""

    @property
    def tensor(self) -> ir.Value | None:
        """What is quantised: the input of a Q, also for a DQ of its codes; else a DQ's input."""
        data = self.node.inputs[0]
        producer = None if self.node.op_type == QUANTISE or data is None else data.producer()
        quantised = producer is not None and producer.op_type in (QUANTISE, DYNAMIC)
        return producer.inputs[0] if producer is not None and quantised else data

    @property
    def dynamic(self) -> bool:
        """Whether this is the DQ of codes whose range is found in each run."""
        data = self.node.inputs[0]
        producer = None if data is None else data.producer()
        return producer is not None and producer.op_type == DYNAMIC

    @property
    def blocked(self) -> bool:
        """Whether there is a scale for each block of ``block_size``."""
        return self.block_size != 0

    @property
    def per_tensor(self) -> bool:
        """Whether there is one scale in all; true if it is not known."""
        return self.scale is None or self.scale.size == 1


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A node with constant weights: where input, weight and bias are dequantised, by which DQ."""

    node: ir.Node
    x: Link | None
    weight: Link | None
    bias: Link | None

    @property
    def name(self) -> str:
        """The name of the node."""
        return self.node.name or ""

    @property
    def quantised(self) -> bool:
        """Whether both operands come from a DQ."""
        return self.x is not None and self.weight is not None


class View:
    """A named copy of a model with shapes inferred, and what the rules ask of it."""

    def __init__(self, model: ir.Model, target: Target) -> None:
        self.model, self.target = _inferred(model), target
        self.opset = self.model.opset_imports.get("", 0)

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """All Q and DQ nodes, in the order of the graph."""
        standard = (node for node in self.model.graph.all_nodes() if is_standard(node))
        return tuple(_link(node) for node in standard if node.op_type in (QUANTISE, DEQUANTISE))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The nodes of the main graph whose second input is a constant, dequantised or float."""
        return tuple(
            Layer(node, *(self.dequantised(v) for v in _three(node)))
            for node in self.model.graph
            if node.op_type in WEIGHTED_OPS and self._has_weight(node)
        )

    def dequantised(self, value: ir.Value | None) -> Link | None:
        """The DQ that makes ``value``, or ``None``."""
        return self._made_by.get(value)

    def quantised(self, value: ir.Value) -> Link | None:
        """The Q that alone reads ``value``, at once or behind an activation that it absorbs."""
        reader = graph.only_reader(value)
        if reader is not None and reader.op_type in _ABSORBED:
            reader = graph.only_reader(reader.outputs[0])
        return next((link for link in self.links if link.node is reader), None)

    def activations(self, op_type: str) -> Iterator[Link]:
        """The Q, or the DQ, nodes of tensors that are computed."""
        for link in self.links:
            if link.node.op_type == op_type and link.stored is None:
                yield link

    @cached_property
    def _made_by(self) -> dict[ir.Value | None, Link]:
        """What is dequantised: by a DQ, or a weight by arithmetic that is folded at loading."""
        folded = (_folded(node) for node in self.model.graph if node.op_type == "Mul")
        links = chain(self.links, (link for link in folded if link is not None))
        return {link.node.outputs[0]: link for link in links if link.node.op_type != QUANTISE}

    def _has_weight(self, node: ir.Node) -> bool:
        weight = node.inputs[1]
        link = self.dequantised(weight)
        return constant(weight) is not None or (link is not None and link.stored is not None)


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant that ``value`` is: an initialiser, or the output of a Constant node."""
    return None if value is None else ir.convenience.get_const_tensor(value)


def _inferred(model: ir.Model) -> ir.Model:
    def infer(proto: onnx.ModelProto) -> onnx.ModelProto:
        return onnx.shape_inference.infer_shapes(proto)

    inference_error = onnx.shape_inference.InferenceError  # is none of the others
    try:
        result = graph.through_proto(model, infer)
    except (RuntimeError, ValueError, ModelError, inference_error):  # types of another domain, say
        result = model.clone()
    graph.name_nodes(result)
    return result


def _three(node: ir.Node) -> list[ir.Value | None]:
    inputs = [*node.inputs, None, None, None]
    return inputs[:3]


def _link(node: ir.Node) -> Link:
    data, scale, point = _three(node)
    scales, points, codes = (constant(value) for value in (scale, point, data))
    if codes is None and data is not None:
        codes = _before_cast(data)
    attribute = node.attributes.get("axis")
    return Link(
        node=node,
        scale=None if scales is None else scales.numpy(),
        point=None if points is None else points.numpy(),
        has_point=point is not None,
        codes=_code_type(node, data, point),
        stored=None if codes is None or node.op_type == QUANTISE else codes.dtype,
        axis=1 if attribute is None else attribute.as_int(),
        block_size=node.attributes.get_int("block_size", 0),
    )


def _folded(node: ir.Node) -> Link | None:
    """A product of constant codes, made floats by a Cast, with constant scales, as a DQ of them."""
    data, scale, _ = _three(node)
    scales = constant(scale)
    codes = None if data is None or scales is None else _before_cast(data)
    if codes is None or scales is None or not codes.dtype.is_integer():
        return None
    along = [axis for axis, size in enumerate(scales.shape) if size != 1]
    return Link(
        node=node,
        scale=scales.numpy().reshape(-1),
        point=None,
        has_point=False,
        codes=codes.dtype,
        stored=codes.dtype,
        axis=along[0] if along else 0,
        block_size=0,
    )


def _before_cast(data: ir.Value) -> ir.TensorProtocol | None:
    producer = data.producer()
    if producer is None or producer.op_type != "Cast":
        return None
    return constant(producer.inputs[0])


def _code_type(node: ir.Node, data: ir.Value | None, point: ir.Value | None) -> ir.DataType:
    """The integer type: the zero point's, else the attribute's or the data's, else UINT8."""
    if point is not None:
        tensor = constant(point)
        known = point.dtype if tensor is None else tensor.dtype
        if known is not None:
            return known
    if node.op_type == QUANTISE:
        named = node.attributes.get_int("output_dtype", 0)
        return ir.DataType(named) if named else ir.DataType.UINT8
    tensor = constant(data)
    known = tensor.dtype if tensor is not None else None if data is None else data.dtype
    return known or ir.DataType.UINT8


def is_zero(points: Array | None) -> bool:
    """Whether all zero points are 0; true where there are none."""
    return points is None or not np.asarray(points, np.int64).any()


def bias_fits(layer: Layer) -> bool:
    """Whether the scale of a dequantised bias is that of input times weight, as float32 has it."""
    scales = [None if link is None else link.scale for link in (layer.x, layer.weight, layer.bias)]
    x, weight, bias = scales
    if x is None or weight is None or bias is None:
        return True
    wanted = np.resize(x * weight, bias.shape)  # groups of a ConvTranspose share their scales
    return bool(np.allclose(bias, wanted, rtol=1e-6, atol=0))
