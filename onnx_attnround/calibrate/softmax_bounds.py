"""How far down the range of a tensor must reach if all its uses end in a Softmax.

Attention masks are the least float32, -1e4 or minus infinity, and a range that holds
them has no steps left for the scores. Yet of a Softmax over ``n`` elements, all that lie
``ln n + (b + 1) ln 2`` below the largest are together worth less than half a step of ``b``
bits: values below may as well lie at that floor. So may, further up, the terms of a
sum whose sum is below it, and what is selected, scaled, clipped or moved on the way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import is_standard
from onnx_attnround.records import Array

Limits = tuple[float, float]
"""The interval of one tensor outside which values may as well lie at its nearer end."""

FREE: Limits = (-math.inf, math.inf)
GAP = 256.0
"""Where the largest elements of rows, sorted, lie so far apart, the rows below are all mask."""

_PASSING: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(
        ("Cast", "Clip", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice")
        + ("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
        (0,),
    ),
    "Where": (1, 2),
    "Concat": None,
    "Max": None,
    "Min": None,
}
"""Ops that change no value or keep the order of values, and which of their inputs; None is all."""
_SUMS = ("Add", "Sub")
_PRODUCTS = ("Mul", "Div")


@dataclass
class Extrema:
    """The extrema of a tensor's finite elements, and their least magnitude above 0."""

    lo: float = math.inf
    hi: float = -math.inf
    least: float = math.inf

    def update(self, x: Array) -> None:
        """Take in the finite elements of ``x``."""
        finite = x[np.isfinite(x)]
        if finite.size:
            self.lo = min(self.lo, float(finite.min()))
            self.hi = max(self.hi, float(finite.max()))
        magnitudes = np.abs(finite[finite != 0])
        self.least = min(self.least, float(magnitudes.min(initial=math.inf)))


@dataclass
class Rows:
    """The length of the rows that a Softmax normalises, and their maxima, rounded down."""

    axes: slice
    length: int = 1
    maxima: set[int] = field(default_factory=set)

    def update(self, x: Array) -> None:
        """Take in the rows of ``x``; those without a finite maximum do not matter."""
        if not x.size:
            return
        axes = tuple(range(x.ndim)[self.axes])
        self.length = max(self.length, math.prod(x.shape[axis] for axis in axes))
        maxima = x.max(axes)
        finite = np.floor(maxima[np.isfinite(maxima)].astype(np.float64))
        self.maxima.update(int(value) for value in np.unique(finite))

    def floor(self, bits: int) -> float:
        """Elements below it are together worth less than half a step of so many bits."""
        falling = sorted(self.maxima, reverse=True)
        if not falling:
            return -math.inf
        gaps = (i for i, (a, b) in enumerate(pairwise(falling)) if a - b > GAP)
        least = falling[next(gaps, len(falling) - 1)]
        return least - math.log(self.length) - (bits + 1) * math.log(2)


class SoftmaxBounds:
    """Finds the tensors that only feed a Softmax, takes in values, and tells their limits.

    ``quantised`` names the tensors whose ranges are sought, with codes of ``bits``.
    """

    def __init__(self, model: ir.Model, quantised: Collection[str], bits: int) -> None:
        self._nodes = list(model.graph)
        self._opset, self._bits = model.opset_imports.get("", 0), bits
        self._bounded = _bounded(model.graph)
        self._rows: dict[str, Rows] = {}
        self._extrema: dict[str, Extrema] = {}
        if any(value.name in quantised for value in self._bounded):
            self._watch()

    def _watch(self) -> None:
        """Choose what has to be known: rows of each Softmax, and the other terms and factors."""
        for node in self._nodes:
            for index, value in enumerate(node.inputs[:2]):
                if value is None or value not in self._bounded:
                    continue
                if node.op_type == "Softmax":
                    self._rows[_name(value)] = Rows(self._axis(node))
                elif node.op_type in (*_SUMS, *_PRODUCTS) and (other := node.inputs[1 - index]):
                    self._extrema[_name(other)] = Extrema()

    def _axis(self, softmax: ir.Node) -> slice:
        """The axes that a Softmax normalises over; before opset 13 all from one on."""
        if self._opset < 13:
            return slice(softmax.attributes.get_int("axis", 1), None)
        axis = softmax.attributes.get_int("axis", -1)
        return slice(axis, axis + 1 or None)

    @property
    def observed(self) -> set[str]:
        """The names of the tensors whose values :meth:`update` wants."""
        return {*self._rows, *self._extrema}

    def update(self, name: str, x: Array) -> None:
        """Take in values of the tensor ``name``."""
        if name in self._rows:
            self._rows[name].update(x)
        if name in self._extrema:
            self._extrema[name].update(x)

    def limits(self) -> dict[str, Limits]:
        """The limits of the tensors that have some, by the values that were taken in."""
        found: dict[ir.Value | None, list[Limits]] = defaultdict(list)
        for node in reversed(self._nodes):
            out = _union([limits for value in node.outputs for limits in found[value]])
            for index, value in enumerate(node.inputs):
                if value in self._bounded:
                    found[value].append(self._limits(node, index, out))
        united = {value: _union(limits) for value, limits in found.items()}
        return {_name(value): ends for value, ends in united.items() if ends != FREE}

    def _limits(self, node: ir.Node, index: int, out: Limits) -> Limits:
        """The limits of an input that follow from those of the output."""
        if node.op_type in _PASSING:
            return out
        if node.op_type == "Softmax":
            rows = self._rows.get(_name(node.inputs[0]))
            return FREE if rows is None else (rows.floor(self._bits), math.inf)
        other = self._extrema.get(_name(node.inputs[1 - index]))
        if other is None or other.lo > other.hi:
            return FREE
        if node.op_type in _SUMS:
            return _of_term(node, index, out, other)
        return _of_factor(node, index, out, other)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def _of_term(node: ir.Node, index: int, out: Limits, other: Extrema) -> Limits:
    if node.op_type == "Add":
        return out[0] - other.hi, out[1] - other.lo
    if index == 0:
        return out[0] + other.lo, out[1] + other.hi
    return other.lo - out[1], other.hi - out[0]


def _of_factor(node: ir.Node, index: int, out: Limits, other: Extrema) -> Limits:
    """The limits of a product divided by the other factor, or by its least magnitude.

    Where the factor lies beyond the limits, the input is a flag that it makes a mask of; a flag
    keeps the range that it has.
    """
    divisor = other.lo if node.op_type == "Mul" else 1 / other.lo if other.lo else 0.0
    if other.lo < other.hi:  # computed, so that the factor at hand is a constant
        if not math.isfinite(other.least) or other.lo < 0 < other.hi:
            return FREE
        divisor = math.copysign(other.least, other.hi + other.lo)
    elif abs(divisor) > min(abs(end) for end in out):
        return FREE
    if divisor == 0:
        return FREE
    low, high = sorted((out[0] / divisor, out[1] / divisor))
    return low, high


def _union(limits: Sequence[Limits]) -> Limits:
    """The least interval around all ``limits``."""
    if not limits:
        return FREE
    return min(low for low, _ in limits), max(high for _, high in limits)


def _bounded(graph: ir.Graph) -> set[ir.Value]:
    """The values all of whose uses end in a Softmax."""
    bounded: set[ir.Value] = set()

    def add(values: Iterable[ir.Value]) -> None:
        for value in values:
            uses = value.uses()
            if uses and not value.is_graph_output() and all(
                _leads_on(use.node, use.idx, bounded) and use.node.graph is graph for use in uses
            ):
                bounded.add(value)

    for node in reversed(list(graph)):
        add(node.outputs)
    add([*graph.inputs, *graph.initializers.values()])
    return bounded


def _leads_on(node: ir.Node, index: int, bounded: Collection[ir.Value]) -> bool:
    """Whether input ``index`` of ``node`` is bounded, if its outputs are."""
    if not is_standard(node):
        return False
    if node.op_type == "Softmax":
        return True
    if not all(value in bounded or not value.uses() for value in node.outputs):
        return False
    if node.op_type in _PASSING:
        inputs = _PASSING[node.op_type]
        return inputs is None or index in inputs
    if node.op_type in _SUMS:
        return True
    return (node.op_type == "Mul" and any(map(_is_number, node.inputs))) or (
        node.op_type == "Div" and index == 0 and _is_number(node.inputs[1])
    )


def _is_number(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.size == 1
