"""Cut a graph at its weighted layers, so that it can be walked once, layer by layer.

Stage ``k`` holds the nodes that depend on layer ``k - 1`` and on no later one;
stage 0 those that depend on none. Nodes that no layer needs are in no stage. Nodes
that only unpack codes, and those without a variable input, belong to whichever
stage reads them, so that what crosses a cut is the small integer tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_attnround.errors import ModelError

_Reads = dict[ir.Node, tuple[ir.Value, ...]]


@dataclass(frozen=True, slots=True)
class Stage:
    """One piece of the walk: tensor names in and out, and what the walk needs of them.

    ``reads`` is what the layer behind the stage reads; ``released`` are those
    inputs that no later stage reads.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    released: tuple[str, ...]
    reads: str


def cut(
    model: ir.Model, layers: Sequence[str], codes: Collection[str] = ()
) -> tuple[Stage, ...]:
    """The stages up to the input of the last layer; ``layers`` are node names in graph order.

    Stage ``k`` provides what layer ``k`` reads. ``codes`` are the integer tensors
    that cross a cut in place of what a DequantizeLinear makes of them. The graph
    must be sorted. Raises ``ModelError`` if a layer reads no variable tensor.
    """
    reads = _needed(_crossing_reads(model.graph, codes), layers)
    order = {name: position + 1 for position, name in enumerate(layers)}
    origin: dict[ir.Value, int] = dict.fromkeys(model.graph.inputs, -1)
    read_in: list[set[ir.Value]] = [set() for _ in range(len(layers) + 1)]
    layer_reads = {}
    for node, values in reads.items():
        stage = max(order.get(node.name or "", 0), *(origin[value] for value in values))
        origin.update(dict.fromkeys(node.outputs, stage))
        read_in[stage].update(values)
        if node.name in order:
            layer_reads[node.name] = values[0].name or ""
    if constant := [name for name in layers if name not in layer_reads]:
        raise ModelError(
            f"node '{constant[0]}': its input depends on no model input; exclude the node"
        )
    last = {value: stage for stage, values in enumerate(read_in) for value in values}
    return tuple(
        Stage(
            inputs=_names(value for value in read_in[stage] if origin[value] < stage),
            outputs=_names(v for v in last if origin[v] == stage and last[v] > stage),
            released=_names(v for v in last if origin[v] < stage and last[v] == stage),
            reads=layer_reads[layer],
        )
        for stage, layer in enumerate(layers)
    )


def extract(model: ir.Model, stage: Stage) -> ir.Model:
    """The sub-model that computes ``stage.outputs`` from ``stage.inputs``.

    An input of unknown type is taken to be float32.
    """
    graph = ir.convenience.extract(model.graph, list(stage.inputs), list(stage.outputs))
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    for value in graph.inputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _names(values: Iterator[ir.Value]) -> tuple[str, ...]:
    return tuple(sorted(value.name or "" for value in values))


def _crossing_reads(graph: ir.Graph, codes: Collection[str]) -> _Reads:
    """What each node needs at hand to run; nodes that run with their readers are left out."""
    crossing = {value: value for value in graph.inputs if not value.is_initializer()}
    reads: _Reads = {}
    for node in graph:
        found = tuple(crossing[value] for value in _reads(node) if value in crossing)
        if node.op_type == "DequantizeLinear" and found and found[0].name in codes:
            crossing[node.outputs[0]] = found[0]
        elif found:
            reads[node] = found
            crossing.update((value, value) for value in node.outputs)
    return reads


def _needed(reads: _Reads, layers: Sequence[str]) -> _Reads:
    """The reads of the layers and of all nodes that lead to one."""
    wanted: set[ir.Value] = set()
    kept: set[ir.Node] = set()
    names = set(layers)
    for node, values in reversed(reads.items()):
        if node.name in names or not wanted.isdisjoint(node.outputs):
            kept.add(node)
            wanted.update(values)
    return {node: values for node, values in reads.items() if node in kept}


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads; values that its subgraphs capture may come with some of their own."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for child in (child for graph in graphs for child in graph.all_nodes()):
            yield from (value for value in child.inputs if value is not None)
