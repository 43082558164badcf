"""MatMul and Add of rank 2 as Gemm, which runs in integer, with its bias where that is constant."""

from __future__ import annotations

import onnx_ir as ir

from onnx_attnround.graph import is_read_once, is_standard
from onnx_attnround.simplify.constants import take_over_output


def fold_matmul_bias(model: ir.Model) -> int:
    """``A @ B + C`` becomes a Gemm, for ``A [m, k]`` and constants ``B [k, n]``, ``C [n]``.

    With any other ``C`` of rank 2 the product alone does, and the Add stays. ONNX Runtime
    joins MatMul and Add by itself, but computes in float where the output is not
    quantised: a Gemm must have an integer bias then. A MatMul of higher rank runs in
    integer as it is.
    """
    adds = [node for node in model.graph if node.op_type == "Add" and is_standard(node)]
    return sum(
        _fold(model.graph, add, *add.inputs) or _fold(model.graph, add, *reversed(add.inputs))
        for add in adds
    )


def _fold(graph: ir.Graph, add: ir.Node, product: ir.Value | None, bias: ir.Value | None) -> bool:
    matmul = None if product is None else product.producer()
    if product is None or matmul is None or matmul.op_type != "MatMul" or not is_standard(matmul):
        return False
    x, weight = matmul.inputs
    matrix, row = _constant_shape(weight), _constant_shape(bias)
    is_row = row in (matrix[1:], [1, *matrix[1:]])
    if len(matrix) != 2 or not is_read_once(product) or _rank(x) != 2:
        return False
    if not is_row and _rank(bias) != 2:
        return False
    matmul.op_type = "Gemm"
    if is_row:
        matmul.resize_inputs(3)
        matmul.replace_input_with(2, bias)
        take_over_output(graph, matmul, add)
    return True


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _constant_shape(value: ir.Value | None) -> list[object]:
    """The shape of an initializer of floats, that of a scalar for any other value."""
    tensor = None if value is None or not value.is_initializer() else value.const_value
    return [] if tensor is None or not tensor.dtype.is_floating_point() else list(tensor.shape)
