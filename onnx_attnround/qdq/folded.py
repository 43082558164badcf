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
    node = None if weight is None else weight.producer()
    if weight is None or node is None or "block_size" in node.attributes:
        return
    codes, scale, point = node.inputs[:3]
    if codes is None or scale is None or point is None or scale.const_value is None:
        return
    values = scale.const_value.numpy()
    if values.ndim:
        shape = [1] * len(weight.shape or ())
        shape[node.attributes.get_int("axis", 1)] = -1
        values = values.reshape(shape)
    scale.const_value = ir.tensor(values, name=scale.name)
    scale.shape = ir.Shape(values.shape)
    name = weight.name
    names = f"{layer.name}/weight/cast", node.name
    unpacked = unpack(weight, codes, scale, before=node, names=names)
    graph.remove(node, safe=True)
    unpacked.name = name
    if not point.uses():
        del graph.initializers[point.name or ""]


def unpack(
    weight: ir.Value,
    codes: ir.Value,
    scale: ir.Value,
    *,
    before: ir.Node,
    names: tuple[str | None, str | None],
) -> ir.Value:
    """Let the readers of ``weight`` read ``Mul(Cast(codes), scale)``, which is returned.

    The two nodes, of these ``names``, come ``before`` another. The name of ``weight`` is
    for the caller to give, once nothing else has it.
    """
    cast = ir.node("Cast", [codes], {"to": int(ir.DataType.FLOAT)}, name=names[0])
    product = ir.node("Mul", [cast.outputs[0], scale], name=names[1])
    cast.outputs[0].name, made = f"{codes.name}/float", product.outputs[0]
    for value in (cast.outputs[0], made):
        value.shape, value.type = weight.shape, weight.type or ir.TensorType(ir.DataType.FLOAT)
    if before.graph is not None:
        before.graph.insert_before(before, [cast, product])
    weight.replace_all_uses_with(made)
    return made
