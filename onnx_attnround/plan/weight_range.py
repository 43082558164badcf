"""The codes of weights that an integer kernel adds up exactly on any CPU of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnx_attnround.ops import is_depthwise
from onnx_attnround.records import LayerPlan, QuantSpec, readers_of
from onnx_attnround.targets import Target


def with_limits(
    layers: Sequence[LayerPlan], activations: Mapping[str, QuantSpec], target: Target
) -> tuple[LayerPlan, ...]:
    """The layers, the codes of their weights limited so that no pair of products overflows."""
    limits = {layer.node: _limit(layer, activations.get(layer.x), target) for layer in layers}
    groups = readers_of(layers)  # a weight is stored once, so that its readers have one limit
    least = {
        node: min((limit for each in group if (limit := limits[each.node])), default=None)
        for node, group in groups.items()
    }
    return tuple(
        replace(layer, weight_spec=replace(layer.weight_spec, limit=least[layer.node]))
        for layer in layers
    )


def _limit(layer: LayerPlan, activation: QuantSpec | None, target: Target) -> int | None:
    """The largest magnitude of a code; ``None`` where all codes of 8 bits are safe."""
    if activation is None or activation.bits > 8 or layer.op_type not in target.weighted:
        return None  # computed in float
    if is_depthwise(layer.op_type, layer.attributes, layer.weight_shape):
        return None  # such kernels add no pairs of products
    offset = 128 if activation.signed else 0  # kernels shift signed codes to unsigned ones
    limit = target.code_limit(activation.qmax + offset)
    return None if limit is None or limit >= 128 else limit
