"""Outputs that are shares of one, whose slices all have one unit."""

from __future__ import annotations

import onnx_ir as ir

_SHARES = frozenset({"HardSigmoid", "Sigmoid", "Softmax"})
_MOVES = frozenset({
    "Cast", "Flatten", "Identity", "Reshape", "Resize", "Slice", "Squeeze", "Transpose",
    "Unsqueeze", "Upsample",
})  # fmt: skip


def outputs_of_shares(model: ir.Model) -> frozenset[str]:
    """The names of outputs that a Sigmoid or a Softmax makes, moved or not.

    Elsewhere slices may have units of their own, as boxes in pixels beside scores; here a
    slice that is small holds little.
    """
    return frozenset(
        value.name or "" for value in model.graph.outputs if _maker(value) in _SHARES
    )


def _maker(value: ir.Value) -> str | None:
    """The op that makes a value, behind what only moves it; ``None`` of an input."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return None if node is None else node.op_type
