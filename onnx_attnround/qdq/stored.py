"""Weights of nodes that compute in float: integers in the file, floats once it is loaded.

``Mul(Cast(codes), scale)`` depends on no input, so runtimes work it out when they load the
model, in the bodies of If, Loop and Scan too, and the nodes run on floats as ever.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import attributes_of
from onnx_attnround.ops import WEIGHTED_OPS
from onnx_attnround.qdq.arithmetic import quantize
from onnx_attnround.qdq.folded import unpack
from onnx_attnround.qdq.tables import Names
from onnx_attnround.records import Array

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
"""Ops with a weight for what they read and one for their state."""


def stored_weights(node: ir.Node) -> list[ir.Value]:
    """The constant weights of a node, which have a row for each output."""
    values = node.inputs[1:3] if node.op_type in RECURRENT else node.inputs[1:2]
    return [value for value in values if value is not None and value.is_initializer()]


def store_weights(model: ir.Model, stored: Mapping[str, Collection[str]]) -> None:
    """Replace weights, in place: those of the names that ``stored`` has for the name of a node.

    By symmetric codes of 8 bits, with a scale for each output (of recurrent nodes, for each
    direction and row of its gates), rounded to nearest.
    """
    for node in list(model.graph.all_nodes()):
        names = stored.get(node.name or "", ())
        for value in stored_weights(node) if names else ():
            if value.name in names:
                _store(node, value)


def _store(node: ir.Node, weight: ir.Value) -> None:
    graph, tensor = weight.graph, weight.const_value
    if graph is None or tensor is None:
        raise ValueError(f"weight '{weight.name}' of node '{node.name}' is no constant")
    codes, scale = _rounded(tensor.numpy(), _rows(node, len(tensor.shape)))
    made = Names(graph)
    stored, step = (
        made.constant(f"{weight.name}/{end}", values)
        for end, values in (("codes", codes), ("scale", scale))
    )
    names = f"{weight.name}/cast", f"{weight.name}/unpack"
    unpacked, name = unpack(weight, stored, step, before=graph[0], names=names), weight.name
    del graph.initializers[name or ""]
    unpacked.name = name


def _rows(node: ir.Node, rank: int) -> tuple[int, ...]:
    """The axes along which the scales of a weight differ."""
    if node.op_type in RECURRENT:
        return 0, 1
    if node.op_type == "MatMul":  # of a stack of matrices, too
        return *range(rank - 2), rank - 1
    return (WEIGHTED_OPS[node.op_type].channel_axis(attributes_of(node)) % rank,)


def _rounded(values: Array, rows: tuple[int, ...]) -> tuple[Array, Array]:
    """Codes, int8, and scales that fit beside them."""
    others = tuple(axis for axis in range(values.ndim) if axis not in rows)
    peak = np.abs(values).max(others, keepdims=True)
    scale = np.maximum(peak / 127, np.finfo(np.float32).tiny).astype(np.float32)
    codes = quantize(values, scale, np.float32(0), -127, 127)
    return codes.astype(np.int8), scale
