"""Weights that ONNX Runtime makes floats of once, when it loads the file.

It folds constants, but no DequantizeLinear: behind one, a weight that no kernel reads as integers
would be unpacked in every run, and keep its Conv from the faster layout (docs/weight_only.md).
``Mul(Cast(codes), scale)`` is folded, and takes no more room in the file.
"""

from __future__ import annotations

import onnx_ir as ir

from onnx_attnround.records import QuantPlan

_UNPACKED = frozenset({"Conv", "ConvTranspose"})
"""Ops without a kernel that multiplies floats by low-bit weights."""


def fold_weights(model: ir.Model, plan: QuantPlan) -> None:
    """Write the weights of layers that compute in float so that they are unpacked once, in place.

    Those of matrices stay behind their DequantizeLinear, for MatMulNBits, but where the plan
    wants them unpacked, or the input comes from codes: with both operands dequantised the layer
    would run in integer.
    """
    if plan.target.runtime != "onnxruntime":
        return
    nodes = {node.name: node for node in model.graph}
    for layer in plan.layers:
        node = nodes[layer.node]
        if layer.x not in plan.activations and (
            plan.unpacked or layer.op_type in _UNPACKED or _reads_codes(node)
        ):
            _fold(model.graph, node)


def _reads_codes(node: ir.Node) -> bool:
    """Whether an Identity alone stands between the layer and a DequantizeLinear."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type == "Identity":
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _fold(graph: ir.Graph, layer: ir.Node) -> None:
    """Put ``Mul(Cast(codes), scale)`` in place of the DequantizeLinear of the weight."""
    weight = layer.inputs[1]
    unpack = None if weight is None else weight.producer()
    if weight is None or unpack is None or "block_size" in unpack.attributes:
        return
    codes, scale, point = unpack.inputs[:3]
    if codes is None or scale is None or point is None or scale.const_value is None:
        return
    values = scale.const_value.numpy()
    if values.ndim:
        shape = [1] * len(weight.shape or ())
        shape[unpack.attributes.get_int("axis", 1)] = -1
        values = values.reshape(shape)
    scale.const_value = ir.tensor(values, name=scale.name)
    scale.shape = ir.Shape(values.shape)
    to_float = {"to": int(ir.DataType.FLOAT)}
    cast = ir.node("Cast", [codes], to_float, name=f"{layer.name}/weight/cast")
    product = ir.node("Mul", [cast.outputs[0], scale], name=unpack.name)
    cast.outputs[0].name = f"{codes.name}/float"
    for value in (cast.outputs[0], product.outputs[0]):
        value.shape, value.type = weight.shape, weight.type
    graph.insert_before(unpack, [cast, product])
    name = weight.name
    weight.replace_all_uses_with(product.outputs[0])
    graph.remove(unpack, safe=True)
    product.outputs[0].name = name
    if not point.uses():
        del graph.initializers[point.name or ""]
