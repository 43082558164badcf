"""What runtimes forgive and the checker of onnx does not: put right, or kept out of its sight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from itertools import count

import numpy as np
import onnx

from onnx_attnround.graph.editing import is_standard

Nodes = list[onnx.NodeProto]  # of a graph or a function; protobuf's own lists do as well

_GROUP_NORM = "GroupNormalization"
_GROUP_SCALES = range(18, 21)
"""Opsets whose GroupNormalization has a scale for each group, which onnx calls deprecated."""


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants: initializers and attributes, those of subgraphs and functions too."""
    graphs = [model.graph, *(g for nodes in _all_nodes(model) for g in _subgraphs(nodes))]
    for graph in graphs:
        yield from graph.initializer
    for nodes in _all_nodes(model):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the values lie in another file."""
    external: bool = tensor.data_location == onnx.TensorProto.EXTERNAL
    return external


def put_right(model: onnx.ModelProto) -> bool:
    """Rewrite, in place, what only the checker minds; whether there was anything.

    Nodes may stand before those whose outputs they read; a GroupNormalization may have a
    scale for each group, as it had before opset 21.
    """
    ordered = _put_in_order(model.graph)
    version = _opset(model.opset_import)
    edits = [_replace_group_norms(nodes, version) for nodes in _graph_nodes(model.graph)]
    for function in model.functions:
        edits.append(_replace_group_norms(function.node, _opset(function.opset_import)))
    return any([ordered, *edits])


@contextmanager
def presentable(model: onnx.ModelProto) -> Iterator[bool]:
    """While open, the model is without what the checker cannot know; whether anything is hidden.

    That are ends without a shape (which need one, ``input_specs`` says), and what lies in
    other files, which the checker reads through no link.
    """
    ends = (*model.graph.input, *model.graph.output)
    kinds = [end.type.tensor_type for end in ends if end.type.HasField("tensor_type")]
    shapeless = [kind for kind in kinds if not kind.HasField("shape")]
    external = [tensor for tensor in tensors(model) if is_external(tensor)]
    originals = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in external]
    for kind in shapeless:
        kind.shape.SetInParent()
    for tensor in external:
        for field in ("data_location", "external_data", "dims"):
            tensor.ClearField(field)
        tensor.dims.append(0)
    try:
        yield bool(shapeless or external)
    finally:
        for kind in shapeless:
            kind.ClearField("shape")
        for tensor, original in zip(external, originals, strict=True):
            tensor.CopyFrom(original)


def _all_nodes(model: onnx.ModelProto) -> Iterator[Nodes]:
    """The nodes of all graphs and functions, as the lists that hold them."""
    yield from _graph_nodes(model.graph)
    for function in model.functions:
        yield function.node
        for graph in _subgraphs(function.node):
            yield graph.node


def _graph_nodes(graph: onnx.GraphProto) -> Iterator[Nodes]:
    yield graph.node
    for inner in _subgraphs(graph.node):
        yield inner.node


def _subgraphs(nodes: Nodes) -> Iterator[onnx.GraphProto]:
    """The graphs in the attributes of nodes, and those in theirs."""
    for node in nodes:
        for attribute in node.attribute:
            own = [attribute.g] if attribute.HasField("g") else []
            for graph in (*own, *attribute.graphs):
                yield graph
                yield from _subgraphs(graph.node)


def _opset(imports: list[onnx.OperatorSetIdProto]) -> int:
    return max((each.version for each in imports if each.domain in ("", "ai.onnx")), default=0)


def _put_in_order(graph: onnx.GraphProto) -> bool:
    """Move nodes behind those whose outputs they read; whether that was needed and can be."""
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    read = {
        i: {maker[name] for name in _reads(node) if name in maker}
        for i, node in enumerate(graph.node)
    }
    if all(max(makers, default=-1) < i for i, makers in read.items()):
        return False
    try:
        order = list(TopologicalSorter(read).static_order())
    except CycleError:
        return False
    _replace_nodes(graph.node, [graph.node[i] for i in order])
    return True


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that the node and the nodes in its subgraphs read."""
    yield from node.input
    for graph in _subgraphs([node]):
        for inner in graph.node:
            yield from inner.input


def _replace_nodes(nodes: Nodes, new: Nodes) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in new]
    del nodes[:]
    nodes.extend(copies)


def _replace_group_norms(nodes: Nodes, opset: int) -> bool:
    """Each GroupNormalization with a scale per group as an InstanceNormalization of groups."""
    if opset not in _GROUP_SCALES:
        return False
    old = [node.op_type == _GROUP_NORM and is_standard(node) for node in nodes]
    if any(old):
        fresh = _namer(nodes)
        pairs = zip(nodes, old, strict=True)
        new = [_by_instance(node, fresh) if is_old else [node] for node, is_old in pairs]
        _replace_nodes(nodes, [node for part in new for node in part])
    return any(old)


def _namer(nodes: Nodes) -> Callable[[str], str]:
    taken = {name for node in nodes for name in (*node.input, *node.output)}

    def fresh(name: str) -> str:
        found = next(n for i in count() if (n := f"{name}_{i}") not in taken)
        taken.add(found)
        return found

    return fresh


def _by_instance(norm: onnx.NodeProto, fresh: Callable[[str], str]) -> Nodes:
    """The nodes that normalise groups of channels, made the channels of a Reshape."""
    make, y = onnx.helper.make_node, norm.output[0]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in norm.attribute}
    split, shape, groups, normal = (fresh(f"{y}_{n}") for n in ("split", "shape", "in", "out"))
    sizes = onnx.numpy_helper.from_array(np.array([0, attributes["num_groups"], -1]))
    epsilon = attributes.get("epsilon", 1e-5)
    last = make("Reshape", [normal, shape], [y], norm.name)
    last.metadata_props.extend(norm.metadata_props)
    return [
        make("Constant", [], [split], value=sizes),
        make("Shape", norm.input[:1], [shape]),
        make("Reshape", [norm.input[0], split], [groups]),
        make("InstanceNormalization", [groups, *norm.input[1:]], [normal], epsilon=epsilon),
        last,
    ]
