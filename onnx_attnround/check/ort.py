"""ONNX Runtime on CPUs: what fails to load, or computes something else.

Each rule was tried on ONNX Runtime 1.31.1 (docs/targets.md).
"""

from __future__ import annotations

from onnx_attnround.check.amx import half_full_tiles
from onnx_attnround.check.rules import COMMON, Findings, Rule, operators_on_integers
from onnx_attnround.check.saturation import pairs_beyond_int16
from onnx_attnround.check.view import View
from onnx_attnround.graph import only_reader
from onnx_attnround.records import MATRIX_OPS

_TWO_BITS = ("INT2", "UINT2")


def two_bits_under_integer_activations(view: View) -> Findings:
    """2-bit weights are fused into a kernel that does not take them, and the model fails to load.

    That happens to a MatMul with a quantised input, and to a Conv whose output is quantised too.
    """
    for layer in view.layers:
        fused = layer.node.op_type == "MatMul" or (
            layer.node.op_type == "Conv" and view.quantised(layer.node.outputs[0]) is not None
        )
        if layer.quantised and layer.weight and layer.weight.codes.name in _TWO_BITS and fused:
            yield layer.name, (
                f"{layer.weight.codes.name} weights under quantised activations fail to load: "
                "put a Cast to INT8 before the DequantizeLinear, or store them as INT4 or INT8"
            )


def two_bits_that_fill_no_bytes(view: View) -> Findings:
    """Under a float input 2-bit weights become MatMulNBits, as if each row began a byte."""
    for layer in view.layers:
        matrix = layer.node.op_type in MATRIX_OPS
        if layer.quantised or layer.weight is None or not matrix:
            continue
        fused = layer.weight.codes.name in _TWO_BITS and not layer.node.attributes.get_int(
            "transB", 0
        )
        shape = layer.node.inputs[1].shape if layer.node.inputs[1] is not None else None
        columns = shape[-1] if shape else 0
        if fused and isinstance(columns, int) and columns % 4:
            yield layer.name, (
                f"2-bit weights with {columns} columns give a wrong output: their number must be "
                "a multiple of 4; store them in 4 bits"
            )


def blocks_of_eight_bits_under_integer_activations(view: View) -> Findings:
    """A MatMul is fused as if it had one scale per column: it fails, or its output is wrong."""
    for layer in view.layers:
        weight = layer.weight
        if layer.x is None or weight is None or layer.node.op_type != "MatMul":
            continue
        if weight.blocked and weight.codes.name in ("INT8", "UINT8"):
            yield layer.name, (
                "block-wise INT8 weights under quantised activations give a wrong output: leave "
                "the activations float, or give the weights one scale per column"
            )


def clipped_low_bit_weights(view: View) -> Findings:
    """A MatMul or Gemm is no MatMulNBits before a Relu or Clip that one node reads."""
    for layer in view.layers:
        matrix = layer.node.op_type in MATRIX_OPS
        if layer.weight is None or layer.x is not None or not matrix:
            continue
        clip = only_reader(layer.node.outputs[0])
        if clip is None or clip.op_type not in ("Relu", "Clip"):
            continue
        if only_reader(clip.outputs[0]) is not None:
            yield layer.name, (
                f"its weights are unpacked in every run, for the {clip.op_type} behind it: put Max "
                "(and Min) in its place"
            )


def zero_point_missing(view: View) -> Findings:
    """Since 1.28 the weight of a Gemm is fused only with a zero point."""
    for layer in view.layers:
        if layer.node.op_type == "Gemm" and layer.weight and not layer.weight.has_point:
            yield layer.name, "its weight has no zero point: it is not fused; write zeros"


RULES = (
    *COMMON,
    Rule(two_bits_under_integer_activations),
    Rule(two_bits_that_fill_no_bytes),
    Rule(blocks_of_eight_bits_under_integer_activations),
    Rule(clipped_low_bit_weights, refused=False),
    Rule(zero_point_missing, refused=False),
    Rule(pairs_beyond_int16, refused=False),
    Rule(half_full_tiles, refused=False),
    Rule(operators_on_integers, refused=False),
)
