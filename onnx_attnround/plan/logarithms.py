"""Layers that stay float since a logarithm reads what they compute: front ends of audio nets.

Spectra and filter banks have values over many decades, and the logarithm tells the small ones
apart as well as the large. Rounded weights add to them a share of the large ones, and may
make them negative, which is NaN behind the logarithm.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from onnx_attnround.graph import is_standard
from onnx_attnround.ops import WEIGHTED_OPS, clip_bounds

LARGE = 0.1
"""A constant of this size in front of a logarithm keeps small values from telling anything."""

_THROUGH = frozenset(
    {"Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Div", "Flatten", "Gather", "Identity",
     "Max", "Mul", "Neg", "Pad", "Pow", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare",
     "Reshape", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
    | WEIGHTED_OPS.keys()
)  # fmt: skip
"""Sums, powers and moves: what a spectrum is made by. No activation of a network is one."""


def before_logarithms(model: ir.Model) -> set[ir.Node]:
    """The nodes of the main graph from which such ops alone lead to a Log."""
    logs = [n for n in model.graph if n.op_type == "Log" and is_standard(n)]
    waiting = [node for node in map(_maker, logs) if node is not None]
    found: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        known = node.op_type in _THROUGH and is_standard(node)
        if node in found or not known or _saturates(node):
            continue
        found.add(node)
        makers = (value.producer() for value in node.inputs if value is not None)
        waiting += [maker for maker in makers if maker is not None and maker.graph is model.graph]
    return found


def _saturates(node: ir.Node) -> bool:
    """Whether this is a Clip with an upper bound: an activation, as the ReLU6 is."""
    return node.op_type == "Clip" and math.isfinite(clip_bounds(node)[1])


def _maker(log: ir.Node) -> ir.Node | None:
    """The node that makes the input of a Log, unless that has a large constant added."""
    x = log.inputs[0]
    node = None if x is None else x.producer()
    if node is None or node.op_type not in ("Add", "Max", "Clip"):
        return node
    if node.op_type == "Clip":
        return None if clip_bounds(node)[0] >= LARGE else node
    for value in node.inputs:
        tensor = None if value is None else value.const_value
        if tensor is not None and tensor.size and float(abs(tensor.numpy()).min()) >= LARGE:
            return None
    return node
