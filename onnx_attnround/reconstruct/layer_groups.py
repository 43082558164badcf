"""Group consecutive layers into blocks: cut the graph where few numbers are alive.

No architecture is known here. Between any two layers some tensors are alive:
one behind a residual unit, two inside it, a narrow one between two inverted
bottlenecks, a wide one within. The blocks of at most ``MOST_LAYERS`` layers with
the fewest numbers alive at their cuts are these units, found by dynamic programming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import onnx_ir as ir

from onnx_attnround.reconstruct.cuts import cut_blocks
from onnx_attnround.records import LayerPlan

MOST_LAYERS = 3
"""The layers of a block at most: those of a residual unit, or of an inverted bottleneck."""

Block = tuple[LayerPlan, ...]


def find_blocks(
    model: ir.Model, layers: Sequence[LayerPlan], most: int = MOST_LAYERS
) -> tuple[Block, ...]:
    """``layers`` (in graph order) in blocks of at most ``most``, all of them, in order."""
    alive = _alive(model, layers)
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the cuts so far, start of the last block
    for end in range(1, len(layers) + 1):
        starts = range(max(0, end - most), end)
        # Of equal cuts the earliest: longer blocks see more of what they are to reproduce.
        best.append(min((best[start][0] + alive[start], start) for start in starts))
    ends = [len(layers)]
    while ends[-1]:
        ends.append(best[ends[-1]][1])
    ends.reverse()
    return tuple(tuple(layers[start:end]) for start, end in pairwise(ends))


def _alive(model: ir.Model, layers: Sequence[LayerPlan]) -> list[float]:
    """How many numbers of a sample are alive in front of each layer."""
    sizes = {v.name: _size(v) for v in model.graph.inputs}
    sizes |= {v.name: _size(v) for node in model.graph for v in node.outputs}
    pieces = cut_blocks(model, [[layer.node] for layer in layers])
    released = {name for piece in pieces for name in piece.released}
    alive = {v.name for v in model.graph.inputs if v.name in released}
    counts = []
    for piece in pieces[: len(layers)]:
        alive = (alive - set(piece.released)) | set(piece.outputs)
        counts.append(float(sum(sizes[name] for name in alive)))
    return counts


def _size(value: ir.Value) -> int:
    """Elements of a tensor, an unknown dimension (the batch, as a rule) counting as 1."""
    shape = () if value.shape is None else value.shape
    return math.prod(d for d in shape if isinstance(d, int))
