"""Refine the roundings block by block, with quantised activations in the loop.

Starts from the solution layer by layer (``reconstruct.py``). A block (``blocks.py``)
runs as a torch shadow graph with fake quantisation; offsets of the codes, scales,
biases and steps of low-bit activations are learned together, so that the block's
outputs come close to the float model's. This is block reconstruction (Li et al.,
"BRECQ", arXiv 2102.05426) with inputs that are at random those of the quantised
prefix or those of the float model (after Wei et al., "QDrop", arXiv 2203.05740),
learned steps (Esser et al., "Learned Step Size Quantization", arXiv 1902.08153),
and Attention Round in place of their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from onnx_attnround import qdq
from onnx_attnround.blocks import Block, find_blocks
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ModelError
from onnx_attnround.quantizer import channel_view
from onnx_attnround.records import (
    BlockRounding,
    Event,
    LayerPlan,
    LayerRounding,
    QuantParams,
    QuantPlan,
)
from onnx_attnround.rounding import attend
from onnx_attnround.samples import Samples
from onnx_attnround.shadow import Shadow, build_shadow
from onnx_attnround.store import ActivationStore
from onnx_attnround.walk import BlockBatch, BlockWalk

STEPS = 160  # of Adam, for a block
MINIBATCH = 32  # samples in a step, at least
RATES = {"offset": 0.01, "scale": 1e-3, "bias": 1e-3, "step": 3e-3}  # of Adam, at first
FLOAT_SHARE = 0.5  # of a block's input elements that are the float model's, in training

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """Roundings by node, parameters by tensor, and the record of each block.

    ``settled`` are the tensors whose steps a block has learned, for good.
    """

    roundings: dict[str, LayerRounding]
    params: dict[str, QuantParams]
    blocks: list[BlockRounding] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)


def refine_blocks(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    roundings: Mapping[str, LayerRounding],
    samples: Samples,
    config: QuantConfig,
    on_event: Callable[[Event], None],
) -> Refined:
    """Refine block after block, each against what the refined prefix really feeds it.

    A block whose error on all samples does not fall stays as it was, and so does one
    that cannot run in torch; its record says why. Deterministic for the same inputs.
    """
    result = Refined(roundings=dict(roundings), params=dict(params))
    quantised = qdq.insert(model, plan, params, roundings, "int8")
    blocks = find_blocks(model, plan.layers)
    with ActivationStore(config.activation_memory_mb << 20) as store:
        walk = BlockWalk(
            model,
            quantised,
            blocks,
            samples,
            batch_size=min(config.batch_size, MINIBATCH),
            store=store,
            threads=config.threads,
        )
        for index, block in enumerate(blocks):
            walk.advance(index)
            record = _refine(model, plan, result, block, walk, index, config.seed + index)
            _update(quantised, plan, result, block)
            result.blocks.append(record)
            detail = f"{block[0].node} … {block[-1].node}  {record.summary}"
            on_event(Event(stage="refine", done=index + 1, total=len(blocks), detail=detail))
    return result


def _refine(
    model: ir.Model,
    plan: QuantPlan,
    result: Refined,
    block: Block,
    walk: BlockWalk,
    index: int,
    seed: int,
) -> BlockRounding:
    """Train one block; keep the outcome in ``result`` if it is better on all samples."""
    names = tuple(layer.node for layer in block)
    weights = [layer.weight for layer in block]
    if len(set(weights)) < len(weights):
        return BlockRounding(nodes=names, skipped="two layers share a weight")
    try:
        shadow = build_shadow(model, *walk.names(index))
        trained = _Block(shadow, block, plan, result)
        before = _error(trained, walk, index)
        _train(trained, walk, index, seed)
        after = _error(trained, walk, index)
    except ModelError as error:
        return BlockRounding(nodes=names, skipped=str(error))
    if after < before:
        trained.store(result, plan)
    return BlockRounding(nodes=names, error_before=before, error_after=min(before, after))


def _update(quantised: ir.Model, plan: QuantPlan, result: Refined, block: Block) -> None:
    """Bring the model of the walk to the state of ``result``."""
    for name in plan.activations:
        qdq.update_scale(quantised, name, result.params[name])
    for layer in block:
        qdq.update_layer(quantised, layer, result.roundings[layer.node], result.params, plan)


# --- one block --------------------------------------------------------------------------


class _Block:
    """The learned parameters of a block, and its forward pass with fake quantisation."""

    def __init__(self, shadow: Shadow, block: Block, plan: QuantPlan, result: Refined) -> None:
        self._shadow = shadow
        self._layers = [_Layer(layer, result.roundings[layer.node], shadow) for layer in block]
        self._params = {n: p for n, p in result.params.items() if n not in plan.same_range}
        self._read = {name for step in shadow.steps for name in step.inputs}
        free = (self._read & self._params.keys()) - result.settled
        low = sorted(name for name in free if self._params[name].spec.bits < 8)
        self._steps = {name: _leaf(torch.zeros(())) for name in low}
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
        return [{"params": leaves[key], "lr": rate} for key, rate in RATES.items() if leaves[key]]

    def forward(self, feeds: Tensors) -> dict[str, torch.Tensor]:
        """The outputs for raw inputs; what the block itself does not read stays raw too."""
        constants: dict[str, torch.Tensor] = {}
        for layer in self._layers:
            constants |= layer.constants(self._shadow)
        quantised = {name: self._quantise(name, value) for name, value in feeds.items()}
        return self._shadow(quantised, constants, self._hook)

    def _hook(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name in self._biases:
            value = self._biases[name].add_bias(value)
        return self._quantise(name, value) if name in self._read else value

    def _quantise(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Fake quantisation below 8 bits; from there on the range alone, whose steps are small."""
        params = self._params.get(name)
        if params is None:
            return value
        scale, zero = float(params.scale), float(params.zero_point)
        low, high = params.spec.qmin - zero, params.spec.qmax - zero
        if name not in self._steps and params.spec.bits >= 8:
            return value.clamp(low * scale, high * scale)
        step = self._steps[name].exp() * scale if name in self._steps else torch.tensor(scale)
        return _fake_quantise(value, step, low, high)

    def store(self, result: Refined, plan: QuantPlan) -> None:
        """Put what was learned into ``result``."""
        result.settled.update(self._steps)
        for layer in self._layers:
            result.roundings[layer.plan.node] = layer.rounding()
        for name, step in self._steps.items():
            scale = self._params[name].scale * math.exp(float(step.detach()))
            for follower in (name, *_followers(name, plan)):
                params = result.params[follower]
                result.params[follower] = replace(params, scale=np.asarray(scale, np.float32))


def _followers(name: str, plan: QuantPlan) -> list[str]:
    """The tensors that share the range of ``name``, at once or through others."""
    direct = [moved for moved, source in plan.same_range.items() if source == name]
    return direct + [far for moved in direct for far in _followers(moved, plan)]


class _Layer:
    """The learned parameters of one layer: offsets of the codes, scales, and the bias."""

    def __init__(self, plan: LayerPlan, rounding: LayerRounding, shadow: Shadow) -> None:
        self.plan = plan
        self._rounding = rounding
        weight = shadow.constants[plan.weight]
        view = channel_view(rounding.scale, weight.ndim, rounding.spec.axis)
        self._scale = torch.from_numpy(view.astype(np.float32))
        self._position = weight / self._scale
        self.offset = _leaf(self._start(torch.from_numpy(rounding.codes.astype(np.float32))))
        self.log_scale = _leaf(torch.zeros_like(self._scale))
        given = rounding.bias
        self.bias = None if given is None else _leaf(torch.from_numpy(given.astype(np.float32)))

    @property
    def adds_bias(self) -> bool:
        """Whether the layer is given a bias that the float model lacks."""
        return self.bias is not None and self.plan.bias is None

    def _start(self, codes: torch.Tensor) -> torch.Tensor:
        """Halfway from the weight to its code, or as little further as it takes to round there."""
        offset = (codes - self._position) / 2
        reach = 0.49
        return offset.clamp(codes - reach - self._position, codes + reach - self._position)

    def _codes(self) -> torch.Tensor:
        spec = self._rounding.spec
        codes: torch.Tensor = _Codes.apply(self._position, self.offset)  # type: ignore[no-untyped-call]
        return codes.clamp(spec.qmin, spec.qmax)

    def constants(self, shadow: Shadow) -> dict[str, torch.Tensor]:
        """The quantised weight, and the bias, by the names of what they replace."""
        found = {self.plan.weight: self._codes() * (self._scale * self.log_scale.exp())}
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
        with torch.no_grad():
            codes = self._codes().numpy().astype(np.int8)
            scale = (self._scale * self.log_scale.exp()).numpy().astype(np.float32)
        bias = None if self.bias is None else self.bias.detach().numpy().copy()
        scale = scale.reshape(self._rounding.scale.shape)
        return replace(self._rounding, codes=codes, scale=scale, bias=bias)


def _leaf(values: torch.Tensor) -> torch.Tensor:
    return values.clone().requires_grad_()


# --- training ---------------------------------------------------------------------------


def _train(block: _Block, walk: BlockWalk, index: int, seed: int) -> None:
    """Adam with cosine decay, on minibatches of stored batches in random order."""
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(block.parameters())
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    order: list[int] = []
    for _ in range(STEPS):
        adam.zero_grad()
        taken = 0
        while taken < MINIBATCH:
            order = order or torch.randperm(walk.count, generator=generator).tolist()
            batch = walk.batch(index, order.pop())
            count = len(next(iter(batch.outputs.values())))
            taken += count
            loss = _loss(block.forward(_mixed(batch, generator)), batch) * count
            loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        decay.step()


def _mixed(batch: BlockBatch, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Inputs of the quantised prefix, with a random share of elements from the float model."""
    feeds = {}
    for name, values in batch.quantised.items():
        quantised, plain = torch.from_numpy(values), torch.from_numpy(batch.plain[name])
        if quantised.is_floating_point():
            chosen = torch.rand(plain.shape, generator=generator) < FLOAT_SHARE
            quantised = torch.where(chosen, plain, quantised)
        feeds[name] = quantised
    return feeds


def _loss(outputs: Tensors, batch: BlockBatch) -> torch.Tensor:
    """Mean over the outputs of the squared error, each relative to its mean square."""
    wanted = {name: torch.from_numpy(values) for name, values in batch.outputs.items()}
    floating = [name for name in wanted if wanted[name].is_floating_point()]
    losses = [
        (outputs[name] - wanted[name]).square().mean()
        / wanted[name].square().mean().clamp_min(1e-30)
        for name in floating
    ]
    return torch.stack(losses).mean()


def _error(block: _Block, walk: BlockWalk, index: int) -> float:
    """The loss over all samples, with inputs of the quantised prefix."""
    total = count = 0.0
    with torch.no_grad():
        for batch in (walk.batch(index, number) for number in range(walk.count)):
            feeds = {name: torch.from_numpy(values) for name, values in batch.quantised.items()}
            samples = len(next(iter(batch.outputs.values())))
            total += float(_loss(block.forward(feeds), batch)) * samples
            count += samples
    return total / count


class _Codes(torch.autograd.Function):
    """``round(position + offset)``; the gradient by the offset is that of Attention Round."""

    @staticmethod
    def forward(ctx: Any, position: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(offset)
        return (position + offset).round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        (offset,) = ctx.saved_tensors
        return None, attend(offset, gradient)


class _FakeQuantise(torch.autograd.Function):
    """``s clip(round(x/s), low, high)``, with the gradients of Esser et al.

    That is by ``x`` 1 inside the range and 0 outside, by ``s`` the code less ``x/s`` inside
    the range, the bound outside.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, step: torch.Tensor, low: float, high: float
    ) -> torch.Tensor:
        position = x / step
        codes = position.round().clamp_(low, high)
        ctx.save_for_backward(position, codes)
        ctx.range = low, high
        return codes * step

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        position, codes = ctx.saved_tensors
        low, high = ctx.range
        inside = (position >= low - 0.5) & (position <= high + 0.5)
        passed = gradient * inside
        by_step = (gradient * codes).sum() - (passed * position).sum()
        return passed, by_step, None, None


def _fake_quantise(
    x: torch.Tensor, step: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    quantised: torch.Tensor = _FakeQuantise.apply(x, step, low, high)  # type: ignore[no-untyped-call]
    return quantised
