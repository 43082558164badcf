"""The types that codes are stored in, and the opset that has them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnx_attnround.records import LayerPlan, LayerRounding, QuantParams, QuantPlan, QuantSpec
from onnx_attnround.targets import Target, WeightStorage

PER_CHANNEL_OPSET = 13
"""The opset that gave QuantizeLinear and DequantizeLinear scales per channel."""

LOW_BIT_OPSET = 21
"""The opset that gave them INT4, 16-bit types and blocks."""

TWO_BIT_OPSET = 25
"""The opset that gave Cast INT2."""


def required_opset(
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    roundings: Mapping[str, LayerRounding],
    storage: WeightStorage,
) -> int:
    """The oldest opset that has what is written: INT2 codes, INT4 codes or blocks, or neither."""
    specs = {layer.node: roundings[layer.node].spec for layer in plan.layers}
    weights = {
        code_type(layer, specs[layer.node], params, storage, plan.target) for layer in plan.layers
    }
    blocks = any(spec.block_size for spec in specs.values())
    wide_activations = any(spec.bits > 8 for spec in plan.activations.values())
    if ir.DataType.INT2 in weights:
        return TWO_BIT_OPSET
    low = ir.DataType.INT4 in weights or blocks or wide_activations
    return LOW_BIT_OPSET if low else PER_CHANNEL_OPSET


def code_type(
    layer: LayerPlan,
    spec: QuantSpec,
    params: Mapping[str, QuantParams],
    storage: WeightStorage,
    target: Target,
) -> ir.DataType:
    """The type of the initialiser that holds weight codes: INT8 where ``storage`` is not taken."""
    if storage not in target.storages(blocks=spec.block_size is not None):
        return ir.DataType.INT8
    if spec.bits <= 2 and storage == "packed2" and _fills_bytes(layer, params):
        return ir.DataType.INT2
    return ir.DataType.INT4 if spec.bits <= 4 and storage != "int8" else ir.DataType.INT8


def stored_bits(
    layer: LayerPlan,
    bits: int,
    params: Mapping[str, QuantParams],
    storage: WeightStorage,
    target: Target,
) -> int:
    """Bits that a weight of ``layer`` takes in the file when its codes have ``bits``."""
    return code_type(layer, layer.spec_of(bits), params, storage, target).bitwidth


def _fills_bytes(layer: LayerPlan, params: Mapping[str, QuantParams]) -> bool:
    """Whether 2-bit codes may be written: of a matrix under a float input, whole bytes in a row.

    Else ONNX Runtime 1.31 computes something else.
    """
    axis = layer.weight_spec.axis
    matrix = layer.is_matrix and layer.x not in params
    return not matrix or axis is None or layer.weight_shape[axis] % 4 == 0


def activation_type(spec: QuantSpec) -> ir.DataType:
    """The type of an activation's codes, at least 8 bits wide.

    Narrower codes are clipped, so that layers still run in integer. DynamicQuantizeLinear
    makes codes without sign alone.
    """
    if spec.dynamic:
        return ir.DataType.UINT8
    return ir.DataType[f"{'' if spec.signed else 'U'}INT{8 if spec.bits <= 8 else 16}"]
