"""Cut a graph at its weighted layers, so that it can be walked once, layer by layer.

Stage ``k`` holds the nodes that depend on layer ``k - 1`` and on no later one;
stage 0 those that depend on none. Nodes that only unpack constants or codes
(DequantizeLinear, and nodes without a variable input) belong to whichever stage
reads them, so that what crosses a cut is the small integer tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Stage:
    """One piece of the walk: tensor names in and out; ``released`` are not read again."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    released: tuple[str, ...]


def cut(model: ir.Model, layers: Sequence[str]) -> tuple[Stage, ...]:
    """The stages up to the input of the last layer; ``layers`` are node names in graph order.

    Stage ``k`` provides what layer ``k`` reads. The graph must be sorted.
    """
    owner = _stage_of_nodes(model.graph, layers)
    reads = [_stage_reads(model.graph, owner, stage) for stage in range(len(layers) + 1)]
    produced = {
        value.name or "": owner[node]
        for node in model.graph
        if node in owner
        for value in node.outputs
    }
    produced.update({value.name or "": -1 for value in model.graph.inputs})
    last_read = {name: stage for stage, names in enumerate(reads) for name in names}
    return tuple(
        _stage(stage, reads[stage], produced, last_read) for stage in range(len(layers))
    )


def _stage(
    stage: int, reads: set[str], produced: dict[str, int], last_read: dict[str, int]
) -> Stage:
    inputs = sorted(name for name in reads if produced[name] < stage)
    outputs = sorted(
        name
        for name, origin in produced.items()
        if origin == stage and last_read.get(name, -1) > stage
    )
    released = sorted(name for name, last in last_read.items() if last == stage)
    return Stage(tuple(inputs), tuple(outputs), tuple(released))


def extract(model: ir.Model, stage: Stage) -> ir.Model:
    """The sub-model that computes ``stage.outputs`` from ``stage.inputs``."""
    graph = ir.convenience.extract(model.graph, list(stage.inputs), list(stage.outputs))
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def codes_of(model: ir.Model, node: str) -> str:
    """The tensor that crosses the cut for the input of ``node``: codes, or the float value."""
    for candidate in model.graph:
        if candidate.name == node and candidate.inputs[0] is not None:
            return _crossing(candidate.inputs[0]).name or ""
    raise KeyError(node)


def _is_lazy(node: ir.Node) -> bool:
    if node.op_type == "DequantizeLinear":
        return True
    return all(_is_constant(value) for value in _reads(node))


def _is_constant(value: ir.Value) -> bool:
    if value.is_initializer() or value.const_value is not None:
        return True
    producer = value.producer()
    return producer is not None and all(_is_constant(v) for v in _reads(producer))


def _crossing(value: ir.Value) -> ir.Value:
    producer = value.producer()
    while producer is not None and producer.op_type == "DequantizeLinear":
        first = producer.inputs[0]
        if first is None:
            break
        value = first
        producer = value.producer()
    return value


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, values captured by its subgraphs among them."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        graphs: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.value,)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.value
        for graph in graphs:
            inner = set(graph.all_nodes())
            values += [
                value
                for child in inner
                for value in child.inputs
                if value is not None
                and value.graph is not graph
                and value.producer() not in inner
                and not value.is_initializer()
            ]
    return values


def _stage_of_nodes(graph: ir.Graph, layers: Sequence[str]) -> dict[ir.Node, int]:
    order = {name: position for position, name in enumerate(layers)}
    owner: dict[ir.Node, int] = {}
    for node in graph:
        if _is_lazy(node):
            continue
        stage = order.get(node.name or "", -1) + 1
        for value in _reads(node):
            producer = _crossing(value).producer()
            if producer is not None and producer in owner:
                stage = max(stage, owner[producer])
        owner[node] = stage
    return owner


def _stage_reads(graph: ir.Graph, owner: dict[ir.Node, int], stage: int) -> set[str]:
    names: set[str] = set()
    for node in graph:
        if owner.get(node) == stage:
            for value in _reads(node):
                crossing = _crossing(value)
                if not _is_constant(crossing):
                    names.add(crossing.name or "")
    return names
