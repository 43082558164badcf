"""Passes that only move or remove: no number in the model changes."""

from __future__ import annotations

from copy import copy
from functools import partial

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_attnround.errors import ModelError
from onnx_attnround.graph import is_standard, reason, through_proto


def inline_functions(model: ir.Model) -> int:
    """Nodes that call a function of the model become the nodes of that function.

    Raises:
        ModelError: a function is recursive, or wants another opset than the model.
    """
    if not model.functions:
        return 0
    calls = sum(node.op_identifier() in model.functions for node in model.graph.all_nodes())
    try:
        common.InlinePass()(model)
    except (ValueError, ir.passes.PassError) as error:
        raise ModelError(
            f"cannot inline the functions of the model: {reason(error)}; export it without "
            "functions"
        ) from error
    drop_unused(model)  # the inliner gives a name to outputs that nobody asked for
    return calls


def freeze_inputs(model: ir.Model) -> int:
    """Inputs with a default value (before IR version 4, all weights) become constants."""
    before = len(model.graph.inputs)
    common.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version, 4)  # before, every initializer was an input
    return before - len(model.graph.inputs)


def drop_stale_shapes(model: ir.Model) -> int:
    """Types and shapes of computed values go, if they contradict the inputs'.

    So they do where somebody changed inputs by hand. What only the model itself can know,
    the outputs of operators that onnx does not have, stays.
    """
    infer = partial(onnx.shape_inference.infer_shapes, strict_mode=True, data_prop=True)
    try:
        through_proto(model, infer)
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError):
        nodes = [node for node in model.graph.all_nodes() if is_standard(node)]
    else:
        return 0
    for value in (value for node in nodes for value in node.outputs):
        if not value.is_graph_output():
            value.type = value.shape = None
    return len(nodes)


def lift_constants(model: ir.Model) -> int:
    """Constant nodes become initializers of the same name, unless they are an output."""
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and "value" in node.attributes:
            # The pass gives the tensor a name, and copies of the model share their tensors.
            tensor = _copy(node.attributes["value"].as_tensor())
            node.attributes["value"] = ir.AttrTensor("value", tensor)
    return _removed(
        model, common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    )


def drop_identities(model: ir.Model) -> int:
    """Let readers of ``y = Identity(x)`` read ``x``, unless ``y`` is the output of a graph.

    (The pass of onnx-ir also takes away identities that make a value of the
    outer graph the output of a branch, which leaves an invalid model.)
    """
    dropped = 0
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Identity" or not is_standard(node) or node.graph is None:
            continue
        x, y = node.inputs[0], node.outputs[0]
        if x is None or y.is_graph_output():
            continue
        if x.type is None:
            x.type, x.shape = y.type, y.shape
        y.replace_all_uses_with(x)
        node.graph.remove(node, safe=True)
        dropped += 1
    return dropped


def drop_defaults(model: ir.Model) -> int:
    """Dilations of 1 go from an AveragePool: ONNX Runtime's integer kernel knows no dilations."""
    dropped = 0
    for node in model.graph.all_nodes():
        if node.op_type == "AveragePool" and is_standard(node):
            dilations = node.attributes.get_ints("dilations", ())
            if dilations and all(step == 1 for step in dilations):
                node.attributes.pop("dilations")
                dropped += 1
    return dropped


def drop_unused(model: ir.Model) -> int:
    """Nodes and initializers that no output needs are removed."""
    return _removed(model, common.RemoveUnusedNodesPass())


def sort_nodes(model: ir.Model) -> int:
    """Every node comes after those whose outputs it reads."""
    return _removed(model, common.TopologicalSortPass())


def _removed(model: ir.Model, edit: ir.passes.InPlacePass) -> int:
    before = sum(1 for _ in model.graph.all_nodes())
    edit(model)
    return before - sum(1 for _ in model.graph.all_nodes())


def _copy(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.STRING:
        return copy(tensor)
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
