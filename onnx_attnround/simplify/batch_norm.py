"""BatchNormalization moved into the weight and bias of the layer before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import is_read_once, is_standard
from onnx_attnround.qdq.arithmetic import channel_view
from onnx_attnround.records import Array
from onnx_attnround.simplify.constants import constant, replace_constant, take_over_output

_LAYERS = ("Conv", "ConvTranspose", "Gemm")


def fold_batch_norm(model: ir.Model) -> int:
    """``gamma * (W x + b - mean) / sqrt(variance + epsilon) + beta`` becomes ``W' x + b'``.

    With ``a = gamma / sqrt(variance + epsilon)`` per output channel,
    ``W' = a * W`` and ``b' = a * (b - mean) + beta``. The layer must be a Conv,
    ConvTranspose or Gemm with constant weight and bias, whose output nobody
    else reads, and the BatchNormalization must be in inference mode.
    """
    norms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    return sum(_fold(model.graph, norm) for norm in norms if _is_fixed(norm))


def _fold(graph: ir.Graph, norm: ir.Node) -> bool:
    layer = layer_behind(norm.inputs[0])
    if layer is None:
        return False
    weight, old_bias = (*layer.inputs[1:3], None)[:2]
    values = weight, *norm.inputs[1:5]
    constants = [data for value in values if (data := constant(value)) is not None]
    bias = bias_of(layer, old_bias)
    if bias is None or len(constants) != len(values):
        return False
    kernel, gamma, beta, mean, variance = constants
    scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    replace_constant(layer, 1, weight, scale_outputs(layer, kernel, scale))
    layer.resize_inputs(3)
    replace_constant(layer, 2, old_bias or norm.inputs[2], scale * (bias - mean) + beta)
    take_over_output(graph, layer, norm)
    return True


def _is_fixed(norm: ir.Node) -> bool:
    """Whether statistics are constants per channel, not those of the batch."""
    training = norm.attributes.get_int("training_mode", 0) or any(
        output.name for output in norm.outputs[1:]
    )
    return is_standard(norm) and not training and norm.attributes.get_int("spatial", 1) == 1


def layer_behind(y: ir.Value | None) -> ir.Node | None:
    """The layer that makes ``y``, if one node alone reads that."""
    layer = None if y is None else y.producer()
    if y is None or layer is None or not is_standard(layer) or layer.op_type not in _LAYERS:
        return None
    return layer if is_read_once(y) else None


def bias_of(layer: ir.Node, value: ir.Value | None) -> Array | None:
    """The bias in float64, 0 if there is none; ``None`` if it is not one number per channel."""
    if value is None:
        return np.zeros(1)
    data = constant(value)
    if data is None or any(rows != 1 for rows in data.shape[:-1]):
        return None
    return data.reshape(-1) if layer.attributes.get_float("beta", 1.0) == 1.0 else None


def scale_outputs(layer: ir.Node, weight: Array, scale: Array) -> Array:
    """``weight`` with the part that makes output channel ``n`` multiplied by ``scale[n]``."""
    if layer.op_type == "ConvTranspose":  # [Cin, Cout / groups, ...], Cin in blocks of a group
        groups = layer.attributes.get_int("group", 1)
        blocks = weight.reshape(groups, -1, *weight.shape[1:])
        factors = scale.reshape(groups, 1, -1, *(1 for _ in weight.shape[2:]))
        return (blocks * factors).reshape(weight.shape)
    by_column = layer.op_type == "Gemm" and not layer.attributes.get_int("transB", 0)
    return weight * channel_view(scale, weight.ndim, int(by_column))
