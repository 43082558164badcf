"""Layers that ONNX Runtime 1.21 to 1.24 computes wrongly on CPUs with AMX.

AMX (Xeons since Sapphire Rapids) multiplies tiles of 32 outputs. Of a last tile that is more
than half full, and not full, those releases read what was never written, wherever a product has
32 rows or more: the output is another one in each run. 1.20 and 1.25 are right
(microsoft/onnxruntime issue 26324, pull request 27671).
"""

from __future__ import annotations

from onnx_attnround.check.rules import Findings
from onnx_attnround.check.saturation import Product, products
from onnx_attnround.check.view import View, constant
from onnx_attnround.graph import attributes_of
from onnx_attnround.ops import is_depthwise
from onnx_attnround.records import Array

TILE = 32


def half_full_tiles(view: View) -> Findings:
    """The outputs of a layer fill tiles of 32, or at most half of the last."""
    if view.target.activation_signed:
        return  # those files are for ARM
    found = []
    for product in products(view):
        codes = constant(product.weight)
        if codes is not None and _outputs(product, codes.numpy()) % TILE > TILE // 2:
            found.append(product.node.name or "")
    if found:
        named = f"{found[0]} and {len(found) - 1} more" if len(found) > 1 else found[0]
        yield "(model)", (
            f"{named}: ONNX Runtime 1.21 to 1.24 computes products of such widths wrongly on "
            "x86-64 CPUs with AMX; use 1.25 or newer there"
        )


def _outputs(product: Product, codes: Array) -> int:
    """Outputs of a group; 0 where no matrix is multiplied."""
    attributes = attributes_of(product.node)
    if codes.size == 0 or is_depthwise(product.op_type, attributes, codes.shape):
        return 0
    if product.op_type == "Conv":
        return int(codes.shape[0]) // int(attributes.get("group", 1))
    return int(codes.shape[-2 if attributes.get("transB", 0) else -1])
