"""Which tables that are looked up, such as embeddings, become integers; and why not others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import is_standard
from onnx_attnround.plan.patterns import NodeChoice
from onnx_attnround.records import TABLE_BLOCK
from onnx_attnround.targets import Target

LEAST_BYTES = 1 << 16
"""Smaller tables stay float: they save less than the nodes cost."""


def find_tables(
    model: ir.Model, config: QuantConfig, target: Target
) -> tuple[dict[str, int], dict[str, str]]:
    """The bits of the tables that are quantised, and for the others the reason why not.

    Both by the names of the nodes that look them up.
    """
    bits, kept = {}, {}
    main, choice = set(model.graph), NodeChoice.of(model, config)
    for node in (n for n in model.graph.all_nodes() if _looks_up(n)):
        reason = _refusal(node, config, target, choice) if node in main else "inside a subgraph"
        if reason is None:
            bits[node.name or ""] = _bits_of(node, config.embedding_bits)
        else:
            kept[node.name or ""] = reason
    return bits, kept


def _looks_up(node: ir.Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" and is_standard(node) else None
    tensor = None if table is None or not table.is_initializer() else table.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 1


def _refusal(
    node: ir.Node, config: QuantConfig, target: Target, choice: NodeChoice
) -> str | None:
    table = node.inputs[0]
    tensor = None if table is None else table.const_value
    if config.embedding_bits == 32 or not target.tables or table is None or tensor is None:
        return "its table is looked up, not multiplied: it stays float"
    if (reason := choice.refusal(node.name or "")) is not None:
        return reason
    return _unfit(tensor) or _shared(table, choice)


def _unfit(tensor: ir.TensorProtocol) -> str | None:
    rank = len(tensor.shape)
    if tensor.dtype != ir.DataType.FLOAT or rank != 2:
        return f"its table is {tensor.dtype.name} of rank {rank}: FLOAT of rank 2 is handled"
    if tensor.nbytes < LEAST_BYTES:
        return "its table is small: it stays float"
    return None if np.isfinite(tensor.numpy()).all() else "its table holds NaN or Inf"


def _shared(table: ir.Value, choice: NodeChoice) -> str | None:
    """Why other readers keep a table float: for them it would have to be stored once more."""
    readers = table.consumers()
    rows = all(_looks_up(n) and n.attributes.get_int("axis", 0) == 0 for n in readers)
    rows = rows and all(reader.graph is readers[0].graph for reader in readers)
    if not rows or table.is_graph_output():
        return "its table is read by other nodes too: it stays float"
    if any(choice.refusal(reader.name or "") for reader in readers):
        return "its table is read by an excluded node too: it stays float"
    return None


def _bits_of(node: ir.Node, wanted: int) -> int:
    """The bits of a table: 4 only where blocks fill its rows and the result's rank is known."""
    table, y = node.inputs[0], node.outputs[0]
    width = 0 if table is None or table.shape is None else table.shape[1]
    fits = isinstance(width, int) and width % TABLE_BLOCK == 0 and y.shape is not None
    return 4 if wanted == 4 and fits else 8
