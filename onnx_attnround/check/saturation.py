"""Layers whose sums are cut off at 16 bits on some CPUs: x86-64 without VNNI.

There a kernel multiplies codes of activations, unsigned, with signed codes of weights, and adds
the products two by two in 16 bits. Which two depends on how it packs them, so that a layer
passes only if any two weights of a row do. Unsigned weights have kernels that add in 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_attnround.check.rules import Finding, Findings, Rule
from onnx_attnround.check.view import View, constant
from onnx_attnround.graph import attributes_of
from onnx_attnround.ops import is_depthwise
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import EXACT_SUMS
from onnx_attnround.targets import INT16_MAX

_BARE = {
    "QLinearConv": ("Conv", 3),
    "QLinearMatMul": ("MatMul", 3),
    "QGemm": ("Gemm", 3),
    "ConvInteger": ("Conv", 1),
    "MatMulInteger": ("MatMul", 1),
    "MatMulIntegerToFloat": ("MatMul", 1),
    "DynamicQuantizeMatMul": ("MatMul", 1),
}
"""Operators on integers: the op that they compute, and the index of the weight; ``x`` is first."""


@dataclass(frozen=True, slots=True)
class Product:
    """A node that multiplies ``weight``, in codes, with ``x``, codes of activations."""

    node: ir.Node
    op_type: str
    x: ir.Value | None
    weight: ir.Value | None


def pairs_beyond_int16(view: View) -> Findings:
    """No two products of a row add up to more than int16 holds."""
    if not view.target.int16_pairs:
        return
    with_option = f", and so are all with the session option {EXACT_SUMS} set to 1"
    option = with_option if view.target.runtime == "onnxruntime" else ""
    for product in products(view):
        codes = constant(product.weight)
        if codes is None or codes.dtype.name != "INT8":
            continue
        highest = _highest(product.x)
        largest = _largest_pair(product, codes.numpy())
        if largest * highest > INT16_MAX:
            yield product.node.name or "", (
                f"two codes of its weight add up to {largest}: on x86-64 CPUs without VNNI its "
                "sums may be cut off at 16 bits, and its output wrong; codes of up to "
                f"±{view.target.code_limit(highest)} (`weight_range` safe) are exact on all"
                f"{option}"
            )


def fits_int16(view: View, findings: Iterable[Finding]) -> bool | None:
    """Whether the rule found nothing; ``None`` where no pairs are added in 16 bits."""
    if not view.target.int16_pairs or next(products(view), None) is None:
        return None
    return all(found.rule != Rule(pairs_beyond_int16).name for found in findings)


def products(view: View) -> Iterator[Product]:
    """The nodes that the runtime computes in integer, or would."""
    for layer in view.layers:
        if layer.node.op_type not in view.target.weighted:
            continue
        if layer.x is None or layer.weight is None or layer.weight.blocked:
            continue
        if layer.x.codes.name in ("INT8", "UINT8"):
            codes = (link.node.inputs[0] for link in (layer.x, layer.weight))
            yield Product(layer.node, layer.node.op_type, *codes)
    for node in view.model.graph.all_nodes():
        if node.op_type in _BARE:
            op_type, index = _BARE[node.op_type]
            yield Product(node, op_type, node.inputs[0], node.inputs[index])


def _largest_pair(product: Product, codes: Array) -> int:
    """The largest magnitude of the sum of two codes of one sign in a row; 0 if none are added."""
    attributes = attributes_of(product.node)
    if is_depthwise(product.op_type, attributes, codes.shape):
        return 0
    if product.op_type == "Conv":
        rows = codes.reshape(len(codes), -1)
    else:
        rows = codes if attributes.get("transB", 0) else np.swapaxes(codes, -1, -2)
    if rows.size == 0 or rows.shape[-1] < 2:
        return 0
    ends = np.partition(rows, (1, rows.shape[-1] - 2), axis=-1).astype(np.int32)
    return int(max(-ends[..., :2].sum(-1).min(), ends[..., -2:].sum(-1).max(), 0))


def _highest(x: ir.Value | None) -> int:
    """The highest code of an activation as kernels have it, shifted to codes without sign."""
    producer = None if x is None else x.producer()
    if producer is None or producer.op_type != "Clip" or len(producer.inputs) < 3:
        return 255
    bound = constant(producer.inputs[2])
    if bound is None:
        return 255
    return int(bound.numpy()) + (128 if bound.dtype.name == "INT8" else 0)
