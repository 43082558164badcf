"""Gemm without factors: what the integer kernels of runtimes want."""

from __future__ import annotations

import onnx_ir as ir

from onnx_attnround.graph import is_standard
from onnx_attnround.simplify.constants import constant, replace_constant


def fold_gemm_scale(model: ir.Model) -> int:
    """``alpha * A @ B + beta * C`` with constant B and C becomes ``A @ (alpha * B) + beta * C``.

    A factor whose matrix is not constant stays.
    """
    return sum(_fold(node) for node in model.graph if node.op_type == "Gemm" and is_standard(node))


def _fold(gemm: ir.Node) -> bool:
    folded = False
    for name, index in (("alpha", 1), ("beta", 2)):
        factor = gemm.attributes.get_float(name, 1.0)
        value = gemm.inputs[index] if index < len(gemm.inputs) else None
        if factor == 1.0:
            continue
        data = constant(value)
        if value is not None and data is None:
            continue
        if value is not None and data is not None:
            replace_constant(gemm, index, value, factor * data)
        gemm.attributes.pop(name)
        folded = True
    return folded
