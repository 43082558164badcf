"""QNN and SNPE: what their ONNX converters want of a quantised file; they were not run.

From their documentation, and from the sources and tests of ONNX Runtime's provider for QNN.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_attnround.check.rules import (
    COMMON,
    Findings,
    Rule,
    activation_per_channel,
    codes_changed_on_the_way,
    half_quantised,
    operators_on_integers,
    weight_axis,
)
from onnx_attnround.check.view import DEQUANTISE, QUANTISE, View, bias_fits, constant, is_zero

_ACTIVATIONS = {"UINT8": 8, "UINT16": 16}
_SIGNED = {"INT8": 8, "INT16": 16}
_WEIGHTS = {"INT4", "INT8", "INT16"}
_LEAST_RANGE = 1e-4
_PER_TENSOR = frozenset({"Gemm", "MatMul"})
_FULL_RANGE = {"Sigmoid": 1.0, "Tanh": 2.0}
"""The width of the range that each op can return."""


def tensor_without_range(view: View) -> Findings:
    """Each float tensor has Q and DQ: one without makes the converter calibrate again."""
    for value in view.model.graph.inputs:
        if value.dtype == ir.DataType.FLOAT and value.const_value is None and (
            not _only_quantised(view, value)
        ):
            yield f"(input {value.name})", "no Q/DQ on this input"
    for node in view.model.graph:
        if node.op_type in (QUANTISE, DEQUANTISE):
            continue
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and not _only_quantised(view, value):
                yield node.name or "", f"no Q/DQ on its output '{value.name}'"
        for operand in node.inputs if node.op_type in view.target.arithmetic else ():
            tensor = constant(operand)
            if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
                yield node.name or "", f"no Q/DQ on its constant operand '{tensor.name}'"


def _only_quantised(view: View, value: ir.Value) -> bool:
    """Whether Q nodes alone read ``value``, itself or behind an activation that a Q absorbs."""
    if value.is_graph_output() and not value.is_graph_input():
        return False  # an input that is handed on is the caller's own
    if view.quantised(value) is not None:
        return True
    return all(reader.op_type == QUANTISE for reader in value.consumers())


def activation_type(view: View) -> Findings:
    """Activations have 8 or 16 bits."""
    for link in view.activations(QUANTISE):
        if link.codes.name not in _ACTIVATIONS and link.codes.name not in _SIGNED:
            yield link.name, f"{link.codes.name} activation: QNN takes UINT8 and UINT16"


def signed_activation(view: View) -> Findings:
    """All operators take activations without a sign, and some those with one."""
    for link in view.activations(QUANTISE):
        if link.codes.name in _SIGNED:
            yield link.name, (
                f"{link.codes.name} activation: only some of QNN's operators take it; all take "
                f"U{link.codes.name}"
            )


def weight_type(view: View) -> Findings:
    """Weights are INT4, INT8 or INT16."""
    for layer in view.layers:
        if layer.weight is not None and layer.weight.codes.name not in _WEIGHTS:
            yield layer.name, (
                f"{layer.weight.codes.name} weights: QNN takes INT4, INT8 and INT16"
            )


def weight_zero_point(view: View) -> Findings:
    """Weights are symmetric."""
    for layer in view.layers:
        if layer.weight is not None and not is_zero(layer.weight.point):
            yield layer.name, "the zero point of its weight is not 0"


def matrix_per_channel(view: View) -> Findings:
    """The weight of a MatMul has one scale, which every QNN takes."""
    for layer in view.layers:
        if layer.node.op_type in _PER_TENSOR and layer.weight and not layer.weight.per_tensor:
            yield layer.name, (
                "its weight has one scale per channel, which only newer releases take, under "
                "16-bit activations: give it one in all"
            )


def bias_scale(view: View) -> Findings:
    """A bias is INT32 with scale sx*sw and zero point 0."""
    for layer in view.layers:
        bias = layer.bias
        if not layer.quantised or len(layer.node.inputs) < 3 or layer.node.inputs[2] is None:
            continue
        if bias is None or bias.codes != ir.DataType.INT32 or not is_zero(bias.point):
            yield layer.name, "its bias is no INT32 with zero point 0"
        elif not bias_fits(layer):
            yield layer.name, "the scale of its bias is not that of its input times its weight's"


def range_too_narrow(view: View) -> Findings:
    """The range of an activation is at least 1e-4 wide."""
    for link in view.activations(QUANTISE):
        bits = _ACTIVATIONS.get(link.codes.name)
        if link.scale is not None and bits is not None:
            width = float(np.min(link.scale)) * (2**bits - 1)
            if width < 0.999 * _LEAST_RANGE:
                yield link.name, f"a range {width:.2g} wide: QNN takes 1e-4 at least"


def partial_range(view: View) -> Findings:
    """The output of Sigmoid and Tanh has its full range, in steps of a power of two."""
    for node in view.model.graph:
        width = _FULL_RANGE.get(node.op_type)
        link = None if width is None else view.quantised(node.outputs[0])
        bits = None if link is None else _ACTIVATIONS.get(link.codes.name)
        if width is None or link is None or link.scale is None or bits is None:
            continue
        if float(link.scale) != width / 2**bits:
            yield link.name, (
                f"scale {float(link.scale):g} behind {node.op_type}: expected {width / 2**bits:g}"
            )


RULES = (
    *COMMON,
    Rule(tensor_without_range),
    Rule(activation_type),
    Rule(signed_activation, refused=False),
    Rule(activation_per_channel),
    Rule(weight_type),
    Rule(weight_zero_point),
    Rule(weight_axis),
    Rule(matrix_per_channel, refused=False),
    Rule(bias_scale),
    Rule(range_too_narrow),
    Rule(partial_range),
    Rule(codes_changed_on_the_way),
    Rule(half_quantised, refused=False),
    Rule(operators_on_integers, refused=False),
)
