"""The opset of a model, raised where that is needed, and the IR version that it demands."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import version_converter

from onnx_attnround.errors import ModelError
from onnx_attnround.graph.editing import (
    copy_signature,
    is_standard,
    name_nodes,
    reason,
    through_proto,
)

_RESIZE_COORDINATES = 11
"""The opset that gave Resize its coordinate modes."""


def raise_opset(model: ir.Model, version: int) -> ir.Model:
    """The model at opset ``version`` of the default domain, or itself if it is there already.

    Where no operator in use changed its inputs, outputs or attributes, only the
    version number changes; else onnx.version_converter rewrites the graph. The
    IR version is raised to what the opset demands, not further.

    Raises:
        ModelError: the converter fails, or does not keep inputs and outputs, or
            the model has functions (``simplify`` inlines them).
    """
    current = model.opset_imports.get("", 0)
    if current >= version:
        return model
    if version > onnx.defs.onnx_opset_version():
        raise ModelError(f"opset {version} is unknown to onnx {onnx.__version__}; upgrade onnx")
    if model.functions:
        raise ModelError(
            f"cannot raise the opset of a model with functions, got {len(model.functions)}; "
            "simplify it first"
        )
    if all(_same_interface(node, current, version) for node in model.graph.all_nodes()):
        result = model.clone()
        result.opset_imports[""] = version
    else:
        result = _convert_opset(model, current, version)
    result.ir_version = max(result.ir_version, least_ir_version(result))
    return result


def least_ir_version(model: ir.Model) -> int:
    """The oldest IR version that has what the model uses: its opsets, and functions if any.

    At least 4, before which every initializer was an input of the graph too.
    """
    opsets = [onnx.helper.make_opsetid(*opset) for opset in model.opset_imports.items()]
    demanded = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    return max(demanded, 8 if model.functions else 4)


def _same_interface(node: ir.Node, old: int, new: int) -> bool:
    """Whether the node's operator differs between two opsets in type constraints at most."""
    if not is_standard(node):
        return True
    try:
        before = onnx.defs.get_schema(node.op_type, old)
        after = onnx.defs.get_schema(node.op_type, new)
    except onnx.defs.SchemaError:
        return False
    return before.since_version == after.since_version or (
        _interface(before) == _interface(after) and not after.deprecated
    )


def _interface(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    return (
        [(formal.name, formal.option) for formal in schema.inputs],
        [(formal.name, formal.option) for formal in schema.outputs],
        {
            name: (attribute.type, attribute.required, attribute.default_value)
            for name, attribute in schema.attributes.items()
        },
    )


def _convert_opset(model: ir.Model, old: int, new: int) -> ir.Model:
    def convert(proto: onnx.ModelProto) -> onnx.ModelProto:
        converted = version_converter.convert_version(proto, new)
        onnx.checker.check_model(converted)
        return converted

    failures = (RuntimeError, version_converter.ConvertError, onnx.checker.ValidationError)
    try:
        result = through_proto(model, convert)
        copy_signature(model, result)
    except (*failures, ModelError) as error:
        raise ModelError(
            f"cannot raise the model from opset {old} to {new}: {reason(error)}; "
            f"export it with opset {new} or later"
        ) from error
    _keep_names(model, result)
    if old < _RESIZE_COORDINATES:
        _keep_resize_coordinates(result)
    name_nodes(result)
    return result


def _keep_names(old: ir.Model, new: ir.Model) -> None:
    """Give values that the converter renamed their names back, by the nodes that read them."""
    readers = {node.name: node for node in new.graph}
    known = ir.convenience.create_value_mapping(old.graph)
    kept = set(ir.convenience.create_value_mapping(new.graph))
    for node in old.graph:
        twin = readers.get(node.name)
        if twin is None or len(twin.inputs) != len(node.inputs):
            continue
        for before, after in zip(node.inputs, twin.inputs, strict=True):
            if before is None or after is None or before.name in kept or after.name in known:
                continue
            after.name = before.name
            kept.add(before.name or "")


def _keep_resize_coordinates(model: ir.Model) -> None:
    """Set what Resize and Upsample did before opset 11; the converter leaves the new default."""
    for node in model.graph.all_nodes():
        if node.op_type == "Resize" and is_standard(node):
            node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
            node.attributes.add(ir.AttrString("nearest_mode", "floor"))
