"""ONNX Runtime on CPUs: what fails to load, or computes something else.

Each rule was tried on ONNX Runtime 1.31.1 (docs/targets.md).
"""

from __future__ import annotations

from onnx_attnround.check.rules import COMMON, Found, Rule
from onnx_attnround.check.view import View

_TWO_BITS = ("INT2", "UINT2")


def two_bits_under_integer_activations(view: View) -> Found:
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


def blocks_of_eight_bits_under_integer_activations(view: View) -> Found:
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


def zero_point_missing(view: View) -> Found:
    """Since 1.28 the weight of a Gemm is fused only with a zero point."""
    for layer in view.layers:
        if layer.node.op_type == "Gemm" and layer.weight and not layer.weight.has_point:
            yield layer.name, "its weight has no zero point: it is not fused; write zeros"


RULES = (
    *COMMON,
    Rule(two_bits_under_integer_activations),
    Rule(blocks_of_eight_bits_under_integer_activations),
    Rule(zero_point_missing, refused=False),
)
