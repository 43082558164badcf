"""The smoothed model: tensors divided by their scales, and weights multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph import is_read_once
from onnx_attnround.records import Array, LayerPlan, QuantPlan, Smoothing
from onnx_attnround.smooth.groups import Group, edits_of, find_groups


def smoothed(
    model: ir.Model, plan: QuantPlan, found: Mapping[str, Smoothing]
) -> tuple[ir.Model, dict[str, str]]:
    """A copy that computes the same, and the observer of each tensor of ``found`` in it."""
    result = model.clone()
    observers = {}
    for group in find_groups(result, plan):
        smoothing, name = found.get(group.name), group.name
        if smoothing is None:
            continue
        if smoothing.scale is not None:
            name = _smooth(result, group, smoothing.scale.astype(np.float64), plan)
        if name not in plan.same_range:
            observers[name] = smoothing.observer
    return result, observers


def _smooth(model: ir.Model, group: Group, scale: Array, plan: QuantPlan) -> str:
    """Scale one group in place; the name of the tensor that its layers read then."""
    nodes = {node.name: node for node in group.value.consumers()}
    if group.folds:
        for edit in edits_of(group, scale, plan):
            _multiply(edit.node, edit.index, edit.factor)
    else:
        _insert(model.graph, group, scale)
    for layer in group.layers:
        _multiply(nodes[layer.node], 1, _by_input(layer, scale))
    return nodes[group.layers[0].node].inputs[0].name or ""  # type: ignore[union-attr]


def _by_input(layer: LayerPlan, scale: Array) -> Array:
    """The scale in a shape that multiplies the weight of ``layer`` by its input channels."""
    shape = layer.weight_shape
    if layer.op_type == "Conv":
        groups = int(layer.attributes.get("group", 1))
        rows = scale.reshape(groups, -1).repeat(shape[0] // groups, 0)
        return rows.reshape(shape[0], -1, *(1 for _ in shape[2:]))
    if layer.op_type == "Gemm" and layer.attributes.get("transB", 0):
        return scale[None]
    return scale.reshape(-1, *(1 for _ in shape[1:]))


def _multiply(node: ir.Node, index: int, factor: Array) -> None:
    """Multiply a constant that ``node`` reads; one that others read too is copied.

    A large one that lies in a file stays there, and is multiplied whenever it is read.
    """
    old = node.inputs[index]
    if node.graph is None or old is None or old.const_value is None:
        raise ValueError(f"input {index} of node '{node.name}' is no constant")
    tensor = old.const_value
    shape = np.broadcast_shapes(tuple(tensor.shape.numpy()), factor.shape)
    product = partial(_product, tensor, factor)
    lies_elsewhere = isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
    made: ir.TensorProtocol = (
        ir.LazyTensor(product, tensor.dtype, ir.Shape(shape), name=old.name)
        if lies_elsewhere
        else product()
    )
    if is_read_once(old):
        old.const_value, old.shape = made, ir.Shape(shape)
        made.name = old.name
    else:
        node.replace_input_with(index, _new_constant(node.graph, f"{old.name}/smoothed", made))


def _product(tensor: ir.TensorProtocol, factor: Array) -> ir.Tensor[Array]:
    values = tensor.numpy()
    return ir.Tensor((values.astype(np.float64) * factor).astype(values.dtype))


def _new_constant(
    graph: ir.Graph | ir.Function | ir.GraphView, name: str, tensor: ir.TensorProtocol
) -> ir.Value:
    if not isinstance(graph, ir.Graph):
        raise ValueError(f"no graph to add constant '{name}' to")
    taken = ir.convenience.create_value_mapping(graph)
    while name in taken:
        name += "_"
    tensor.name = name
    value = ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(graph: ir.Graph, group: Group, scale: Array) -> None:
    """A Mul between the tensor and the layers of the group; an Identity there becomes one."""
    value, names = group.value, {layer.node for layer in group.layers}
    factor = ir.Tensor((1.0 / scale).astype(np.float32))
    constant = _new_constant(graph, f"{group.name}/smoothing", factor)
    producer = value.producer()
    alone = {reader.name for reader in value.consumers()} == names and not value.is_graph_output()
    if producer is not None and producer.op_type == "Identity" and alone:
        producer.op_type = "Mul"
        producer.resize_inputs(2)
        producer.replace_input_with(1, constant)
        return
    node = ir.node("Mul", [value, constant], name=f"{group.name}/smooth")
    scaled = node.outputs[0]
    scaled.name, scaled.shape, scaled.type = f"{group.name}/smooth", value.shape, value.type
    readers = [use for use in value.uses() if use.node.name in names and use.idx == 0]
    for use in readers:
        use.node.replace_input_with(0, scaled)
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
