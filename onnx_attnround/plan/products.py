"""Convolutions along one axis as matrix products, whose input may have a range in each run.

ONNX Runtime has an integer MatMul with a float output, for codes whose range is found in each
run; its integer Conv has neither. So a Conv between float nodes becomes the product of its
patches, side by side in a tensor of their own, and a matrix. That takes up to two times as long
as an integer Conv, and a fraction of a float one (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import raise_opset
from onnx_attnround.plan.dynamic import is_made_in_float
from onnx_attnround.plan.layers import name_of
from onnx_attnround.records import Array, LayerPlan, QuantPlan

OPSET = 13
"""Of Slice and Pad as they are written here."""
LEAST_CHANNELS = 64
"""Of input and output: patches of fewer take longer to lay out than to multiply."""
_TO_END = 1 << 62


def as_products(model: ir.Model, plan: QuantPlan, config: QuantConfig) -> ir.Model:
    """A copy of ``model`` in which such convolutions are products, under their old names.

    ``model`` itself if there are none, or all ranges are to be fixed.
    """
    if config.activations == "static" or not plan.target.dynamic:
        return model
    nodes = {name_of(node): node for node in model.graph}
    names = [layer.node for layer in plan.layers if _fits(nodes[layer.node], layer, plan)]
    if not names:
        return model
    result = raise_opset(model.clone(), max(model.opset_imports.get("", 0), OPSET))
    layers = {layer.node: layer for layer in plan.layers}
    for node in [node for node in result.graph if name_of(node) in names]:
        _Product(result.graph, node, layers[name_of(node)]).put()
    return result


def _fits(node: ir.Node, layer: LayerPlan, plan: QuantPlan) -> bool:
    """Whether the node is a Conv along one axis at most that float nodes feed and read."""
    x, y = node.inputs[0], node.outputs[0]
    if layer.op_type != "Conv" or layer.x not in plan.activations or x is None:
        return False
    outputs, inputs, *kernel = layer.weight_shape
    known = layer.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    alone = layer.attributes.get("group", 1) == 1 and y.shape is not None and known
    along_one = sum(size > 1 for size in kernel) <= 1 and min(outputs, inputs) >= LEAST_CHANNELS
    return alone and along_one and is_made_in_float(x, plan) and _is_read_in_float(y, plan)


def _is_read_in_float(y: ir.Value, plan: QuantPlan) -> bool:
    """Whether no integer kernel reads the codes of ``y``, at once or behind what absorbs them."""
    readers = y.consumers()
    if len(readers) == 1 and readers[0].op_type in plan.target.absorbed:
        return _is_read_in_float(readers[0].outputs[0], plan)
    layers = {layer.node for layer in plan.layers}
    moved = y.name in plan.same_range.values()
    return not moved and all(
        name_of(node) not in layers
        and not (
            node.op_type in plan.target.arithmetic
            and all(v is not None and v.name in plan.activations for v in node.inputs)
        )
        for node in readers
    )


class _Product:
    """The nodes that take the place of one Conv."""

    def __init__(self, graph: ir.Graph, conv: ir.Node, layer: LayerPlan) -> None:
        self._graph, self._conv, self._layer = graph, conv, layer
        self._taken = set(ir.convenience.create_value_mapping(graph))
        self._kernel = layer.weight_shape[2:]
        self._rank = len(self._kernel)
        self._nodes: list[ir.Node] = []

    def put(self) -> None:
        """Channels last, patches side by side, times the matrix, channels first again."""
        x, _, *bias = self._conv.inputs
        y, last = self._conv.outputs[0], self._rank + 1
        to_last = [0, *range(2, last + 1), 1]
        rows = self._patches(self._padded(self._add("Transpose", [x], perm=to_last)))
        weight = self._constant("weight_matrix", self._matrix())
        product = self._add("MatMul", [rows, weight])
        self._nodes[-1].name = self._conv.name
        if y.shape is not None:
            batch, outputs, *places = y.shape
            rows.shape = ir.Shape([batch, *places, self._matrix().shape[0]])
            product.shape = ir.Shape([batch, *places, outputs])
        if bias and bias[0] is not None:
            product = self._add("Add", [product, bias[0]])
        turned = self._add("Transpose", [product], perm=[0, last, *range(1, last)])
        self._take_over(turned)

    def _matrix(self) -> Array:
        """The weight ``[o, c, *k]`` as ``[k * c, o]``."""
        tensor = self._conv.inputs[1].const_value  # type: ignore[union-attr]
        weight = np.moveaxis(tensor.numpy(), (0, 1), (-1, -2))  # type: ignore[union-attr]
        return np.ascontiguousarray(weight.reshape(-1, weight.shape[-1]))

    def _padded(self, x: ir.Value) -> ir.Value:
        pads = list(self._layer.attributes.get("pads") or [0] * (2 * self._rank))
        if not any(pads):
            return x
        begins, ends = pads[: self._rank], pads[self._rank :]
        return self._add("Pad", [x, self._constant("pads", _ints([0, *begins, 0, 0, *ends, 0]))])

    def _patches(self, x: ir.Value) -> ir.Value:
        """``[n, *places, k * c]``: for each tap what lies under it, at all places."""
        ones = [1] * self._rank
        strides = list(self._layer.attributes.get("strides") or ones)
        dilations = list(self._layer.attributes.get("dilations") or ones)
        if prod(self._kernel) == prod(strides) == 1:
            return x
        axes, steps = (
            self._constant(name, _ints(values))
            for name, values in (("axes", range(1, self._rank + 1)), ("steps", strides))
        )
        taps = []
        for number, tap in enumerate(np.ndindex(*self._kernel)):
            starts = [at * step for at, step in zip(tap, dilations, strict=True)]
            ends = [
                -(size - 1 - at) * step or _TO_END
                for at, size, step in zip(tap, self._kernel, dilations, strict=True)
            ]
            edges = [
                self._constant(f"{name}_{number}", _ints(values))
                for name, values in (("starts", starts), ("ends", ends))
            ]
            taps.append(self._add("Slice", [x, *edges, axes, steps]))
        return taps[0] if len(taps) == 1 else self._add("Concat", taps, axis=-1)

    def _add(self, op: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
        name = self._fresh(f"{self._conv.name}/{op.lower()}")
        node = ir.node(op, inputs, attributes=attributes, name=name)  # type: ignore[arg-type]
        value = node.outputs[0]
        value.name, value.type = name, self._conv.outputs[0].type
        self._nodes.append(node)
        return value

    def _constant(self, end: str, values: Array) -> ir.Value:
        tensor = ir.Tensor(values, name=self._fresh(f"{self._conv.name}/{end}"))
        value = ir.val(tensor.name, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _fresh(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _take_over(self, new: ir.Value) -> None:
        """``new`` in place of the Conv's output, under its name."""
        old, weight = self._conv.outputs[0], self._conv.inputs[1]
        self._graph.insert_after(self._conv, self._nodes)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.shape, new.type, new.name = old.shape, old.type, old.name
        self._graph.remove(self._conv, safe=True)
        if weight is not None and not weight.uses():
            del self._graph.initializers[weight.name or ""]


def _ints(values: Sequence[int]) -> Array:
    return np.array(list(values), np.int64)
