"""Which weights get a scale for each block of inputs, and why others do not.

A DequantizeLinear knows blocks along one axis: that of the inputs of a matrix. Integer
kernels know none, so that the input of such a layer stays float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_attnround.errors import ConfigError
from onnx_attnround.records import LayerPlan
from onnx_attnround.targets import Target


def check_blocks(size: int, target: Target, *, integer_activations: bool) -> None:
    """Raise ``ConfigError`` if ``target`` takes no blocks of ``size``, or needs float inputs."""
    if integer_activations:
        raise ConfigError(
            "option `block_size`: activations are to be quantised, and integer layers take one "
            "scale per channel; give `act_bits` 32, which leaves activations float, or no "
            "`block_size`"
        )
    if size not in target.block_sizes:
        known = ", ".join(map(str, sorted(target.block_sizes))) or "no blocks"
        raise ConfigError(
            f"option `block_size`: target '{target.name}' takes {known}, got {size}"
        )


def with_blocks(
    layers: Sequence[LayerPlan], size: int | None, target: Target
) -> tuple[tuple[LayerPlan, ...], dict[str, str]]:
    """The layers, in blocks of ``size`` where they can be; for others the reason, by node name."""
    if size is None:
        return tuple(layers), {}
    reasons = {layer.node: _refusal(layer, size, target) for layer in layers}
    # Where blocks are stored as INT4 alone, layers of more bits have one scale per channel.
    widest = 8 if "int8" in target.block_storages else 4
    blocked = tuple(
        layer
        if reasons[layer.node]
        else replace(
            layer, weight_spec=replace(layer.weight_spec, block_size=size), block_bits=widest
        )
        for layer in layers
    )
    return blocked, {node: why for node, why in reasons.items() if why}


def _refusal(layer: LayerPlan, size: int, target: Target) -> str | None:
    axis = layer.weight_spec.axis
    if not layer.is_matrix or axis is None:
        return f"{layer.op_type} takes one scale per channel"
    inputs = layer.weight_shape[1 - axis]
    if inputs <= size:
        return f"{inputs} inputs fill no more than one"
    if inputs % size and not target.short_blocks:
        return f"its {inputs} inputs are no multiple of {size}"
    return None
