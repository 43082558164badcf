"""Steps that folds share: to read and replace constants, and to take out a node."""

from __future__ import annotations

from itertools import count

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import is_read_once
from onnx_attnround.records import Array


def constant(value: ir.Value | None) -> Array | None:
    """An initializer in float64; ``None`` if ``value`` is no floating-point initializer."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    if not value.const_value.dtype.is_floating_point():
        return None
    return value.const_value.numpy().astype(np.float64)


def replace_constant(node: ir.Node, index: int, old: ir.Value | None, data: Array) -> None:
    """Make input ``index`` of ``node`` an initializer with ``data``, in the type of ``old``.

    It takes the place and name of ``old`` if only one node reads that; a
    constant that others share stays as it is.
    """
    if node.graph is None or old is None or old.const_value is None:
        raise ValueError(f"node '{node.name}' is in no graph, or {old} is no constant")
    tensor = ir.tensor(data.astype(old.const_value.dtype.numpy()), name=old.name)
    if is_read_once(old):
        old.const_value, old.shape = tensor, ir.Shape(data.shape)
        node.replace_input_with(index, old)
        return
    node.replace_input_with(index, add_constant(node.graph, f"{old.name}", tensor))


def add_constant(graph: ir.Graph, stem: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer with ``tensor``, whose name is ``stem`` and a number."""
    taken = ir.convenience.create_value_mapping(graph)
    tensor.name = next(name for i in count() if (name := f"{stem}_{i}") not in taken)
    new = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(new)
    return new


def take_over_output(graph: ir.Graph, layer: ir.Node, last: ir.Node) -> None:
    """Remove ``last``, which is now part of ``layer``: who read it reads the layer's output."""
    y, old = layer.outputs[0], last.outputs[0]
    name = old.name if old.is_graph_output() else y.name
    y.type, y.shape = old.type or y.type, y.shape if old.shape is None else old.shape
    ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
    graph.remove(last, safe=True)
    y.name = name
