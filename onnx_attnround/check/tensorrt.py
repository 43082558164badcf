"""TensorRT: the rules of its ONNX parser, and of what it fuses.

From the sources of onnx-tensorrt (``QuantDequantLinearHelper``) and NVIDIA's guide
to explicit quantisation; it was not run.
"""

from __future__ import annotations

import onnx_ir as ir

from onnx_attnround.check.rules import (
    COMMON,
    Findings,
    Rule,
    activation_per_channel,
    codes_changed_on_the_way,
    half_quantised,
    is_integer,
    weight_axis,
)
from onnx_attnround.check.view import QUANTISE, Link, View, constant, is_zero
from onnx_attnround.graph import only_reader

_TYPES = {"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}
_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)


def zero_point_not_zero(view: View) -> Findings:
    """Quantisation is symmetric: all zero points are 0."""
    for link in view.links:
        if not is_zero(link.point):
            yield link.name, "zero point is not 0: TensorRT takes symmetric quantisation only"


def type_not_taken(view: View) -> Findings:
    """Codes are INT8, INT4, FP8 or FP4."""
    biases = [layer.bias for layer in view.layers]  # have a rule of their own
    for link in view.links:
        if link.codes.name not in _TYPES and link not in biases:
            yield link.name, f"{link.codes.name} codes: TensorRT takes INT8, INT4, FP8 and FP4"


def quantised_bias(view: View) -> Findings:
    """A bias stays float: its INT32 DQ is refused."""
    for layer in view.layers:
        if layer.bias is not None:
            yield layer.name, (
                f"its bias comes from a DequantizeLinear of {layer.bias.codes.name}: leave it float"
            )


def integer_operator(view: View) -> Findings:
    """Integer operators are unknown: integer layers are float nodes between Q and DQ."""
    for node in view.model.graph.all_nodes():
        if is_integer(node) or node.domain == "com.microsoft":
            yield node.name or "", f"{node.op_type} is unknown to TensorRT: use Q/DQ nodes"


def four_bits_of_an_activation(view: View) -> Findings:
    """4 bits are for weights alone."""
    for link in view.activations(QUANTISE):
        if link.codes in _FOUR_BITS:
            yield link.name, "a 4-bit activation: TensorRT takes 4 bits for weights only"


def four_bits_not_blocked(view: View) -> Findings:
    """4-bit weights have blocks of 64 or 128, an even last dimension, and a float input."""
    for layer in view.layers:
        link = layer.weight
        if link is None or link.codes not in _FOUR_BITS:
            continue
        data = link.node.inputs[0]
        last = data.shape[-1] if data is not None and data.shape else None
        if not link.blocked:
            yield layer.name, "4-bit weights without blocks: give them block-wise scales, or INT8"
        elif link.block_size not in view.target.block_sizes:
            yield layer.name, f"4-bit weights in blocks of {link.block_size}: give them 64 or 128"
        elif isinstance(last, int) and last % 2:
            yield layer.name, f"4-bit weights with a last dimension of {last}: it must be even"
        elif layer.x is not None:
            yield layer.name, "4-bit weights under quantised activations: leave those float"


def zero_point_missing(view: View) -> Findings:
    """A Q without zero point makes UINT8 codes by the standard, INT8 in TensorRT."""
    for link in view.links:
        typed = link.has_point or "output_dtype" in link.node.attributes
        if link.node.op_type == QUANTISE and not typed:
            yield link.name, "no zero point: it means UINT8, TensorRT takes INT8; write it"


def quantised_output(view: View) -> Findings:
    """A graph output is not quantised: it costs accuracy and a kernel."""
    for value in view.model.graph.outputs:
        link = view.dequantised(value)
        if link is not None:
            yield link.name, f"graph output '{value.name}' comes from a DequantizeLinear: drop it"


def residual_not_fused(view: View) -> Findings:
    """Conv + Add fuse if the Conv's branch is float and the shortcut comes from a DQ."""
    for node in view.model.graph:
        if node.op_type != "Add" or any(constant(value) is not None for value in node.inputs):
            continue
        straight = [value for value in node.inputs if _from_layer(view, value)]
        links = [view.dequantised(value) for value in node.inputs]
        if straight and not any(links):
            yield node.name or "", "no Q/DQ on the shortcut: the Add is not fused into the Conv"
        elif all(links) and any(_own_quantised_layer(view, link) for link in links if link):
            yield node.name or "", "Q/DQ on the branch from the Conv: the Add is not fused into it"


def _from_layer(view: View, value: ir.Value | None) -> bool:
    """Whether a layer run in integer makes ``value`` for one reader."""
    if value is None or only_reader(value) is None:
        return False
    return value.producer() in {layer.node for layer in view.layers if layer.quantised}


def _own_quantised_layer(view: View, link: Link) -> bool:
    """Whether a DQ restores, for one reader, the output of a layer that only its Q reads."""
    data = link.node.inputs[0]
    quantise = None if data is None else data.producer()
    if quantise is None or only_reader(link.node.outputs[0]) is None:
        return False
    return _from_layer(view, quantise.inputs[0])


RULES = (
    *COMMON,
    Rule(zero_point_not_zero),
    Rule(type_not_taken),
    Rule(quantised_bias),
    Rule(activation_per_channel),
    Rule(weight_axis),
    Rule(integer_operator),
    Rule(four_bits_of_an_activation),
    Rule(four_bits_not_blocked),
    Rule(codes_changed_on_the_way),
    Rule(zero_point_missing),
    Rule(quantised_output, refused=False),
    Rule(residual_not_fused, refused=False),
    Rule(half_quantised, refused=False),
)
