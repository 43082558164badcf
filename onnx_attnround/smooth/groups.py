"""Layers that read one tensor, whose channels are scaled together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_attnround.ops import matrix_shape
from onnx_attnround.records import Array, LayerPlan, QuantPlan, QuantSpec, readers_of
from onnx_attnround.smooth.division import CannotDivideError, Edit, divide


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The layers that read ``value``, along whose ``axis`` there are ``channels``.

    ``folds`` says whether constants before the tensor can take up a scale; else a Mul
    must. ``spec`` is how the tensor is quantised, ``None`` where it stays float.
    """

    value: ir.Value
    layers: tuple[LayerPlan, ...]
    axis: int
    channels: int
    spec: QuantSpec | None
    folds: bool

    @property
    def name(self) -> str:
        """The name of the tensor."""
        return self.value.name or ""


def find_groups(model: ir.Model, plan: QuantPlan) -> list[Group]:
    """The groups whose tensor can be scaled, in the order of the graph."""
    readers: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        readers.setdefault(layer.x, []).append(layer)
    shared = _sharing(plan)  # a weight that others read is stored once, so that it has one scale
    readers = {
        name: layers
        for name, layers in readers.items()
        if shared.isdisjoint(layer.node for layer in layers)
    }
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    found = (_group(values[name], layers, plan) for name, layers in readers.items())
    return [group for group in found if group is not None]


def _group(value: ir.Value, layers: Sequence[LayerPlan], plan: QuantPlan) -> Group | None:
    axes = {-1 if layer.is_matrix else 1 for layer in layers}
    channels = {channels_of(layer) for layer in layers}
    turned = any(layer.attributes.get("transA", 0) for layer in layers)
    if len(axes) > 1 or len(channels) > 1 or channels == {1} or turned:
        return None
    axis, count = axes.pop(), channels.pop()
    folds = _folds(value, layers, axis, count, plan)
    if not folds and (axis != -1 or plan.target.placement == "everything"):
        return None  # a Mul of a whole image takes too long; one more tensor would be quantised
    spec = plan.activations.get(value.name or "")
    return Group(
        value=value, layers=tuple(layers), axis=axis, channels=count, spec=spec, folds=folds
    )


def _folds(
    value: ir.Value, layers: Sequence[LayerPlan], axis: int, channels: int, plan: QuantPlan
) -> bool:
    try:
        _edits(value, layers, axis, np.linspace(1.0, 2.0, channels), plan)
    except CannotDivideError:
        return False
    return True


def channels_of(layer: LayerPlan) -> int:
    """The number of input channels of a layer."""
    groups, _, depth = matrix_shape(layer)
    return groups * depth // math.prod(layer.weight_shape[2:])


def edits_of(group: Group, scale: Array, plan: QuantPlan) -> list[Edit]:
    """The edits that divide the tensor of a group that folds by ``scale``, one per channel."""
    return _edits(group.value, group.layers, group.axis, scale, plan)


def _edits(
    value: ir.Value, layers: Sequence[LayerPlan], axis: int, scale: Array, plan: QuantPlan
) -> list[Edit]:
    if value.shape is None:
        raise CannotDivideError(f"the rank of '{value.name}' is unknown")
    shape = [1] * len(value.shape)
    shape[axis] = -1
    names = {layer.node for layer in layers}
    readers = [node for node in value.consumers() if node.name in names]
    return divide(value, scale.reshape(shape), readers, _fixed(value.name or "", plan))


def _fixed(name: str, plan: QuantPlan) -> set[str]:
    """Quantised tensors of a range of their own; layers whose channels share a scale or weight."""
    alone = {other for other in plan.activations if not _moves(other, name, plan.same_range)}
    one_scale = {layer.node for layer in plan.layers if layer.weight_spec.axis is None}
    return alone | one_scale | _sharing(plan)


def _sharing(plan: QuantPlan) -> set[str]:
    """The layers whose weight others read, too."""
    return {node for node, group in readers_of(plan.layers).items() if len(group) > 1}


def _moves(source: str, name: str, same_range: Mapping[str, str]) -> bool:
    """Whether ``name`` holds the codes of ``source``, moved."""
    while name in same_range and name != source:
        name = same_range[name]
    return name == source
