"""Each layer with a bias of its own, one number per output: rounding gives it other values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import is_read_once, is_standard
from onnx_attnround.simplify.constants import constant, replace_constant


def give_own_bias(model: ir.Model) -> int:
    """A bias that others read too is copied, and one that a Gemm broadcasts becomes a row."""
    layers = [node for node in model.graph if is_standard(node)]
    return sum(_give(node) for node in layers if node.op_type in ("Conv", "ConvTranspose", "Gemm"))


def _give(layer: ir.Node) -> bool:
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    data, outputs = constant(bias), outputs_of(layer)
    if bias is None or data is None or outputs is None:
        return False
    broadcast = data.size == 1 and data.size != outputs
    if not broadcast and is_read_once(bias):
        return False
    replace_constant(layer, 2, bias, np.resize(data, outputs) if broadcast else data)
    return True


def outputs_of(layer: ir.Node) -> int | None:
    """The number of output channels, ``None`` where the weight is no constant."""
    weight = layer.inputs[1]
    if weight is None or weight.const_value is None:
        return None
    shape = weight.const_value.shape.numpy()
    if layer.op_type == "ConvTranspose":
        return shape[1] * layer.attributes.get_int("group", 1)
    by_column = layer.op_type == "Gemm" and not layer.attributes.get_int("transB", 0)
    return shape[int(by_column)]
