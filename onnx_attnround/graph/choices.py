"""Choices and draws: where two copies of a model may go different ways on the same samples.

A TopK, a NonMaxSuppression, a comparison or a cast to integers turns numbers into rows, branches
or masks, and a node such as RandomNormalLike makes numbers up. Of a float model and its
quantised copy each would choose other rows and draw other numbers, so that behind such a node
the values of the one no longer belong to the values of the other. ``take_choices`` has a copy
read them as inputs, which the float model then provides to both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
import onnx_ir as ir

_DRAWS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike"}
)  # fmt: skip
_CODES = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
"""Operators whose integers stand for the numbers that they are made of, and choose nothing."""

_SHAPES = frozenset({"Shape", "Size"})
"""Operators that look at no number, so that both copies give the same."""


_GATHERS = 11
"""The opset that gave ONNX GatherElements."""


def reads_of(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads; values that its subgraphs capture may come with some of their own."""
    yield from (value for value in node.inputs if value is not None)
    for child in _inner(node):
        yield from (value for value in child.inputs if value is not None)


def draws(node: ir.Node) -> bool:
    """Whether a node, or one in its subgraphs, makes other numbers up each time that it runs."""
    return any(_draws(each) for each in (node, *_inner(node)))


def choices(graph: ir.Graph, changed: Collection[str]) -> tuple[str, ...]:
    """The names of the nodes that draw, or that choose by what the nodes ``changed`` have made.

    ``graph`` must be sorted. Nodes in ``changed`` themselves are none of them.
    """
    found: list[str] = []
    touched: set[ir.Value] = set()
    for node in graph:
        name = node.name or ""
        reads = touched.intersection(reads_of(node))
        if name not in changed and (draws(node) or _chooses(node, reads)):
            found.append(name)
            touched.update(value for value in node.outputs if not _is_taken(node, value))
        elif name in changed or (reads and node.op_type not in _SHAPES):
            touched.update(node.outputs)
    return tuple(found)


def parted_choices(model: ir.Model, copy: ir.Model) -> tuple[str, ...]:
    """The nodes of both that may choose or draw otherwise in ``copy``, for what that has changed.

    Nodes of ``copy`` whose name ``model`` does not know count as changes.
    """
    known = {node.name for node in model.graph}
    return choices(copy.graph, {node.name or "" for node in copy.graph} - known)


def take_choices(copy: ir.Model, model: ir.Model, names: Collection[str]) -> dict[str, str]:
    """Make what the nodes ``names`` of ``copy`` have chosen or drawn inputs of it, in place.

    Returns for each new input the value of ``model`` that it stands for: an output of the node of
    the same name. The values of a TopK are then those of ``copy`` in the rows that ``model``
    chooses. What a node with subgraphs makes is taken as it is where one in them chooses.
    """
    sources = {node.name or "": node.outputs for node in model.graph}
    taken: dict[str, str] = {}
    for node in [node for node in copy.graph if node.name in names]:
        for value, source in zip(node.outputs, sources[node.name or ""], strict=True):
            if _is_given(node, value):
                taken[value.name or ""] = source.name or ""
        _replace(copy, node)
    return taken


def _inner(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of the subgraphs, and of theirs."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def _draws(node: ir.Node) -> bool:
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = node.inputs[2].const_value
        return training is None or bool(training.numpy())
    return node.op_type in _DRAWS


def _chooses(node: ir.Node, reads: Collection[ir.Value]) -> bool:
    """Whether a node turns some of the numbers ``reads`` into integers, truth values or text."""
    if any(_decides(inner, inner.inputs) for inner in _inner(node)):
        return bool(reads)
    return _decides(node, reads)


def _decides(node: ir.Node, reads: Collection[ir.Value | None]) -> bool:
    numbers = any(value is not None and _may_be_float(value) for value in reads)
    if not numbers or node.op_type in _CODES | _SHAPES:
        return False
    read = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    return node.op_type == "Range" or any(is_discrete(value) for value in read)


def _may_be_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _is_taken(node: ir.Node, value: ir.Value) -> bool:
    """Whether an output of a node that chooses is taken from the other model.

    Numbers beside integers are not, as the values of a TopK or a MaxPool; unless their number
    depends on the choice, too, or they are drawn.
    """
    whole = node.op_type in ("Range", "Unique") or draws(node) or any(True for _ in _inner(node))
    return whole or is_discrete(value)


def _is_given(node: ir.Node, value: ir.Value) -> bool:
    return bool(value.name) and _is_taken(node, value)


def is_discrete(value: ir.Value) -> bool:
    """Whether a value is known to hold no numbers, but integers, truth values or text."""
    dtype = _dtype(value)
    return dtype is not None and not dtype.is_floating_point()


def _dtype(value: ir.Value) -> ir.DataType | None:
    """The type of the elements; also where only the operator tells it, and leaves no choice."""
    node = value.producer()
    if value.dtype is not None or node is None:
        return value.dtype
    version = node.version or (node.graph.opset_imports.get(node.domain) if node.graph else None)
    if version is None or not onnx.defs.has(node.op_type, node.domain):
        return None
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    kind = schema.outputs[min(value.index() or 0, len(schema.outputs) - 1)].type_str
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    kinds = allowed.get(kind, [kind])  # a parameter of types, or a type itself
    name = kinds[0].removeprefix("tensor(").removesuffix(")")
    known = {"int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}
    return known.get(name) if len(kinds) == 1 else None


def _replace(copy: ir.Model, node: ir.Node) -> None:
    """Inputs in place of what ``node`` has chosen; it goes where nothing else is left of it."""
    graph = copy.graph
    given = {value: _input_for(graph, value) for value in node.outputs if _is_given(node, value)}
    if node.op_type == "TopK" and copy.opset_imports.get("", 0) >= _GATHERS and len(given) == 1:
        _gather(graph, node, *given.values())
    elif len(given) == len([value for value in node.outputs if value.name]):
        graph.remove(node, safe=True)


def _input_for(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A new input of the name of ``value``, for all who read that."""
    dtype = _dtype(value)
    kind = value.type or (None if dtype is None else ir.TensorType(dtype))
    given = ir.Value(name=value.name, shape=value.shape, type=kind)
    value.replace_all_uses_with(given, replace_graph_outputs=True)
    value.name = f"{value.name}/own"
    graph.inputs.append(given)
    return given


def _gather(graph: ir.Graph, node: ir.Node, index: ir.Value) -> None:
    """The elements at ``index`` in place of the values that a TopK finds itself."""
    values, axis = node.outputs[0], node.attributes.get_int("axis", -1)
    gather = ir.node(
        "GatherElements", [node.inputs[0], index], {"axis": axis}, name=node.name or ""
    )
    found = gather.outputs[0]
    found.name, found.shape, found.type = values.name, values.shape, values.type
    graph.insert_before(node, gather)
    values.replace_all_uses_with(found, replace_graph_outputs=True)
    graph.remove(node, safe=True)
