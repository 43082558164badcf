"""Which weights are stored as integers for nodes that compute in float; and why not others.

Those of recurrent nodes, and those of layers in the bodies of If, Loop and Scan: the file is
smaller, and what runs is the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import is_standard
from onnx_attnround.ops import WEIGHTED_OPS
from onnx_attnround.plan.patterns import NodeChoice
from onnx_attnround.qdq.stored import RECURRENT, stored_weights
from onnx_attnround.targets import Target

LEAST_BYTES = 1 << 16
"""Smaller weights stay float: they save less than the nodes that unpack them take."""


def find_stored(
    model: ir.Model, config: QuantConfig, target: Target
) -> dict[str, tuple[str, ...]]:
    """The names of the weights that become integers, by the names of the nodes that read them.

    A weight that other nodes read too stays as it is.
    """
    if config.stored_bits == 32 or not target.tables:
        return {}
    main, choice = set(model.graph), NodeChoice.of(model, config)
    nodes = [
        node
        for node in model.graph.all_nodes()
        if _is_float(node, inside=node not in main) and choice.refusal(node.name or "") is None
    ]
    fit = {
        node.name or "": tuple(v.name or "" for v in stored_weights(node) if _fits(v, nodes))
        for node in nodes
    }
    return {node: weights for node, weights in fit.items() if weights}


def _is_float(node: ir.Node, *, inside: bool) -> bool:
    """Whether a node with weights computes in float, wherever it is or ``inside`` a subgraph."""
    known = node.op_type in RECURRENT or (inside and node.op_type in WEIGHTED_OPS)
    return known and is_standard(node)


def _fits(value: ir.Value, nodes: list[ir.Node]) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
        return False
    if tensor.nbytes < LEAST_BYTES or value.is_graph_output():
        return False
    alone = all(node in nodes and value in stored_weights(node) for node in value.consumers())
    return alone and bool(np.isfinite(tensor.numpy()).all())
