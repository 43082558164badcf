"""Smoothing: scales per channel move range from activations to weights.

Where layers read a tensor, its channels are divided by a scale each, and the weights of the
layers multiplied by it. The model computes the same; a tensor whose channels are more alike
loses less in eight bits. Each tensor's scales, or none, are chosen by the error of the
layers that read it, on samples that the scales do not come from.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from onnx_attnround.calibrate import observed
from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import tensor_value
from onnx_attnround.ops import weight_matrix
from onnx_attnround.records import LayerPlan, OnEvent, QuantPlan, Smoothing
from onnx_attnround.samples import Samples
from onnx_attnround.smooth.choice import JudgedLayer, choose
from onnx_attnround.smooth.groups import channels_of, find_groups
from onnx_attnround.smooth.rewrite import smoothed
from onnx_attnround.smooth.statistics import Statistics

__all__ = ["find_smoothing", "smoothed"]

MOST_SAMPLES = 256
"""The most samples that are looked at."""
MOST_OUTPUTS = 512
"""The most outputs of a layer that are judged."""


def find_smoothing(
    model: ir.Model,
    plan: QuantPlan,
    samples: Samples,
    config: QuantConfig,
    on_event: OnEvent,
) -> dict[str, Smoothing]:
    """How each tensor that layers of ``plan`` read is smoothed, by its name.

    Raises ``CalibrationError`` if ONNX Runtime fails on a sample.
    """
    count = min(samples.count, MOST_SAMPLES)
    by_name = {group.name: Statistics(group, count) for group in find_groups(model, plan)}
    for name, value in observed(model, list(by_name), samples, config, "smooth", on_event):
        if by_name[name].seen >= count:
            break
        by_name[name].update(value)
    return {
        name: choose(
            each, [_layer(model, layer, config) for layer in each.group.layers], config.observer
        )
        for name, each in by_name.items()
        if each.complete
    }


def _layer(model: ir.Model, plan: LayerPlan, config: QuantConfig) -> JudgedLayer:
    weight = weight_matrix(plan, tensor_value(model, plan.weight))
    groups, outputs, depth = weight.shape
    inputs = channels_of(plan) // groups
    channels = np.arange(groups * inputs).reshape(groups, 1, inputs)
    tiled = np.tile(channels, (1, depth // inputs, 1)).reshape(groups, depth)
    some = np.array(weight[:, :: -(-outputs * groups // MOST_OUTPUTS)], np.float32)
    bits = max(config.weight_bits, config.first_last_bits * plan.first_or_last)
    return JudgedLayer(plan, plan.spec_of(bits), torch.from_numpy(some), torch.from_numpy(tiled))
