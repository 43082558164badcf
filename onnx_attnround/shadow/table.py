"""The op table: all ops of the default ONNX domain that have a torch forward."""

from __future__ import annotations

from onnx_attnround.shadow import (
    attention,
    cast,
    elementwise,
    index,
    layout,
    linear,
    norm,
    pool,
    reduce,
    resize,
)
from onnx_attnround.shadow.common import Op

OPS: dict[str, Op] = {
    **attention.OPS,
    **cast.OPS,
    **elementwise.OPS,
    **index.OPS,
    **layout.OPS,
    **linear.OPS,
    **norm.OPS,
    **pool.OPS,
    **reduce.OPS,
    **resize.OPS,
}

# Inputs that are read as Python numbers: they stay on the CPU when the data is elsewhere.
HOST_INPUTS: dict[str, frozenset[int]] = {
    "ConstantOfShape": frozenset({0}),
    "CumProd": frozenset({1}),
    "CumSum": frozenset({1}),
    "Dropout": frozenset({1, 2}),
    "Expand": frozenset({1}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Range": frozenset({0, 1, 2}),
    "Reshape": frozenset({1}),
    "Resize": frozenset({1, 2, 3}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "Trilu": frozenset({1}),
    "Unsqueeze": frozenset({1}),
    "Upsample": frozenset({1}),
    **{name: frozenset({1}) for name in reduce.OPS if name.startswith("Reduce")},
}
