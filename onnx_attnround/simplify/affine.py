"""Factors and terms behind a layer moved into its weight and bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import is_standard
from onnx_attnround.records import Array
from onnx_attnround.simplify.batch_norm import bias_of, layer_behind, scale_outputs
from onnx_attnround.simplify.constants import constant, replace_constant, take_over_output
from onnx_attnround.simplify.layer_bias import outputs_of

_OPS = ("Mul", "Div", "Add", "Sub")


def fold_affine(model: ir.Model) -> int:
    """``W x + b``, times or divided by ``a``, plus or minus ``c``, becomes ``W' x + b'``.

    ``a`` and ``c`` are constants, numbers or one per output channel. The layer must be a
    Conv, ConvTranspose or Gemm with constant weight and bias, whose output nobody else
    reads.
    """
    return sum(_fold(model.graph, node) for node in list(model.graph) if _is_affine(node))


def _is_affine(node: ir.Node) -> bool:
    return is_standard(node) and node.op_type in _OPS and len(node.inputs) == 2


def _fold(graph: ir.Graph, node: ir.Node) -> bool:
    for index in (0, 1):
        layer, operand = layer_behind(node.inputs[index]), node.inputs[1 - index]
        rank = 0 if layer is None or layer.inputs[1] is None else _rank(layer.inputs[1])
        values = _per_channel(constant(operand), rank)
        if layer is None or values is None or (index == 1 and node.op_type == "Div"):
            continue
        scale, shift = _affine(node.op_type, values, reverse=index == 1)
        if move_into(layer, scale, shift, operand):
            take_over_output(graph, layer, node)
            return True
    return False


def move_into(layer: ir.Node, scale: Array, shift: Array, like: ir.Value | None) -> bool:
    """Let ``layer`` compute ``scale * y + shift`` in place of ``y``; whether it could.

    Both are numbers or one number per output channel. A layer without a bias gets one, in
    the place or the type of ``like``.
    """
    weight, old_bias = (*layer.inputs[1:3], None)[:2]
    kernel, bias, channels = constant(weight), bias_of(layer, old_bias), outputs_of(layer)
    if kernel is None or bias is None or channels is None or not np.isfinite(scale).all():
        return False
    if scale.size not in (1, channels) or shift.size not in (1, channels):
        return False
    each = np.zeros(channels)
    replace_constant(layer, 1, weight, scale_outputs(layer, kernel, scale + each))
    layer.resize_inputs(3)
    replace_constant(layer, 2, old_bias or like, scale * bias + shift + each)
    return True


def _rank(value: ir.Value) -> int:
    return 0 if value.const_value is None else len(value.const_value.shape)


def _affine(op_type: str, values: Array, *, reverse: bool) -> tuple[Array, Array]:
    """Factor and term of the op; with ``reverse`` it has the constant on its left."""
    one, zero = np.ones(1), np.zeros(1)
    if op_type == "Mul":
        return values, zero
    if op_type == "Div":
        with np.errstate(divide="ignore"):
            return 1 / values, zero
    if op_type == "Add":
        return one, values
    return (-one, values) if reverse else (one, -values)


def _per_channel(values: Array | None, rank: int) -> Array | None:
    """The operand as one number in all or per channel, on axis 1 of ``rank``; else ``None``."""
    if values is None or values.ndim > rank:
        return None
    shape = (1,) * (rank - values.ndim) + values.shape
    along = [axis for axis, size in enumerate(shape) if size != 1]
    return values.reshape(-1) if along in ([], [1]) else None
