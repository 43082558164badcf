"""Part what layers read at few bits from what other nodes read at eight.

A residual stream is read by the next layer and added further on. With one
quantiser for both, every block rounds the whole stream to the few bits of a
layer's input, and the errors add up. An Identity in front of the layers makes
their input a tensor of its own, with its own quantiser (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.records import QuantPlan


def part_inputs(model: ir.Model, plan: QuantPlan, config: QuantConfig) -> ir.Model:
    """A copy of ``model`` with an Identity before layers whose input other nodes read too.

    With activations of 8 bits or more, or where no tensor is read so, ``model`` itself.
    """
    if config.act_bits >= 8:
        return model
    parted = model.clone()
    layers = {layer.node for layer in plan.layers}
    inputs = {layer.x for layer in plan.layers}
    found = [
        (value, [(use.node, use.idx) for use in value.uses() if use.node.name in layers])
        for node in parted.graph
        for value in node.outputs
        if value.name in inputs
    ]
    shared = [(value, reads) for value, reads in found if len(reads) < len(value.uses())]
    for value, reads in shared:
        _part(value, reads)
    return parted if shared else model


def _part(value: ir.Value, reads: Sequence[tuple[ir.Node, int]]) -> None:
    producer = value.producer()
    if producer is None or producer.graph is None:
        return
    node = ir.node("Identity", [value], name=f"{value.name}/part")
    narrow = node.outputs[0]
    narrow.name, narrow.shape, narrow.type = f"{value.name}/parted", value.shape, value.type
    producer.graph.insert_after(producer, node)
    for reader, index in reads:
        reader.replace_input_with(index, narrow)
