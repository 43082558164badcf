"""Divide a tensor by a scale per channel, by way of the constants that it is made from.

A scale travels from a tensor to its producer, through what is linear or positively
homogeneous in each channel, until it reaches a constant with an entry per channel: the
gain of a normalisation, or the weight of a layer. No node is added, and no other reader
sees a changed tensor.

A scale has the rank of its tensor, each axis of extent 1 or of that of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from onnx_attnround.records import Array

_Dims = Sequence[int | str | None]

_SHAPE_READERS = frozenset({"Shape", "Size"})
_HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "MaxPool", "AveragePool"}
    | {"GlobalAveragePool", "GlobalMaxPool"}
)
_GAINS: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2,),
    ("", "InstanceNormalization"): (1, 2),
    ("", "BatchNormalization"): (1, 2),
}
"""Inputs with an entry per channel that the output of a normalisation is linear in."""
_CHANNEL_NORMS = frozenset({"InstanceNormalization", "BatchNormalization"})
_VALUES = {("com.microsoft", "MultiHeadAttention"): 2, ("", "Attention"): 2}
"""Attention that keeps the channels of this input."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Input ``index`` of ``node`` is a constant, to be multiplied by ``factor``."""

    node: ir.Node
    index: int
    factor: Array


class CannotDivideError(Exception):
    """The scale meets an operator that it cannot pass, or a reader of the undivided tensor."""


def divide(
    value: ir.Value, scale: Array, readers: Collection[ir.Node], fixed: Collection[str]
) -> list[Edit]:
    """The edits after which ``value`` is divided by ``scale``; none is made yet.

    ``readers`` are those that expect the divided tensor. ``fixed`` names tensors that must
    stay as they are, and nodes whose weights must.

    Raises:
        CannotDivideError: no constants can be found that do so.
    """
    others = [node for node in value.consumers() if node not in readers]
    if value.is_graph_output() or any(node.op_type not in _SHAPE_READERS for node in others):
        raise CannotDivideError(f"'{value.name}' has other readers")
    return _divide_producer(value, scale, fixed)


def _divide_producer(value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    if (scale == 1.0).all():
        return []
    node = value.producer()
    if node is None or node.graph is None or not isinstance(node.graph, ir.Graph):
        raise CannotDivideError(f"'{value.name}' is computed by no node")
    rule = _rule(node)
    if rule is None or value.shape is None or node.name in fixed:
        raise CannotDivideError(f"'{value.name}' is made by {node.op_type}")
    return rule(node, value, scale, fixed)


_Rule = Callable[[ir.Node, ir.Value, Array, Collection[str]], list[Edit]]


def _rule(node: ir.Node) -> _Rule | None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if (domain, node.op_type) in _GAINS:
        return _gains
    if (domain, node.op_type) in _VALUES:
        return _attention
    if domain:
        return None
    return _homogeneous if node.op_type in _HOMOGENEOUS else _RULES.get(node.op_type)


def _input(
    node: ir.Node, index: int, scale: Array, fixed: Collection[str], known: int | None = None
) -> list[Edit]:
    """Divide input ``index`` of ``node``, which is its only reader."""
    value = node.inputs[index]
    if value is None or value.const_value is not None or value.name in fixed:
        raise CannotDivideError(f"{node.op_type} '{node.name}' reads a fixed input")
    if len([use for use in value.uses() if use.node is node]) > 1:
        raise CannotDivideError(f"{node.op_type} '{node.name}' reads '{value.name}' twice")
    return divide(value, scale, [node], fixed)


def _dims(value: ir.Value | None) -> list[int | str | None]:
    if value is None or value.shape is None:
        raise CannotDivideError("a shape is unknown")
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _extents(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(extent for extent in tensor.shape if isinstance(extent, int))


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value


def _trailing(scale: Array, count: int) -> Array:
    """The last ``count`` axes of a scale that has none before them."""
    if scale.size != prod(scale.shape[scale.ndim - count :]):
        raise CannotDivideError("the scale differs along other axes")
    return scale.reshape(scale.shape[scale.ndim - count :])


def _along(scale: Array, axis: int) -> Array:
    """The scale as a vector along ``axis``, if it differs along no other."""
    if scale.shape[axis] != scale.size:
        raise CannotDivideError("the scale differs along other axes")
    return scale.reshape(-1)


# --- operators that have a constant per channel ------------------------------------------


def _gains(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    """Gain and bias of a normalisation, over the last axes or along the channels."""
    if value is not node.outputs[0]:
        raise CannotDivideError("not the normalised output")
    indices = _GAINS["" if node.domain == "ai.onnx" else node.domain, node.op_type]
    edits = []
    for index in (i for i in indices if i < len(node.inputs) and node.inputs[i] is not None):
        tensor = _constant(node, index)
        if tensor is None:
            raise CannotDivideError(f"the gain of '{node.name}' is computed")
        channels = node.op_type in _CHANNEL_NORMS
        row = _along(scale, 1) if channels else _trailing(scale, len(tensor.shape))
        edits.append(_edit(node, index, row))
    return edits


def _edit(node: ir.Node, index: int, scale: Array) -> Edit:
    """A constant divided by ``scale``, whose extents must be those of the constant."""
    tensor = _constant(node, index)
    if tensor is None or not tensor.dtype.is_floating_point():
        raise CannotDivideError(f"input {index} of '{node.name}' is not constant")
    return Edit(node, index, 1.0 / scale)


def _matmul(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    """The columns of a constant weight; those of the right operand of two activations."""
    tensor = _constant(node, 1)
    if tensor is not None:
        if len(tensor.shape) != 2:
            raise CannotDivideError("the weight is no matrix")
        return [_edit(node, 1, _along(scale, -1)[None])]
    left, right = _dims(node.inputs[0]), _dims(node.inputs[1])
    if scale.ndim < 2 or len(right) != scale.ndim or len(left) > len(right):
        raise CannotDivideError("operands of different rank")
    if scale.shape[-2] != 1 or not _fits(scale, right, range(scale.ndim)):
        raise CannotDivideError("the scale differs along rows")
    return _input(node, 1, scale, fixed)


def _gemm(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    row = _along(scale, -1)
    turned = node.attributes.get_int("transB", 0)
    return [_edit(node, 1, row[:, None] if turned else row[None]), *_bias(node, row)]


def _bias(node: ir.Node, row: Array) -> list[Edit]:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return []
    tensor = _constant(node, 2)
    if tensor is None or any(dim != 1 for dim in tensor.shape[:-1]):
        raise CannotDivideError(f"the bias of '{node.name}' is no row of constants")
    return [_edit(node, 2, row)]


def _conv(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    row, tensor = _along(scale, 1), _constant(node, 1)
    if tensor is None:
        raise CannotDivideError("the weight is computed")
    shape: tuple[int, ...] = (-1, *(1 for _ in tensor.shape[1:]))
    return [_edit(node, 1, row.reshape(shape)), *_bias(node, row)]


def _conv_transpose(
    node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]
) -> list[Edit]:
    row, tensor = _along(scale, 1), _constant(node, 1)
    if tensor is None:
        raise CannotDivideError("the weight is computed")
    groups, inputs = node.attributes.get_int("group", 1), _extents(tensor)[0]
    rows = np.repeat(row.reshape(groups, -1), inputs // groups, 0)
    factor = rows.reshape(inputs, -1, *(1 for _ in tensor.shape[2:]))
    return [_edit(node, 1, factor), *_bias(node, row)]


# --- arithmetic --------------------------------------------------------------------------


def _mul(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    """A constant per channel, or one of two factors that has the channels."""
    for index in (0, 1):
        tensor = _constant(node, index)
        if tensor is not None and prod(_extents(tensor)) > 1:
            return [_edit(node, index, _as_constant(scale, tensor))]
    # A lone number stays: with a vector in its place runtimes would not know a GELU again.
    return _one_of(node, scale, fixed, (0, 1))


def _div(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    tensor = _constant(node, 1)
    if tensor is not None and prod(_extents(tensor)) > 1:
        edit = _edit(node, 1, _as_constant(scale, tensor))
        return [Edit(node, 1, 1.0 / edit.factor)]
    return _one_of(node, scale, fixed, (0,))


def _one_of(
    node: ir.Node, scale: Array, fixed: Collection[str], indices: Sequence[int]
) -> list[Edit]:
    error = CannotDivideError(f"no factor of '{node.name}' has the channels")
    for index in indices:
        if _constant(node, index) is not None:
            continue
        try:
            return _operand(node, index, scale, fixed)
        except CannotDivideError as found:
            error = found
    raise error


def _operand(node: ir.Node, index: int, scale: Array, fixed: Collection[str]) -> list[Edit]:
    """Divide an input of an elementwise node, if it has all axes that the scale differs along."""
    dims = _dims(node.inputs[index])
    own = _trailing(scale, len(dims))
    if not _fits(own, dims, range(len(dims))):
        raise CannotDivideError("the input is broadcast along the channels")
    return _input(node, index, own, fixed)


def _add(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    """Each term: a constant, or a tensor with the channels."""
    edits = []
    for index in (0, 1):
        tensor = _constant(node, index)
        if tensor is None:
            edits += _operand(node, index, scale, fixed)
        else:
            edits.append(_edit(node, index, _as_constant(scale, tensor)))
    return edits


def _as_constant(scale: Array, tensor: ir.TensorProtocol) -> Array:
    """The scale in the rank of a constant, where that loses nothing; runtimes know gains by it."""
    rank = len(tensor.shape)
    small = scale.size == prod(scale.shape[scale.ndim - rank :])
    return scale.reshape(scale.shape[scale.ndim - rank :]) if small else scale


def _homogeneous(
    node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]
) -> list[Edit]:
    if value is not node.outputs[0]:
        raise CannotDivideError("not the first output")
    if "Pool" in node.op_type:
        _along(scale, 1)
    return _operand(node, 0, scale, fixed)


def _attention(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    """The values, where they have the channels of the output and nothing is added to them."""
    index = _VALUES["" if node.domain == "ai.onnx" else node.domain, node.op_type]
    added = node.op_type == "MultiHeadAttention" and len(node.inputs) > 3 and node.inputs[3]
    dims = _dims(node.inputs[index])
    same = len(dims) == scale.ndim and _fits(scale, dims, range(scale.ndim))
    if added or value is not node.outputs[0] or not same or scale.shape[-2] != 1:
        raise CannotDivideError("the values have other channels")
    return _input(node, index, scale, fixed)


# --- movement ----------------------------------------------------------------------------


def _transpose(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    order = node.attributes.get_ints("perm", tuple(reversed(range(scale.ndim))))
    return _input(node, 0, scale.transpose(np.argsort(order)), fixed)


def _reshape(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    return _input(node, 0, _reshaped(scale, _dims(value), _dims(node.inputs[0])), fixed)


def _squeeze(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    rank = len(_dims(node.inputs[0]))
    return _input(node, 0, np.expand_dims(scale, _axes(node, rank)), fixed)


def _unsqueeze(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    return _input(node, 0, np.squeeze(scale, _axes(node, scale.ndim)), fixed)


def _axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    """The axes that a Squeeze or Unsqueeze takes away or adds, of the larger rank."""
    tensor = _constant(node, 1)
    given = node.attributes.get_ints("axes") if tensor is None else tensor.numpy().reshape(-1)
    if given is None:
        raise CannotDivideError("the axes are computed")
    return tuple(int(axis) % rank for axis in given)


def _reshaped(scale: Array, old: _Dims, new: _Dims) -> Array:
    """A scale of a tensor of extents ``old`` as one of ``new``, of which some may be unknown.

    The axes that the scale differs along must come out of axes of the same number of
    elements with the same elements before or behind them.
    """
    used = [axis for axis, extent in enumerate(scale.shape) if extent > 1]
    if not used:
        return scale.reshape([1] * len(new))
    for first in range(used[0], -1, -1):
        for last in range(used[-1] + 1, len(old) + 1):
            inner = prod_of(old[first:last])
            for start, stop in _spans(new, inner):
                before = _same(old[:first], new[:start])
                if before or _same(old[last:], new[stop:]):
                    full = np.broadcast_to(
                        scale, [*scale.shape[:first], *_ints(old[first:last]), *scale.shape[last:]]
                    )
                    return _thin(
                        full.reshape([1] * start + _ints(new[start:stop]) + [1] * (len(new) - stop))
                    )
    raise CannotDivideError("the channels do not stay together")


def _spans(dims: _Dims, count: int | None) -> list[tuple[int, int]]:
    """The runs of axes that hold ``count`` elements."""
    if count is None:
        return []
    return [
        (start, stop)
        for start in range(len(dims))
        for stop in range(start + 1, len(dims) + 1)
        if prod_of(dims[start:stop]) == count
    ]


def prod_of(dims: _Dims) -> int | None:
    """The number of elements, ``None`` where it is unknown."""
    return None if any(not isinstance(dim, int) for dim in dims) else prod(_ints(dims))


def _ints(dims: _Dims) -> list[int]:
    return [dim for dim in dims if isinstance(dim, int)]


def _same(old: _Dims, new: _Dims) -> bool:
    """Whether two runs of axes surely hold as many elements."""
    names = (sorted(d for d in dims if isinstance(d, str)) for dims in (old, new))
    if None in old or None in new:
        return False
    return prod(_ints(old)) == prod(_ints(new)) and len({tuple(each) for each in names}) == 1


def _thin(scale: Array) -> Array:
    """Extent 1 along the axes on which nothing differs."""
    for axis in range(scale.ndim):
        first = np.take(scale, [0], axis)
        if (scale == first).all():
            scale = first
    return scale


def _fits(scale: Array, dims: _Dims, axes: Sequence[int]) -> bool:
    return all(scale.shape[axis] in (1, dims[axis]) for axis in axes)


# --- parts of a tensor, as the values in a joint projection of queries, keys and values --


def _split(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    axis = node.attributes.get_int("axis", 0)
    start = 0
    for output in node.outputs:
        size = _dims(output)[axis]
        if not isinstance(size, int):
            raise CannotDivideError("the parts are of unknown size")
        if output is value:
            return _part(node, np.arange(start, start + size), axis, scale, fixed)
        start += size
    raise CannotDivideError("no such part")


def _slice(node: ir.Node, value: ir.Value, scale: Array, fixed: Collection[str]) -> list[Edit]:
    places = _places(node)
    if places is None:
        raise CannotDivideError("the slice is computed")
    axis, where = places
    return _part(node, where, axis, scale, fixed)


_gather = _slice


def _places(node: ir.Node) -> tuple[int, Array] | None:
    """The axis and the places on it that a Slice or Gather takes, if those are constant."""
    dims = _dims(node.inputs[0])
    numbers = [_constant(node, index) for index in range(1, len(node.inputs))]
    if any(number is None for number in numbers):
        return None
    values = [number.numpy().reshape(-1) for number in numbers if number is not None]
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0) % len(dims)
        size = dims[axis]
        return (axis, values[0] % size) if isinstance(size, int) else None
    if len(values) < 3 or any(array.size != 1 for array in values):
        return None
    axis = int(values[2][0]) % len(dims)
    step = int(values[3][0]) if len(values) > 3 else 1
    size = dims[axis]
    if not isinstance(size, int):
        return None
    return axis, np.arange(size)[slice(int(values[0][0]), int(values[1][0]), step)]


def _part(
    node: ir.Node, where: Array, axis: int, scale: Array, fixed: Collection[str]
) -> list[Edit]:
    """Divide the places ``where`` of an input that other readers take other places of."""
    value = node.inputs[0]
    dims = _dims(value)
    axis, size = axis % len(dims), dims[axis]
    scalar = node.op_type == "Gather" and scale.ndim == len(dims) - 1
    own = np.expand_dims(scale, axis) if scalar else scale
    if value is None or not isinstance(size, int) or own.ndim != len(dims):
        raise CannotDivideError("the parts are of unknown size")
    others = [reader for reader in value.consumers() if reader is not node]
    for other in (reader for reader in others if reader.op_type not in _SHAPE_READERS):
        taken = _places(other) if other.op_type in ("Gather", "Slice") else None
        if taken is None or taken[0] != axis or np.intersect1d(taken[1], where).size:
            raise CannotDivideError("another reader takes the same part")
    whole = np.ones([*own.shape[:axis], size, *own.shape[axis + 1 :]])
    index = [slice(None)] * whole.ndim
    index[axis] = where  # type: ignore[call-overload]
    whole[tuple(index)] = own
    if value.is_graph_output() or value.name in fixed:
        raise CannotDivideError("the whole is fixed")
    return _divide_producer(value, whole, fixed)


_RULES: dict[str, _Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Mul": _mul,
    "Div": _div,
    "Add": _add,
    "Sub": _add,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
}
