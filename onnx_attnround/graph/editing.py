"""Small reads and edits that every stage needs; the model given stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import count
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_attnround.errors import ModelError
from onnx_attnround.graph.constants import SMALL, constants, held
from onnx_attnround.records import Array, InputSpec

Noted = ir.Model | ir.Graph | ir.Node | ir.Value


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The inputs that must be fed to the model; those with a default value are left out.

    Raises:
        ModelError: an input is no tensor, is of a type that NumPy does not have, or its
            number of dimensions is unknown.
    """
    return tuple(
        _input_spec(value)
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    )


def tensor_value(model: ir.Model, name: str) -> Array:
    """The constant ``name`` of the main graph; raises ``ModelError`` if there is none."""
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise ModelError(f"tensor '{name}' is not a constant of the model; give an initializer")
    return value.const_value.numpy()


def is_standard(node: ir.Node | onnx.NodeProto) -> bool:
    """Whether the operator is one of ONNX itself."""
    return node.domain in ("", "ai.onnx")


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node as plain Python values."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy whose outputs are exactly the values ``names``, without what they do not need.

    Raises:
        ModelError: the main graph has no value of that name.
    """
    result = model.clone()
    values = ir.convenience.create_value_mapping(result.graph, include_subgraphs=False)
    if unknown := [name for name in names if name not in values]:
        raise ModelError(f"the model has no tensor '{unknown[0]}'; check the name")
    result.graph.outputs.clear()
    result.graph.outputs.extend(values[name] for name in names)
    common.RemoveUnusedNodesPass()(result)
    return result


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own, in place: plans and reports key nodes by name."""
    nodes = list(model.graph.all_nodes())
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    counters: dict[str, Iterator[int]] = {}
    for node in nodes:
        if not node.name or node.name in seen:
            stem = node.name or node.op_type
            numbers = counters.setdefault(stem, count())
            node.name = next(
                name for number in numbers if (name := f"{stem}_{number}") not in taken
            )
        seen.add(node.name)


def in_memory(model: ir.Model) -> ir.Model:
    """A copy that refers to no external data file when it is serialised."""
    result = model.clone()
    for value, tensor in constants(result):
        value.const_value = held(tensor)
    return result


def through_proto(
    model: ir.Model,
    convert: Callable[[onnx.ModelProto], onnx.ModelProto],
    withhold: Collection[str] | None = None,
) -> ir.Model:
    """The model that ``convert`` makes of a copy; large constants are withheld from it.

    ``convert`` sees them as graph inputs of the same name. They are put back
    into its result, so that models of any size pass. ``withhold`` names them, by
    default all that are not ``SMALL``. What exporters noted on nodes, values and graph
    is kept, which the converters of onnx lose.
    """
    light = model.clone()
    inputs = {value.name for value in light.graph.inputs}
    withheld: dict[str, ir.TensorProtocol] = {}
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not (tensor.nbytes > SMALL if withhold is None else name in withhold):
            continue
        withheld[name] = tensor
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        value.const_value = None
        light.graph.initializers.pop(name)
        if name not in inputs:
            light.graph.inputs.append(value)
    for value, tensor in constants(light):
        value.const_value = held(tensor)
    graph = (result := ir.from_proto(convert(ir.to_proto(light)))).graph
    for value in graph.inputs:
        if value.name in withheld:
            value.const_value = withheld[value.name]
            graph.register_initializer(value)
    kept = [value for value in graph.inputs if value.name in inputs]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    _copy_notes(model, result)
    return result


def _copy_notes(source: ir.Model, target: ir.Model) -> None:
    """Give ``target`` the texts and metadata of ``source`` that it lacks, by names."""
    pairs: list[tuple[Noted | None, Noted]] = [(source, target), (source.graph, target.graph)]
    known = {(type(each), each.name): each for each in _noted(source)}
    known |= {(ir.Node, node.outputs[0].name): node for node in source.graph if not node.name}
    for each in _noted(target):
        found = known.get((type(each), each.name))
        if found is None and isinstance(each, ir.Node):
            found = known.get((ir.Node, each.outputs[0].name))
        pairs.append((found, each))
    for old, new in pairs:
        if old is not None:
            new.doc_string = new.doc_string or old.doc_string
            new.metadata_props.update({**old.metadata_props, **new.metadata_props})


def _noted(model: ir.Model) -> Iterator[ir.Node | ir.Value]:
    """The nodes of a model, and the values of its main graph."""
    yield from model.graph.all_nodes()
    yield from ir.convenience.create_value_mapping(model.graph, include_subgraphs=False).values()


def copy_signature(source: ir.Model, target: ir.Model) -> None:
    """Give the inputs and outputs of ``target`` the types and dimensions of ``source``.

    Raises:
        ModelError: they do not have the same names in the same order.
    """
    for kind in ("inputs", "outputs"):
        wanted, found = getattr(source.graph, kind), getattr(target.graph, kind)
        if [value.name for value in wanted] != [value.name for value in found]:
            raise ModelError(
                f"the rewritten model has {kind} {[value.name for value in found]}, "
                f"expected {[value.name for value in wanted]}"
            )
        for old, new in zip(wanted, found, strict=True):
            new.type = old.type or new.type
            new.shape = new.shape if old.shape is None else old.shape.copy()


def forget_shapes(model: ir.Model, source: ir.Model) -> None:
    """Take from the values inside ``model`` the types and shapes that ``source`` does not state.

    In place. Whoever reads the file infers them again, as for ``source``; they would make up a
    tenth of a small one. Inputs and outputs keep theirs.
    """
    stated = {value.name for node in source.graph for value in node.outputs if value.type}
    for node in model.graph:
        for value in node.outputs:
            if value.name not in stated and not value.is_graph_output():
                value.type = value.shape = None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``, ``None`` if it is an output or has other readers."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def is_read_once(value: ir.Value) -> bool:
    """Whether one input of one node reads ``value``, and it is no output."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def reason(error: BaseException) -> str:
    """The last cause in a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _input_spec(value: ir.Value) -> InputSpec:
    kind = value.type.dtype if isinstance(value.type, ir.TensorType) else ir.DataType.UNDEFINED
    if kind == ir.DataType.UNDEFINED or value.shape is None:
        raise ModelError(
            f"input '{value.name}' has type {value.type} and shape {value.shape}, expected a "
            "tensor with a known number of dimensions; export the model with input types and shapes"
        )
    # Some exporters write -1 or 0 for a dynamic dimension.
    shape = tuple(dim if isinstance(dim, int) and dim > 0 else None for dim in value.shape)
    dtype = kind.numpy()
    if dtype.kind == "V":  # a type that NumPy itself does not have
        raise ModelError(
            f"input '{value.name}' is {kind.name}, which ONNX Runtime takes from no "
            "array; export the model with FLOAT or INT8 inputs"
        )
    return InputSpec(name=str(value.name), dtype=dtype, shape=shape)
