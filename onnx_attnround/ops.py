"""The op table: for each weighted op, how its weight and its input become matrices.

Every weighted op is, at each output position, ``y = W x`` with ``W [g, o, d]``
(groups, outputs per group, kernel taps times inputs per group) and a patch
``x [g, d]`` of the input. A row of ``WEIGHTED_OPS`` says how to get both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_attnround.records import Array, LayerPlan

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

Attributes = Mapping[str, Any]
Shape = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedOp:
    """One row of the table.

    ``rank_error`` says why a weight shape is not handled (``None`` if it is);
    ``channel_axis`` is the output-channel axis of the ONNX weight;
    ``to_matrix`` maps that weight to ``[g, o, d]`` and ``from_matrix`` back;
    ``grid`` gives the patches of an input batch; ``macs`` counts
    multiply-accumulates per sample from the shapes of weight, x and y.
    """

    rank_error: Callable[[Attributes, Shape], str | None]
    channel_axis: Callable[[Attributes], int]
    to_matrix: Callable[[Array, Attributes], Array]
    from_matrix: Callable[[Array, Attributes, Shape], Array]
    grid: Callable[[torch.Tensor, Attributes, Shape], Grid]
    macs: Callable[[Attributes, Shape, Shape, Shape], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """All patches of one input batch, of which only those asked for are ever built.

    ``x`` is ``[n, c, *sizes]``. Along each spatial axis, output position ``o``
    and tap ``k`` read input ``(o * stride + k * dilation - begin) / spread``: zero
    where that is no integer or outside. ``groups`` splits ``c``.
    """

    x: torch.Tensor
    positions: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    spreads: tuple[int, ...]
    groups: int

    @property
    def count(self) -> int:
        """Output positions per sample."""
        return math.prod(self.positions)

    def rows(self, sources: Sources, zero: float = 0.0) -> torch.Tensor:
        """Patches ``[g, n*p, d]`` from ``sources``; ``zero`` pads. Contiguous."""
        import torch

        values, where = self.x.flatten(2), sources.where
        taps, inputs = where.shape[2], values.shape[1] // self.groups
        if self.groups > 1:  # each channel for itself
            flat = where.flatten(1)[:, None].expand(-1, values.shape[1], -1)
            lines = values.gather(2, flat).transpose(0, 1).flatten(1)
            lines.index_fill_(1, sources.outside, zero)
            split = lines.reshape(self.groups, inputs, -1, taps).permute(0, 2, 3, 1)
            return split.flatten(2).contiguous()
        samples = torch.arange(len(values), device=values.device)[:, None, None]
        if where[0].numel() < values.shape[2]:
            picked = values[samples, :, where].flatten(0, 2)
        else:  # most elements are read, many of them more than once
            last = values.transpose(1, 2).flatten(0, 1)
            picked = last.index_select(0, (where + samples * values.shape[2]).flatten())
        picked.index_fill_(0, sources.outside, zero)
        return picked.reshape(1, -1, taps * inputs)

    def sources(self, index: torch.Tensor) -> Sources:
        """Where patches at the flat positions ``index [n, p]`` read any input of this shape."""
        import torch

        outputs = np.unravel_index(index.numpy(), self.positions)
        taps = np.unravel_index(np.arange(math.prod(self.kernel)), self.kernel)
        where = torch.zeros((*index.shape, math.prod(self.kernel)), dtype=torch.int64)
        inside = torch.ones_like(where, dtype=torch.bool)
        for axis, size in enumerate(self.x.shape[2:]):
            begin = taps[axis] * self.dilations[axis] - self.begins[axis]
            at = torch.from_numpy(outputs[axis][..., None] * self.strides[axis] + begin)
            spread = self.spreads[axis]
            if spread > 1:
                inside &= at % spread == 0
                at = at.div(spread, rounding_mode="floor")
            inside &= (at >= 0) & (at < size)
            where = where * size + at.clamp(0, size - 1)
        outside = (~inside).flatten().nonzero()[:, 0]
        return Sources(where.to(self.x.device), outside.to(self.x.device))


@dataclass(frozen=True, slots=True)
class Sources:
    """Flat input positions ``[n, p, taps]``, and the flat indices of those that are padding."""

    where: torch.Tensor
    outside: torch.Tensor


# --- Conv and ConvTranspose -------------------------------------------------------------


def _spatial(attributes: Attributes, kernel: Shape) -> tuple[list[int], list[int]]:
    ones = [1] * len(kernel)
    return list(attributes.get("strides") or ones), list(attributes.get("dilations") or ones)


def conv_pads(attributes: Attributes, sizes: Shape, kernel: Shape) -> list[int]:
    """ONNX ``pads`` (begins, then ends) with ``auto_pad`` resolved for an input of ``sizes``."""
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return list(attributes.get("pads") or [0] * (2 * len(kernel)))
    if mode == "VALID":
        return [0] * (2 * len(kernel))
    strides, dilations = _spatial(attributes, kernel)
    total = [
        max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    return _split_pads(total, upper=mode == "SAME_UPPER")


def _split_pads(total: Sequence[int], *, upper: bool) -> list[int]:
    small = [t // 2 for t in total]
    large = [t - s for t, s in zip(total, small, strict=True)]
    return small + large if upper else large + small


def _conv_grid(x: torch.Tensor, attributes: Attributes, weight_shape: Shape) -> Grid:
    kernel, sizes = tuple(weight_shape[2:]), x.shape[2:]
    strides, dilations = _spatial(attributes, kernel)
    pads = conv_pads(attributes, sizes, kernel)
    return Grid(
        x=x,
        positions=tuple(
            (size + pads[i] + pads[i + len(kernel)] - (k - 1) * dilations[i] - 1) // strides[i] + 1
            for i, (size, k) in enumerate(zip(sizes, kernel, strict=True))
        ),
        kernel=kernel,
        strides=tuple(strides),
        dilations=tuple(dilations),
        begins=tuple(pads[: len(kernel)]),
        spreads=(1,) * len(kernel),
        groups=attributes.get("group", 1),
    )


def _transpose_pads(attributes: Attributes, sizes: Shape, kernel: Shape) -> list[int]:
    """What the equivalent Conv pads its spread input with, as ONNX Runtime resolves it."""
    strides, dilations = _spatial(attributes, kernel)
    extra = list(attributes.get("output_padding") or [0] * len(kernel))
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    full = [
        (size - 1) * s + r + e + 1
        for size, s, r, e in zip(sizes, strides, reach, extra, strict=True)
    ]
    mode = attributes.get("auto_pad", "NOTSET")
    shape = attributes.get("output_shape")
    wanted = full if shape is None else list(shape)[-len(kernel) :]
    if shape is None and mode not in ("SAME_UPPER", "SAME_LOWER"):
        pads = list(attributes.get("pads") or [0] * (2 * len(kernel)))
    else:
        same = [size * s for size, s in zip(sizes, strides, strict=True)]
        target = same if shape is None else wanted
        total = [max(f - t, 0) for f, t in zip(full, target, strict=True)]
        pads = _split_pads(total, upper=mode == "SAME_UPPER")
    begins = [r - p for r, p in zip(reach, pads[: len(kernel)], strict=True)]
    ends = [
        r - p + e + max(w - f, 0)
        for r, p, e, w, f in zip(reach, pads[len(kernel) :], extra, wanted, full, strict=True)
    ]
    return begins + ends


def _transpose_grid(x: torch.Tensor, attributes: Attributes, weight_shape: Shape) -> Grid:
    """ConvTranspose as a Conv with stride 1 over the input with zeros between its elements."""
    kernel, sizes = tuple(weight_shape[2:]), x.shape[2:]
    strides, dilations = _spatial(attributes, kernel)
    pads = _transpose_pads(attributes, sizes, kernel)
    return Grid(
        x=x,
        positions=tuple(
            (size - 1) * strides[i] + pads[i] + pads[i + len(kernel)] - (k - 1) * dilations[i] + 1
            for i, (size, k) in enumerate(zip(sizes, kernel, strict=True))
        ),
        kernel=kernel,
        strides=(1,) * len(kernel),
        dilations=tuple(dilations),
        begins=tuple(pads[: len(kernel)]),
        spreads=tuple(strides),
        groups=attributes.get("group", 1),
    )


def _conv_matrix(weight: Array, attributes: Attributes) -> Array:
    groups = attributes.get("group", 1)
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.swapaxes(2, 3).reshape(*split.shape[:2], -1)


def _conv_weight(matrix: Array, attributes: Attributes, shape: Shape) -> Array:
    split = matrix.reshape(*matrix.shape[:2], -1, shape[1])
    return split.swapaxes(2, 3).reshape(tuple(shape))


def _transpose_matrix(weight: Array, attributes: Attributes) -> Array:
    groups, inputs = attributes.get("group", 1), weight.shape[0]
    flipped = np.flip(weight, tuple(range(2, weight.ndim)))
    split = flipped.reshape(groups, inputs // groups, weight.shape[1], -1)
    return split.transpose(0, 2, 3, 1).reshape(groups, weight.shape[1], -1)


def _transpose_weight(matrix: Array, attributes: Attributes, shape: Shape) -> Array:
    groups, inputs = attributes.get("group", 1), shape[0]
    split = matrix.reshape(groups, shape[1], -1, inputs // groups)
    weight = split.transpose(0, 3, 1, 2).reshape(tuple(shape))
    return np.flip(weight, tuple(range(2, len(shape))))


def _conv_rank(attributes: Attributes, shape: Shape) -> str | None:
    spatial = len(shape) - 2
    return None if 1 <= spatial <= 3 else f"{spatial} spatial dimensions: 1 to 3 are handled"


def _conv_macs(attributes: Attributes, weight: Shape, x: Shape, y: Shape) -> int:
    return math.prod(weight) * math.prod(y[2:])


def _transpose_macs(attributes: Attributes, weight: Shape, x: Shape, y: Shape) -> int:
    return math.prod(weight) * math.prod(x[2:])


# --- Gemm and MatMul --------------------------------------------------------------------


def _matrix_rank(attributes: Attributes, shape: Shape) -> str | None:
    return None if len(shape) == 2 else f"constant operand of rank {len(shape)}: rank 2 is handled"


def _gemm_matrix(weight: Array, attributes: Attributes) -> Array:
    return np.expand_dims(weight if attributes.get("transB", 0) else weight.T, 0)


def _gemm_weight(matrix: Array, attributes: Attributes, shape: Shape) -> Array:
    return matrix[0] if attributes.get("transB", 0) else np.transpose(matrix[0])


def _dense_grid(x: torch.Tensor) -> Grid:
    """``[n, t, k]`` as ``n`` samples of ``k`` channels at ``t`` positions, kernel size 1."""
    one = (1,)
    return Grid(
        x=x.transpose(1, 2),
        positions=(x.shape[1],),
        kernel=one,
        strides=one,
        dilations=one,
        begins=(0,),
        spreads=one,
        groups=1,
    )


def _gemm_grid(x: torch.Tensor, attributes: Attributes, weight_shape: Shape) -> Grid:
    rows = x.T if attributes.get("transA", 0) else x
    return _dense_grid(rows[:, None, :])


def _matmul_grid(x: torch.Tensor, attributes: Attributes, weight_shape: Shape) -> Grid:
    samples = x.shape[0] if x.ndim > 1 else 1
    return _dense_grid(x.reshape(samples, -1, x.shape[-1]))


def _dense_macs(attributes: Attributes, weight: Shape, x: Shape, y: Shape) -> int:
    return math.prod(weight) * math.prod(y[1:-1])


WEIGHTED_OPS: dict[str, WeightedOp] = {
    "Conv": WeightedOp(
        rank_error=_conv_rank,
        channel_axis=lambda attributes: 0,
        to_matrix=_conv_matrix,
        from_matrix=_conv_weight,
        grid=_conv_grid,
        macs=_conv_macs,
    ),
    "ConvTranspose": WeightedOp(
        rank_error=_conv_rank,
        channel_axis=lambda attributes: 1,
        to_matrix=_transpose_matrix,
        from_matrix=_transpose_weight,
        grid=_transpose_grid,
        macs=_transpose_macs,
    ),
    "Gemm": WeightedOp(
        rank_error=_matrix_rank,
        channel_axis=lambda attributes: 0 if attributes.get("transB", 0) else 1,
        to_matrix=_gemm_matrix,
        from_matrix=_gemm_weight,
        grid=_gemm_grid,
        macs=_dense_macs,
    ),
    "MatMul": WeightedOp(
        rank_error=_matrix_rank,
        channel_axis=lambda attributes: 1,
        to_matrix=lambda weight, attributes: weight.T[None],
        from_matrix=lambda matrix, attributes, shape: matrix[0].T,
        grid=_matmul_grid,
        macs=_dense_macs,
    ),
}


def clipped_line(node: ir.Node) -> tuple[float, float]:
    """Slope and height at 0 of the line that a HardSigmoid clips to 0 and 1."""
    return node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)


def is_clipped_line(node: ir.Node) -> bool:
    """Whether a QuantizeLinear can clip this HardSigmoid: it rises, and 0 is within its codes."""
    slope, height = clipped_line(node)
    return slope > 0 and 0 <= height <= 1


def clip_bounds(node: ir.Node) -> tuple[float, float]:
    """The bounds of a Relu or Clip: infinite where there is none, NaN where one is computed."""
    low, high = -math.inf, math.inf
    if node.op_type == "Relu":
        return 0.0, high
    if len(node.inputs) == 1:  # attributes before opset 11
        return node.attributes.get_float("min", low), node.attributes.get_float("max", high)
    values = [*node.inputs[1:], None]
    return _number(values[0], low), _number(values[1], high)


def _number(value: ir.Value | None, absent: float) -> float:
    if value is None:
        return absent
    return math.nan if value.const_value is None else float(value.const_value.numpy().item())


def is_depthwise(op_type: str, attributes: Attributes, weight: Shape) -> bool:
    """Whether each output channel of a Conv reads one input channel, which no other reads."""
    groups = attributes.get("group", 1)
    return op_type == "Conv" and groups > 1 and (weight[0], weight[1]) == (groups, 1)


def count_macs(
    op_type: str, attributes: Attributes, weight: Shape, x: Any, y: Any
) -> int | None:
    """Multiply-accumulates for one sample; ``None`` where a shape or a dimension is unknown."""
    if x is None or y is None:
        return None
    try:
        return int(WEIGHTED_OPS[op_type].macs(attributes, weight, x, y))
    except TypeError:  # a dynamic spatial dimension
        return None


def weight_matrix(layer: LayerPlan, weight: Array) -> Array:
    """The ONNX weight of ``layer`` as ``[g, o, d]``."""
    return WEIGHTED_OPS[layer.op_type].to_matrix(weight, layer.attributes)


def matrix_shape(layer: LayerPlan) -> tuple[int, int, int]:
    """The shape ``[g, o, d]`` of :func:`weight_matrix`, from that of the weight alone."""
    groups = int(layer.attributes.get("group", 1))
    outputs = layer.weight_shape[WEIGHTED_OPS[layer.op_type].channel_axis(layer.attributes)]
    if layer.op_type != "ConvTranspose":  # whose weight has the outputs of one group alone
        outputs //= groups
    return groups, outputs, layer.parameters // (groups * outputs)


def weight_tensor(layer: LayerPlan, matrix: Array) -> Array:
    """``[g, o, d]`` back in the layout of the ONNX weight, contiguous."""
    op = WEIGHTED_OPS[layer.op_type]
    return np.ascontiguousarray(op.from_matrix(matrix, layer.attributes, layer.weight_shape))


def input_grid(layer: LayerPlan, x: torch.Tensor) -> Grid:
    """All patches of the input batch ``x`` (samples on axis 0) that ``layer`` multiplies."""
    return WEIGHTED_OPS[layer.op_type].grid(x, layer.attributes, layer.weight_shape)
