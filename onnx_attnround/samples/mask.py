"""Which tokens count: those that pad a sentence fill up a batch, and mean nothing.

Models of sentences have an input ``[n, t]`` of 1 for tokens and 0 for padding.
Nobody reads the values that such a model computes at padded tokens, so that ranges,
moments and figures leave them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_attnround.records import Array

_NAMES = ("attention_mask", "input_mask")
_ATTENTION = frozenset({"Softmax", "Attention", "MultiHeadAttention"})
# From the mask to what is added to the scores, or takes their place, and on to the Softmax.
_ON_THE_WAY = frozenset({
    "Add", "And", "Cast", "Equal", "Expand", "Greater", "Identity", "Less", "Mul", "Not", "Reshape",
    "Slice", "Sub", "Unsqueeze", "Where",
})  # fmt: skip


def find_mask(model: ir.Model) -> str | None:
    """The name of the input that tells tokens from padding; ``None`` if there is none.

    It has rank 2, and is called attention_mask or input_mask; or has "mask" in its name
    and reaches a Softmax on its own, without being an index of embeddings.
    """
    for value in model.graph.inputs:
        name = (value.name or "").lower()
        if value.shape is None or len(value.shape) != 2 or "mask" not in name or "pad" in name:
            continue
        if name in _NAMES or _reaches_attention(value):
            return value.name
    return None


def _reaches_attention(value: ir.Value) -> bool:
    seen = {value}
    waiting = [value]
    found = False
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type == "Gather":
                return False
            found |= node.op_type in _ATTENTION
            if node.op_type in _ON_THE_WAY and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])
    return found


def tokens(feeds: Mapping[str, Any], mask: str | None) -> Array | None:
    """Which tokens of a batch count, booleans ``[n, t]``; ``None`` if all do, or none is told."""
    values = None if mask is None else np.asarray(feeds[mask])
    if values is None or values.ndim != 2 or values.all() or not np.isin(values, (0, 1)).all():
        return None
    return values.astype(bool)


def counted(shape: tuple[int, ...], mask: Array | None) -> Array | None:
    """``mask`` as an index of the leading axes of a tensor ``[n, t, d]`` or ``[n t, d]``.

    ``None`` for a tensor of another shape, and without a mask.
    """
    if mask is None:
        return None
    if len(shape) == 3 and shape[:2] == mask.shape:
        return mask
    return mask.reshape(-1) if len(shape) == 2 and shape[0] == mask.size else None


def without_padding(values: Array, mask: Array | None) -> Array:
    """Tokens ``[rows, d]`` that count; ``values`` itself if it is no tensor of tokens."""
    index = counted(values.shape, mask)
    return values if index is None else values[index]


def zero_padding(values: Array, mask: Array | None) -> Array:
    """``values`` with padded tokens 0, a value that every range has."""
    index = counted(values.shape, mask)
    if index is None:
        return values
    zeroed: Array = np.where(index[..., None], values, np.zeros((), values.dtype))
    return zeroed
