"""One block: its learned parameters, and its forward pass with fake quantisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from onnx_attnround.qdq.arithmetic import dynamic_grid, spread
from onnx_attnround.reconstruct.fake_quantise import fake_quantise, rounded
from onnx_attnround.records import (
    Array,
    LayerPlan,
    LayerRounding,
    QuantParams,
    QuantPlan,
    readers_of,
)
from onnx_attnround.runtime.device import fetched
from onnx_attnround.shadow import Shadow

RATES = {"offset": 0.01, "scale": 1e-3, "bias": 1e-3, "step": 3e-3}
"""The first learning rates of Adam.

Offsets are in steps of the grid, scales and the steps of activations are learned as logarithms,
and a bias in its own unit.
"""

Tensors = Mapping[str, torch.Tensor]


class QuantisedBlock:
    """The shadow of a block, with weights and activations quantised.

    Starts as ``roundings`` and ``params`` have it; learns offsets of the codes, scales,
    biases, and the steps of activations of fewer than 8 bits that are not ``settled``. Weights
    and biases that layers elsewhere read, too, stay as they are.
    """

    def __init__(
        self,
        shadow: Shadow,
        layers: Sequence[LayerPlan],
        roundings: Mapping[str, LayerRounding],
        params: Mapping[str, QuantParams],
        plan: QuantPlan,
        settled: set[str],
    ) -> None:
        self.shadow = shadow
        bits = {node: rounding.spec.bits for node, rounding in roundings.items()}
        readers = readers_of(plan.layers, bits)
        self._layers = [_TrainedLayer(layer, roundings[layer.node], shadow) for layer in layers]
        for item in self._layers:
            if len(group := readers[item.plan.node]) > 1:
                biases = (roundings[reader.node].bias for reader in group)
                stored = {None if bias is None else bias.tobytes() for bias in biases}
                item.fix(with_bias=len(stored) == 1)
        self._plan = plan
        self._params = plan.own(params)
        self._read = {name for step in shadow.steps for name in step.inputs}
        free = (self._read & self._params.keys()) - settled
        low = sorted(name for name in free if self._params[name].spec.bits < 8)
        self._steps = {name: _leaf(torch.zeros((), device=shadow.device)) for name in low}
        self._biases = {item.plan.y: item for item in self._layers if item.adds_bias}

    def parameters(self) -> list[dict[str, Any]]:
        """The groups for Adam."""
        layers = self._layers
        leaves = {
            "offset": [item.offset for item in layers],
            "scale": [item.log_scale for item in layers],
            "bias": [item.bias for item in layers if item.bias is not None],
            "step": list(self._steps.values()),
        }
        free = {key: [t for t in found if t.requires_grad] for key, found in leaves.items()}
        return [{"params": free[key], "lr": rate} for key, rate in RATES.items() if free[key]]

    def forward(
        self, feeds: Tensors, seen: MutableMapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The outputs for raw inputs; what the block itself does not read stays raw too.

        ``seen`` takes up all values that the nodes of the block read.
        """
        constants: dict[str, torch.Tensor] = {}
        for layer in self._layers:
            constants |= layer.constants(self.shadow)
        quantised = {name: self._quantise(name, value) for name, value in feeds.items()}

        def hook(name: str, value: torch.Tensor) -> torch.Tensor:
            if name in self._biases:
                value = self._biases[name].add_bias(value)
            if name in self._read:
                value = self._quantise(name, value)
                if seen is not None:
                    seen[name] = value
            return value

        if seen is not None:
            seen.update(quantised)
        return self.shadow(quantised, constants, hook)

    def _quantise(self, name: str, value: torch.Tensor) -> torch.Tensor:
        params = self._params.get(name)
        if params is None:
            return value
        scale, zero = float(params.scale), float(params.zero_point)
        if params.spec.dynamic:
            scale, zero = dynamic_grid(value.detach())
        low, high = params.spec.qmin - zero, params.spec.qmax - zero
        step = self._steps[name].exp() * scale if name in self._steps else torch.tensor(scale)
        return fake_quantise(value, step, low, high)

    def roundings(self) -> dict[str, LayerRounding]:
        """The roundings that the layers have now, by node name."""
        return {layer.plan.node: layer.rounding() for layer in self._layers}

    def steps(self) -> dict[str, QuantParams]:
        """The learned parameters of activations, and of those that share their range."""
        learned: dict[str, QuantParams] = {}
        for name, step in self._steps.items():
            scale = self._params[name].scale * math.exp(float(step.detach()))
            params = replace(self._params[name], scale=np.asarray(scale, np.float32))
            learned |= dict.fromkeys((name, *_followers(name, self._plan)), params)
        return learned


def _followers(name: str, plan: QuantPlan) -> list[str]:
    """The tensors that share the range of ``name``, directly or through others."""
    direct = [moved for moved, source in plan.same_range.items() if source == name]
    return direct + [far for moved in direct for far in _followers(moved, plan)]


class _TrainedLayer:
    """The learned parameters of one layer: offsets of the codes, scales, and the bias."""

    def __init__(self, plan: LayerPlan, rounding: LayerRounding, shadow: Shadow) -> None:
        self.plan = plan
        self._rounding = rounding
        weight, device = shadow.constants[plan.weight], shadow.device
        index = np.arange(rounding.scale.size).reshape(rounding.scale.shape)
        index = spread(index, rounding.codes.shape, rounding.spec)
        self._index = torch.from_numpy(index).to(device)
        self._scale = _float(rounding.scale, device)
        self._position = weight / self._spread(self._scale)
        self.offset = _leaf(self._start(_float(rounding.codes, device)))
        self.log_scale = _leaf(torch.zeros_like(self._scale))
        self.bias = None if rounding.bias is None else _leaf(_float(rounding.bias, device))

    def fix(self, *, with_bias: bool) -> None:
        """Keep codes and scales as they are, and ``with_bias`` the bias."""
        for leaf in (self.offset, self.log_scale, self.bias if with_bias else None):
            if leaf is not None:
                leaf.requires_grad = False

    def _spread(self, scale: torch.Tensor) -> torch.Tensor:
        """One scale a channel or block, as codes are multiplied by it."""
        return scale.reshape(-1)[self._index]

    @property
    def adds_bias(self) -> bool:
        """Whether the layer is given a bias that the float model lacks."""
        return self.bias is not None and self.plan.bias is None

    def _start(self, codes: torch.Tensor) -> torch.Tensor:
        """Halfway from the weight to its code, or as little further as it takes to round there."""
        offset = (codes - self._position) / 2
        reach = 0.49  # less than half a step, so that it rounds to this code for certain
        return offset.clamp(codes - reach - self._position, codes + reach - self._position)

    def _codes(self) -> torch.Tensor:
        spec = self._rounding.spec
        return rounded(self._position + self.offset).clamp(spec.qmin, spec.qmax)

    def constants(self, shadow: Shadow) -> dict[str, torch.Tensor]:
        """The quantised weight, and the bias, by the names of what they replace."""
        scale = self._spread(self._scale * self.log_scale.exp())
        found = {self.plan.weight: self._codes() * scale}
        if self.bias is not None and self.plan.bias is not None:
            found[self.plan.bias] = self.bias.reshape(shadow.constants[self.plan.bias].shape)
        return found

    def add_bias(self, y: torch.Tensor) -> torch.Tensor:
        """The output ``y`` with the bias, along its channel axis."""
        if self.bias is None:
            return y
        return y + (self.bias if y.ndim == 2 else self.bias.reshape(-1, *[1] * (y.ndim - 2)))

    def rounding(self) -> LayerRounding:
        """The record with what was learned."""
        codes = fetched(self._codes()).astype(np.int8)
        scale = fetched(self._scale * self.log_scale.exp()).astype(np.float32)
        bias = None if self.bias is None else fetched(self.bias).copy()
        scale = scale.reshape(self._rounding.scale.shape)
        return replace(self._rounding, codes=codes, scale=scale, bias=bias)


def _float(values: Array, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)


def _leaf(values: torch.Tensor) -> torch.Tensor:
    return values.clone().requires_grad_()
