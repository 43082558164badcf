"""Split a tensor whose readers want it in two precisions: as codes and float, or 4 bits and 8.

A residual stream is read by the next layer and added further on. With one
quantiser for both, every unit of the network rounds the whole stream as coarsely as the
input of a layer, and the errors add up. An Identity in front of the layers makes their
input a tensor of its own, with a quantiser of its own; the stream keeps another, or none
(docs/experiments.md). The file has no such node: the Q takes its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.records import QuantPlan


def part_layers(model: ir.Model, plan: QuantPlan, config: QuantConfig) -> ir.Model:
    """A copy of ``model`` with an Identity before layers whose input other nodes read too.

    With activations of 8 bits or more, or where no tensor is read so, ``model`` itself.
    """
    if config.act_bits >= 8:
        return model
    layers = frozenset(layer.node for layer in plan.layers)
    made = {value.name for node in model.graph for value in node.outputs}
    inputs = (layer.x for layer in plan.layers if layer.x in plan.activations)
    return _parted(model, {name: layers for name in inputs if name in made})


def part_floats(model: ir.Model, plan: QuantPlan, config: QuantConfig) -> ir.Model:
    """A copy of ``model`` with an Identity before the integer readers of ``plan.shared``.

    Float nodes then read what was computed in float. Without such tensors, ``model`` itself.
    """
    return _parted(model, plan.shared)


def _parted(model: ir.Model, readers: Mapping[str, Collection[str]]) -> ir.Model:
    """A copy with an Identity between the tensors of ``readers`` and the readers named there.

    ``model`` itself, where nobody else reads any of the tensors.
    """
    parted = model.clone()
    values = ir.convenience.create_value_mapping(parted.graph, include_subgraphs=False)
    done = [_part(parted.graph, values[name], nodes) for name, nodes in readers.items()]
    return parted if any(done) else model


def _part(graph: ir.Graph, value: ir.Value, nodes: Collection[str]) -> bool:
    """Put an Identity between ``value`` and the ``nodes``, unless they alone read it."""
    reads = [(use.node, use.idx) for use in value.uses() if use.node.name in nodes]
    if len(reads) == len(value.uses()) and not value.is_graph_output():
        return False
    node = ir.node("Identity", [value], name=f"{value.name}/part")
    parted = node.outputs[0]
    parted.name, parted.shape, parted.type = f"{value.name}/parted", value.shape, value.type
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    for reader, index in reads:
        reader.replace_input_with(index, parted)
    return True
