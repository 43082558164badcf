"""Clipped lines as exporters write them, as the HardSigmoid that they are."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import is_read_once, is_standard
from onnx_attnround.ops import clip_bounds
from onnx_attnround.simplify.affine import move_into
from onnx_attnround.simplify.batch_norm import layer_behind
from onnx_attnround.simplify.constants import add_constant, constant

_CLIP_OPSET = 11
"""The opset from which on the bounds of a Clip are inputs; before, they are attributes."""
_NEAR = 1e-6
"""Some roundings of float32, relative: exporters write a number as 1/6 in several ways."""


def fold_hard_sigmoid(model: ir.Model) -> int:
    """``Clip(x + b, 0, h)``, divided by ``h``, becomes ``HardSigmoid(x)``, one node for three.

    With ``alpha = 1/h`` and ``beta = b/h``. The bounds may be a Clip, Min and Max, or Relu
    and Min; the factor ``1/h`` a Mul or a Div, of the gate itself, of its product with another
    tensor, or of that tensor, as in ``x * Clip(x + 3, 0, 6) / 6``, the hard-swish.
    """
    return sum(_fold(model, node) for node in list(model.graph) if node.graph is model.graph)


def expand_hard_swish(model: ir.Model) -> int:
    """``HardSwish(x)`` becomes ``x * HardSigmoid(x)``, as which ONNX defines it."""
    nodes = [node for node in model.graph if node.op_type == "HardSwish" and node.domain == ""]
    for node in nodes:
        x, y = node.inputs[0], node.outputs[0]
        gate = ir.node(
            "HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5}, name=f"{node.name}/hard_sigmoid"
        )
        made = gate.outputs[0]
        made.name, made.type, made.shape = f"{y.name}/hard_sigmoid", y.type, y.shape
        model.graph.insert_before(node, gate)
        node.op_type = "Mul"
        node.resize_inputs(2)
        node.replace_input_with(1, made)
    return len(nodes)


def fold_layer_hard_sigmoid(model: ir.Model) -> int:
    """``HardSigmoid(W x + b)`` becomes ``Clip(W' x + b', 0, 1)``, which a Q behind it absorbs.

    Of a layer whose output nobody else reads.
    """
    gates = [node for node in model.graph if node.op_type == "HardSigmoid" and is_standard(node)]
    return sum(_fold_into_layer(model, node) for node in gates)


def _fold_into_layer(model: ir.Model, node: ir.Node) -> bool:
    layer, opset = layer_behind(node.inputs[0]), model.opset_imports.get("", 0)
    scale = np.array([node.attributes.get_float("alpha", 0.2)])
    shift = np.array([node.attributes.get_float("beta", 0.5)])
    if layer is None or opset < _CLIP_OPSET or not move_into(layer, scale, shift, layer.inputs[1]):
        return False
    bounds = [
        add_constant(model.graph, f"{node.name}/{end}", ir.tensor(np.array(bound, np.float32)))
        for end, bound in (("lowest", 0), ("highest", 1))
    ]
    node.op_type = "Clip"
    node.attributes.clear()
    node.resize_inputs(3)
    for index, value in enumerate(bounds, start=1):
        node.replace_input_with(index, value)
    return True


def _fold(model: ir.Model, last: ir.Node) -> bool:
    """``last`` is the node that gives the upper bound."""
    found = _gate(last)
    if found is None:
        return False
    x, offset, height = found
    scaled = _scaled(last.outputs[0], height)
    if scaled is None:
        return False
    factor, kept = scaled
    node = ir.node(
        "HardSigmoid",
        [x],
        {"alpha": 1.0 / height, "beta": offset / height},
        name=f"{last.name}/hard_sigmoid",
    )
    gate, out = last.outputs[0], node.outputs[0]
    out.name, out.type, out.shape = f"{gate.name}/hard_sigmoid", gate.type, gate.shape
    model.graph.insert_after(last, node)
    gate.replace_all_uses_with(out)
    _take_out(model.graph, factor, out if kept is gate else kept)
    return True


def _gate(last: ir.Node) -> tuple[ir.Value, float, float] | None:
    """``x``, ``b`` and ``h`` of ``Clip(x + b, 0, h)``, if nothing else reads what is between."""
    line, low, high = _bounded(last)
    if line is None or low != 0 or not math.isfinite(high) or high <= 0:
        return None
    add = _only_maker(line)
    if add is None or add.op_type != "Add":
        return None
    number, x = _number_and_other(add)
    return None if number is None or x is None else (x, number, high)


def _bounded(last: ir.Node) -> tuple[ir.Value | None, float, float]:
    """The value that is bounded, and its bounds: by Clip, by Min of Max or Relu, or Max of Min."""
    if not is_standard(last):
        return None, math.nan, math.nan
    if last.op_type in ("Clip", "Relu"):
        low, high = clip_bounds(last)
        value = last.inputs[0]
    elif last.op_type in ("Min", "Max") and len(last.inputs) == 2:
        number, value = _number_and_other(last)
        bound = math.nan if number is None else number
        low, high = (-math.inf, bound) if last.op_type == "Min" else (bound, math.inf)
    else:
        return None, math.nan, math.nan
    if math.isinf(low) != math.isinf(high):
        inner = _only_maker(value)
        if inner is not None and inner.op_type in ("Clip", "Relu", "Min", "Max"):
            source, inner_low, inner_high = _bounded(inner)
            return source, max(low, inner_low), min(high, inner_high)
    return value, low, high


def _scaled(gate: ir.Value, height: float) -> tuple[ir.Node, ir.Value] | None:
    """The node that divides by ``height`` what comes of the gate, and what it divides."""
    if not is_read_once(gate):
        return None
    reader = gate.consumers()[0]
    if _divides(reader, height, gate):
        return reader, gate
    if reader.op_type != "Mul" or not is_standard(reader) or reader.inputs[0] is reader.inputs[1]:
        return None
    product = reader.outputs[0]
    if is_read_once(product) and _divides(product.consumers()[0], height, product):
        return product.consumers()[0], product
    other = reader.inputs[1] if reader.inputs[0] is gate else reader.inputs[0]
    maker = _only_maker(other)
    if maker is None or maker.op_type not in ("Mul", "Div"):
        return None
    source = maker.inputs[0] if constant(maker.inputs[0]) is None else maker.inputs[1]
    return (maker, source) if source is not None and _divides(maker, height, source) else None


def _divides(node: ir.Node, height: float, value: ir.Value) -> bool:
    """Whether the node is ``value / height`` or ``value * (1 / height)``."""
    number, other = _number_and_other(node)
    if number is None or other is not value or not is_standard(node):
        return False
    if node.op_type == "Div":
        return node.inputs[0] is value and math.isclose(number, height, rel_tol=_NEAR)
    return node.op_type == "Mul" and math.isclose(number * height, 1.0, rel_tol=_NEAR)


def _take_out(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let readers of the output of ``node`` read ``value``; outputs of the graph keep names."""
    old = node.outputs[0]
    if old.is_graph_output():
        value.name, old.name = old.name, f"{old.name}/divided"
        value.type, value.shape = old.type or value.type, old.shape or value.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _only_maker(value: ir.Value | None) -> ir.Node | None:
    """The standard node that makes ``value``, if one input of one node reads it."""
    node = None if value is None else value.producer()
    if value is None or node is None or not is_standard(node) or not is_read_once(value):
        return None
    return node


def _number_and_other(node: ir.Node) -> tuple[float | None, ir.Value | None]:
    """The operand that is one constant number, and the other."""
    if len(node.inputs) != 2:
        return None, None
    for value, other in (node.inputs, reversed(node.inputs)):
        data = constant(value)
        if data is not None and data.size == 1 and data.ndim <= _rank(other):
            return float(np.squeeze(data)), other
    return None, None


def _rank(value: ir.Value | None) -> int:
    """The rank, 1 if it is not known: a number of one dimension is in any exporter's manner."""
    return 1 if value is None or value.shape is None else len(value.shape)
