"""The records that pass between the stages: frozen, keyword-only, numpy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_attnround.numerics import decibels
from onnx_attnround.targets import Target

Array = NDArray[Any]
TABLE_BLOCK = 32
"""The entries of a table's row that share a scale, at 4 bits; at 8 bits a row has one scale."""
MATRIX_OPS = frozenset({"Gemm", "MatMul"})
"""The weighted ops whose weight is a matrix, which multiplies rows: of tokens, say."""
LayerErrors = Mapping[str, Mapping[int, float]]
"""The error of the model's outputs by node name and bits, with that layer alone quantised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantised.

    ``bits`` is the width of the codes, 2 to 16; ``limit`` the largest magnitude of a
    signed code, where it is less than the width allows. ``axis`` is the channel axis of
    per-channel quantisation, ``None`` for per-tensor; with ``block_size`` each run of
    so many inputs, along the other axis of a matrix, has a scale of its own.
    ``fixed_range`` takes the place of an observed range; any is at least
    ``least_range`` wide. A ``dynamic`` range is that of the tensor in each run.
    """

    bits: int
    signed: bool
    symmetric: bool
    limit: int | None = None
    axis: int | None = None
    block_size: int | None = None
    least_range: float = 0.0
    fixed_range: tuple[float, float] | None = None
    dynamic: bool = False

    @property
    def qmin(self) -> int:
        """The lowest code."""
        lowest = -(1 << (self.bits - 1)) if self.signed else 0
        return lowest if self.limit is None else max(lowest, -self.limit)

    @property
    def qmax(self) -> int:
        """The highest code."""
        highest = (1 << (self.bits - int(self.signed))) - 1
        return highest if self.limit is None else min(highest, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One weighted node that is to be quantised.

    ``x``, ``y``, ``weight`` and ``bias`` are value names in the graph;
    ``attributes`` are the node's ONNX attributes as plain Python values;
    ``input_shape`` has ``None`` for an unknown dimension. ``macs`` counts
    multiply-accumulates for one sample, ``None`` where shapes are unknown.
    Weights of more than ``block_bits`` have no blocks. ``first_or_last`` marks
    layers that read a graph input or write a graph output with no other weighted
    layer between.
    """

    node: str
    op_type: str
    x: str
    y: str
    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    weight_spec: QuantSpec
    attributes: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int | None, ...] | None = None
    macs: int | None = None
    first_or_last: bool = False
    block_bits: int = 8

    def spec_of(self, bits: int) -> QuantSpec:
        """The spec of the weight with that many bits."""
        blocks = self.weight_spec.block_size if bits <= self.block_bits else None
        return replace(self.weight_spec, bits=bits, block_size=blocks)

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is a matrix."""
        return self.op_type in MATRIX_OPS

    @property
    def takes_bias(self) -> bool:
        """Whether the op has an input for a bias, which rounding may then correct."""
        return self.op_type != "MatMul"

    @property
    def stored_as(self) -> tuple[object, ...]:
        """A key that is the same for layers whose weight can be stored once."""
        kind = "matrix" if self.is_matrix else self.op_type
        layout = [self.attributes.get(name, usual) for name, usual in (("group", 1), ("transB", 0))]
        return self.weight, kind, *layout, self.weight_spec, self.block_bits

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return int(np.prod(self.weight_shape, dtype=np.int64))


def readers_of(
    layers: Iterable[LayerPlan], bits: Mapping[str, int] | None = None
) -> dict[str, tuple[LayerPlan, ...]]:
    """For each node the layers that share its stored weight, itself included, in order.

    With ``bits``, layers of another width have a weight of their own.
    """
    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    for layer in layers:
        width = None if bits is None else bits[layer.node]
        groups.setdefault((*layer.stored_as, width), []).append(layer)
    return {layer.node: tuple(group) for group in groups.values() for layer in group}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class QuantPlan:
    """The plan: what is quantised and how, and for all else the reason why not.

    ``activations`` maps each tensor that gets Q/DQ to its spec; ``same_range``
    maps a tensor to the one whose scale and zero point it must share (data
    movement); ``shared`` maps each tensor that is computed in float, and read by
    integer and float nodes alike, to the names of the former; ``skipped`` maps the
    name of a node left in float to the reason, ``unblocked`` that of a layer to why
    it has no blocks of scales. ``tables`` holds the bits of the tables that are
    quantised, by the names of the nodes that look them up; ``stored`` the names of weights that
    are integers in the file and floats where they are read, by the names of the readers.
    With ``unpacked`` so are those of all layers that compute in float.
    """

    target: Target
    layers: tuple[LayerPlan, ...]
    activations: Mapping[str, QuantSpec]
    same_range: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, frozenset[str]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    unblocked: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, int] = field(default_factory=dict)
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unpacked: bool = False

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The tensors whose range is found in each run."""
        return tuple(name for name, spec in self.activations.items() if spec.dynamic)

    def own(self, params: Mapping[str, QuantParams]) -> dict[str, QuantParams]:
        """Those of tensors with a grid of their own: what only moves codes has its source's."""
        return {name: found for name, found in params.items() if name not in self.same_range}

    def __repr__(self) -> str:
        weights = sum(layer.parameters for layer in self.layers)
        return (
            f"<QuantPlan for {self.target.name}: {len(self.layers)} layers with {weights:,} "
            f"weights, {len(self.activations)} activations, {len(self.skipped)} nodes in float>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStats:
    """Streaming statistics of one activation tensor.

    ``lo``/``hi`` are the exact extrema over all ``count`` elements; ``hist``
    counts a fixed subset of elements in the bins between ``edges`` (one more
    entry than ``hist``), and is ``None`` for observers that need no histogram.
    """

    name: str
    count: int
    lo: float
    hi: float
    hist: Array | None = None
    edges: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """How a tensor that layers read is smoothed: a divisor for each channel, or none.

    ``observer`` is the one that suits its range.
    """

    scale: Array | None
    observer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantParams:
    """Scale and zero point of one tensor; scalars, or 1-D along ``spec.axis``.

    Of a dynamic tensor, what would hold the range observed: each run has its own.
    """

    spec: QuantSpec
    scale: Array
    zero_point: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class BitAllocation:
    """Bits per layer (by node name) and the coding length per weight that led to them.

    Without a mean to allocate under, none is computed.
    ``mean_bits`` is the parameter-weighted mean over the layers whose width was
    free, pinned layers (first and last) left out.
    """

    bits: Mapping[str, int]
    coding_length: Mapping[str, float]
    mean_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRounding:
    """The learned rounding of one layer's weight.

    ``codes`` are integers in the layout of the ONNX weight; ``scale`` and
    ``zero_point`` have one entry per channel (or one in all, per-tensor), or with
    blocks that layout, with blocks in place of inputs;
    ``bias`` is the corrected float bias, ``None`` if the layer has none. Errors
    are the mean squared error of the layer's output per element, relative to
    its variance; ``changed`` is the share of codes that differ from nearest.
    """

    weight: str
    spec: QuantSpec
    codes: Array
    scale: Array
    zero_point: Array
    bias: Array | None
    mse_nearest: float
    mse_final: float
    changed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRounding:
    """How a block of layers was refined: squared error of its outputs, relative to their power.

    ``nodes`` are its layers; ``skipped`` is the reason why it was left as it was.
    """

    nodes: tuple[str, ...]
    error_before: float | None = None
    error_after: float | None = None
    skipped: str | None = None

    @property
    def summary(self) -> str:
        """A word on the outcome."""
        if self.error_before is None or self.error_after is None:
            return f"left as it was: {self.skipped}"
        before, after = decibels(self.error_before), decibels(self.error_after)
        return f"{before:.1f} dB → {after:.1f} dB"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One graph input: numpy dtype and shape, ``None`` for a dynamic dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress of a stage: ``done`` of ``total`` units, and a phrase on the last of these."""

    stage: str
    done: int
    total: int
    detail: str = ""


OnEvent = Callable[[Event], None]
"""A function that is called with each event."""
