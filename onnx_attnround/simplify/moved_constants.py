"""In the bodies of If, Loop and Scan: constants that are only moved about, where they end up.

So exporters write the weights of a recurrent node, whose gates stand in another order. In the main
graph onnxsim folds them.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from onnx_attnround.graph import is_standard
from onnx_attnround.records import Array
from onnx_attnround.simplify.constants import add_constant

_MOVES = frozenset({"Concat", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Ops whose output has no number that their inputs have not, and no more of them together."""


def fold_moved_constants(model: ir.Model) -> int:
    """Nodes of subgraphs that move floating-point constants become constants of those graphs."""
    nodes = [node for node in model.graph.all_nodes() if node.graph is not model.graph]
    opset = model.opset_imports.get("", 0)
    return sum(_fold(node, opset) for node in nodes)


def _fold(node: ir.Node, opset: int) -> bool:
    if node.op_type not in _MOVES or not is_standard(node) or not isinstance(node.graph, ir.Graph):
        return False
    given = [value for value in node.inputs if value is not None]
    constants = [value.const_value for value in given if value.is_initializer()]
    y = node.outputs[0]
    if len(constants) < len(given) or not given or y.is_graph_output():
        return False
    first = constants[0]
    if first is None or not first.dtype.is_floating_point():
        return False
    moved = ir.tensor(_value(node, opset))
    y.replace_all_uses_with(add_constant(node.graph, y.name or node.name or "moved", moved))
    node.graph.remove(node, safe=True)
    for value in set(given):
        if value.graph is not None and not value.uses() and not value.is_graph_output():
            del value.graph.initializers[value.name or ""]
    return True


def _value(node: ir.Node, opset: int) -> Array:
    """What the node makes of its inputs, constants all of them."""
    from onnx.reference import ReferenceEvaluator  # with all its ops: takes half a second

    given = {value.name or "": value.const_value for value in node.inputs if value is not None}
    feeds = {name: tensor.numpy() for name, tensor in given.items() if tensor is not None}
    inputs = [
        onnx.helper.make_tensor_value_info(name, tensor.dtype.value, tuple(tensor.shape.numpy()))
        for name, tensor in given.items()
        if tensor is not None
    ]
    graph = onnx.helper.make_graph(
        [ir.to_proto(node)], "moved", inputs, [onnx.ValueInfoProto(name=node.outputs[0].name)]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(found)
