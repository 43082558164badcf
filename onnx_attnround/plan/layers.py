"""The layers: nodes with weights to quantise, and of the others the reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ModelError
from onnx_attnround.graph import attributes_of, is_standard
from onnx_attnround.ops import WEIGHTED_OPS, count_macs
from onnx_attnround.plan.logarithms import before_logarithms
from onnx_attnround.plan.patterns import NodeChoice
from onnx_attnround.records import LayerPlan, QuantSpec
from onnx_attnround.targets import Target


def find_layers(
    model: ir.Model, config: QuantConfig, target: Target
) -> tuple[list[LayerPlan], dict[str, str]]:
    """The layers, and for the other nodes with weights, by name, the reason why not."""
    layers, skipped = [], {}
    main, choice = set(model.graph), NodeChoice.of(model, config)
    varying, logged = _varying(model), before_logarithms(model)
    for node in model.graph.all_nodes():
        if node.op_type not in WEIGHTED_OPS or not is_standard(node):
            if why := _unhandled(node):
                skipped[name_of(node)] = why
            continue
        reason = "inside a subgraph" if node not in main else _refusal(node, choice)
        if reason is None and node.inputs[0] not in varying:
            reason = "its input depends on no input of the model"
        if reason is None and node in logged and not choice.included:
            reason = "a logarithm reads what it computes, where small errors of small values count"
        if reason is None:
            layers.append(_layer(node, config, target))
        else:
            skipped[name_of(node)] = reason
    return layers, skipped


def is_weighted(node: ir.Node) -> bool:
    """Whether ``exclude`` keeps the weights of this node, and not its activations, in float."""
    weight = node.inputs[1] if node.op_type in WEIGHTED_OPS and is_standard(node) else None
    return weight is not None and weight.const_value is not None


def _varying(model: ir.Model) -> set[ir.Value | None]:
    """The values that depend on an input of the model."""
    varying: set[ir.Value | None] = set(model.graph.inputs)
    for node in model.graph:
        if not varying.isdisjoint(node.inputs):
            varying.update(node.outputs)
    return varying


_NO_WEIGHT = "no constant weight"
_QUANTISED = "already quantised"
_LISTED_OPS = frozenset({"LSTM", "GRU", "RNN", "Einsum", "DeformConv"})
_INTEGER_OPS = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
     "MatMulNBits", "QGemm", "QAttention", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
)  # fmt: skip


def _unhandled(node: ir.Node) -> str | None:
    """The reason why a node that is none of the weighted ops keeps its weights, if it has any."""
    if node.op_type in _INTEGER_OPS:
        return _QUANTISED
    if is_standard(node) and node.op_type not in _LISTED_OPS:
        return None
    constants = (v.const_value for v in node.inputs if v is not None and v.const_value is not None)
    if any(c.dtype.is_floating_point() and len(c.shape) > 1 for c in constants):
        op = node.op_type if is_standard(node) else f"{node.domain}.{node.op_type}"
        return f"{op} is not handled: its weights stay float"
    return None


def _refusal(node: ir.Node, choice: NodeChoice) -> str | None:
    """The reason why this weighted node is left in float, or ``None``."""
    weight = node.inputs[1]
    if (reason := choice.refusal(name_of(node))) is not None:
        return reason
    tensor = None if weight is None else weight.const_value
    if weight is None or tensor is None:
        return _weightless(node)
    if tensor.dtype != ir.DataType.FLOAT:
        return f"weight '{weight.name}' is {tensor.dtype.name}: FLOAT is handled"
    if node.inputs[0] is None or node.inputs[0].const_value is not None:
        return "its input is a constant"
    attributes = attributes_of(node)
    op = WEIGHTED_OPS[node.op_type]
    shape = _static(tensor)
    reason = op.rank_error(attributes, shape)
    if reason is None:
        reason = _bias_refusal(node) or _factor_refusal(attributes)
    if reason is None and not np.isfinite(tensor.numpy()).all():
        reason = f"weight '{weight.name}' holds NaN or Inf"
    return reason


def _weightless(node: ir.Node) -> str:
    """The reason that a weighted node is skipped for whose right operand is no constant."""
    left, right = node.inputs[:2]
    producer = None if right is None else right.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _QUANTISED
    constant_left = left is not None and left.const_value is not None
    return "the constant operand is the left one" if constant_left else _NO_WEIGHT


def _factor_refusal(attributes: Mapping[str, Any]) -> str | None:
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        return "alpha or beta is not 1 and could not be folded"
    return None


def _bias_refusal(node: ir.Node) -> str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    if bias.const_value is None:
        return "its bias is not a constant"
    shape = tuple(bias.const_value.shape)
    if not all(d == 1 for d in shape[:-1]):
        return f"its bias of shape {shape} is not a row"
    finite = np.isfinite(bias.const_value.numpy()).all()
    return None if finite else f"bias '{bias.name}' holds NaN or Inf"


def _static(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(d for d in tensor.shape if isinstance(d, int))


def name_of(node: ir.Node) -> str:
    """The name of the node, or what stands for it where it has none."""
    return node.name or f"<unnamed {node.op_type}>"


def _bias(node: ir.Node) -> str | None:
    """The name of a constant bias with one entry per channel."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return None if value is None else value.name


def _layer(node: ir.Node, config: QuantConfig, target: Target) -> LayerPlan:
    x, weight = node.inputs[0], node.inputs[1]
    y = node.outputs[0]
    if x is None or weight is None or weight.const_value is None:
        raise ModelError(f"node '{name_of(node)}': its input or weight is missing")
    attributes = attributes_of(node)
    op = WEIGHTED_OPS[node.op_type]
    per_tensor = node.op_type in target.per_tensor
    axis = None if per_tensor else op.channel_axis(attributes)
    shape = _static(weight.const_value)
    input_shape, output_shape = _shape(x), _shape(y)
    return LayerPlan(
        node=name_of(node),
        op_type=node.op_type,
        x=x.name or "",
        y=y.name or "",
        weight=weight.name or "",
        bias=_bias(node),
        weight_shape=shape,
        weight_spec=QuantSpec(bits=config.weight_bits, signed=True, symmetric=True, axis=axis),
        attributes=attributes,
        input_shape=input_shape,
        macs=count_macs(node.op_type, attributes, shape, input_shape, output_shape),
    )


def _shape(value: ir.Value) -> tuple[int | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def mark_ends(
    model: ir.Model, layers: list[LayerPlan], skipped: Mapping[str, str]
) -> list[LayerPlan]:
    """Set ``first_or_last`` where no weighted layer lies before, or none behind.

    Layers that stay in float count: the second is not the first because that is excluded.
    """
    weighted = {layer.node for layer in layers}
    weighted |= {n for n, reason in skipped.items() if reason != _NO_WEIGHT}
    seen_by_input: set[str] = set()  # values computed by layers or from them
    for node in model.graph:
        touched = any(v is not None and v.name in seen_by_input for v in node.inputs)
        if touched or node.name in weighted:
            seen_by_input.update(v.name or "" for v in node.outputs)
    leads_on: set[str] = set()  # values that a layer reads, at once or further on
    for node in reversed(list(model.graph)):
        leads = any(v.name in leads_on for v in node.outputs)
        if leads or node.name in weighted:
            leads_on.update(v.name or "" for v in node.inputs if v is not None)
    return [
        replace(layer, first_or_last=layer.x not in seen_by_input or layer.y not in leads_on)
        for layer in layers
    ]
