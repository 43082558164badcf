"""OpenVINO: what its ONNX reader takes, and what its CPU plugin runs in integer.

Each rule was tried on OpenVINO 2026.4.1 (docs/targets.md).
"""

from __future__ import annotations

from onnx_attnround.check.rules import COMMON, Findings, Rule, operators_on_integers
from onnx_attnround.check.saturation import pairs_beyond_int16
from onnx_attnround.check.view import DEQUANTISE, QUANTISE, View, is_zero

_TYPES = {"INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16", "INT32"}


def type_not_taken(view: View) -> Findings:
    """Codes have 4, 8 or 16 bits, those of a bias 32: other types do not load."""
    for link in view.links:
        stored = link.codes if link.stored is None else link.stored
        for dtype in dict.fromkeys((stored, link.codes)):
            if dtype.name not in _TYPES:
                yield link.name, f"{dtype.name} codes: OpenVINO takes 4, 8 and 16 bits"


def zero_point_missing(view: View) -> Findings:
    """A Q without zero point makes UINT8 codes, whatever reads them: it is always written."""
    for link in view.links:
        if link.node.op_type == QUANTISE and not link.has_point:
            yield link.name, "no zero point: it is taken as UINT8; write it"


def scale_of_rank_2(view: View) -> Findings:
    """Under quantised activations scales are scalar or 1-D: blocks run in float."""
    for layer in view.layers:
        if layer.weight is not None and layer.weight.blocked and layer.x is not None:
            yield layer.name, "block-wise weights under quantised activations run in float"


def short_block(view: View) -> Findings:
    """A block with fewer inputs than the others does not load."""
    for link in view.links:
        data = link.node.inputs[0]
        size = link.block_size
        inputs = data.shape[link.axis] if size and data is not None and data.shape else 0
        if isinstance(inputs, int) and size and inputs % size:
            yield link.name, (
                f"blocks of {size} for {inputs} inputs: OpenVINO takes whole blocks only"
            )


def pad_of_offset_codes(view: View) -> Findings:
    """A DQ before a Pad is moved behind it, which then pads with code 0: a wrong value."""
    for node in view.model.graph:
        link = view.dequantised(node.inputs[0]) if node.op_type == "Pad" else None
        if link is not None and not is_zero(link.point):
            yield node.name or "", (
                "pads a dequantised tensor whose zero point is not 0: OpenVINO pads with a wrong "
                "value; pad before the QuantizeLinear"
            )


def sixteen_bits(view: View) -> Findings:
    """16-bit Q/DQ are left out: their readers compute in float, and nothing clips to the range."""
    for link in view.activations(DEQUANTISE):
        if link.codes.name in ("INT16", "UINT16"):
            yield link.name, "16-bit activations: OpenVINO leaves them float, and does not clip"


RULES = (
    *COMMON,
    Rule(type_not_taken),
    Rule(zero_point_missing),
    Rule(short_block),
    Rule(pad_of_offset_codes),
    Rule(scale_of_rank_2, refused=False),
    Rule(sixteen_bits, refused=False),
    Rule(pairs_beyond_int16, refused=False),
    Rule(operators_on_integers, refused=False),
)
