"""Half precision made single: what was float16 or bfloat16 is computed in float32."""

from __future__ import annotations

from functools import partial
from itertools import count

import numpy as np
import onnx_ir as ir

from onnx_attnround.records import Array

_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_DTYPES = ("to", "dtype", "output_dtype", "precision", "softmax_precision")
"""The attributes that name a type of elements."""
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


def widen_half(model: ir.Model) -> int:
    """Tensors of 16-bit floats become float32; Casts keep the types of the model's ends.

    The integer kernels of ONNX Runtime want float32 beside them; its CPU kernels for float16
    are few, and next to none for bfloat16. A model with operators that may know no float32
    (of other domains, or those that read bits) is left as it is, and so is one whose ends are
    sequences of 16-bit floats. Returns the number of nodes that computed in half precision.
    """
    inside = list(model.graph.all_nodes())
    touched = [node for node in inside if _is_half_node(node)]
    ends = [*model.graph.inputs, *model.graph.outputs]
    if not touched or not all(_is_portable(node) for node in inside):
        return 0
    if any(not isinstance(end.type, ir.TensorType) and _is_half(end.type) for end in ends):
        return 0
    _cast_ends(model.graph)
    for each in model.graphs():
        given = [] if each is model.graph else list(each.inputs)
        for value in (*given, *each.initializers.values()):
            _widen(value)
    for node in inside:
        _widen_node(node)
    return len(touched)


def _is_half(kind: ir.TypeProtocol | None) -> bool:
    return kind is not None and kind.dtype in _HALF


def _is_half_node(node: ir.Node) -> bool:
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    read = any(_is_half(value.type) or _constant_type(value) in _HALF for value in values)
    return read or any(_names_half(attribute) for attribute in node.attributes.values())


def _constant_type(value: ir.Value) -> ir.DataType | None:
    return None if value.const_value is None else value.const_value.dtype


def _names_half(attribute: ir.Attr) -> bool:
    """Whether an attribute is a tensor of 16-bit floats or names their type."""
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().dtype in _HALF
    return attribute.name in _DTYPES and attribute.value in _HALF


def _is_portable(node: ir.Node) -> bool:
    return node.domain in _KNOWN_DOMAINS and node.op_type != "BitCast"


def _cast_ends(main: ir.Graph) -> None:
    """Casts behind the inputs and before the outputs of 16-bit floats."""
    for value in main.inputs:
        if _is_half(value.type):
            inner = _cast(main, value, ir.DataType.FLOAT, first=True)
            inner.name = _fresh(main, value)
            handed_on = [i for i, output in enumerate(main.outputs) if output is value]
            ir.convenience.replace_all_uses_with(value, inner, replace_graph_outputs=True)
            _made(inner).replace_input_with(0, value)
            for index in handed_on:
                main.outputs[index] = value
    for index, value in enumerate(main.outputs):
        if value.dtype is not None and _is_half(value.type) and not value.is_graph_input():
            outer = _cast(main, value, value.dtype, first=False)
            value.name, outer.name = _fresh(main, value), value.name
            main.outputs[index] = outer


def _cast(main: ir.Graph, value: ir.Value, dtype: ir.DataType, *, first: bool) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}/cast")
    result = node.outputs[0]
    result.type, result.shape = ir.TensorType(dtype), value.shape
    if first:
        main.insert_before(main[0], node)
    else:
        main.append(node)
    return result


def _made(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise ValueError(f"'{value.name}' is made by no node")
    return node


def _fresh(main: ir.Graph, value: ir.Value) -> str:
    taken = ir.convenience.create_value_mapping(main)
    return next(name for i in count() if (name := f"{value.name}_float_{i}") not in taken)


def _widen(value: ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype in _HALF:
        value.const_value = _widened(value.const_value)
    if value.type is not None and _is_half(value.type):
        value.type = _widened_type(value.type)


def _widened_type(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_widened_type(kind.elem_type))
    return ir.TensorType(ir.DataType.FLOAT)


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The tensor in float32, made when it is asked for: it is twice as large."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(partial(_single, tensor), ir.DataType.FLOAT, shape, name=tensor.name)


def _single(tensor: ir.TensorProtocol) -> ir.Tensor[Array]:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_node(node: ir.Node) -> None:
    for value in node.outputs:
        _widen(value)
    for attribute in list(node.attributes.values()):
        if not _names_half(attribute):
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            node.attributes.add(ir.AttrTensor(attribute.name, _single(attribute.as_tensor())))
        else:
            node.attributes.add(ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT)))
