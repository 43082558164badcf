"""Refine the roundings block by block, with quantised activations in the loop.

Starts from the solution layer by layer (``layerwise.py``). A block (``layer_groups.py``)
runs as a torch shadow graph with fake quantisation; offsets of the codes, scales,
biases and steps of low-bit activations are learned together, so that the block's
outputs come close to the float model's. This is block reconstruction (Li et al.,
"BRECQ", arXiv 2102.05426) with inputs that are at random those of the quantised
prefix or those of the float model (after Wei et al., "QDrop", arXiv 2203.05740),
learned steps (Esser et al., "Learned Step Size Quantization", arXiv 1902.08153),
and offsets of the codes as in Attention Round, whose gradients here pass straight
through: weighted by the attention they gained nothing (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

import onnx_ir as ir
import torch

from onnx_attnround import qdq
from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run, Units
from onnx_attnround.errors import ModelError
from onnx_attnround.numerics import TINY
from onnx_attnround.reconstruct.layer_groups import Block, find_blocks
from onnx_attnround.reconstruct.layerwise import (
    moments_of,
    open_layer,
    round_layer,
    threads_limited,
    torch_threads,
)
from onnx_attnround.reconstruct.trained_block import QuantisedBlock, Tensors
from onnx_attnround.reconstruct.walk import BlockBatch, BlockWalk, open_place
from onnx_attnround.records import (
    BlockRounding,
    LayerPlan,
    LayerRounding,
    QuantParams,
    QuantPlan,
    readers_of,
)
from onnx_attnround.runtime.device import Value, exact
from onnx_attnround.samples import Samples
from onnx_attnround.shadow import Shadow, build_shadow

STEPS = 160
"""The steps of Adam for a block."""

MINIBATCH = 32
"""The samples of a step, at least, if there are as many."""

JUDGED_EVERY = 4
"""One batch of so many is not trained on, and tells whether a block gained."""

FLOAT_SHARE = 0.5
"""The share of a block's input elements that the float model provides, in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """Roundings by node, parameters by tensor, and the record of each block.

    ``settled`` are the tensors whose steps a block has learned, for good.
    """

    roundings: dict[str, LayerRounding]
    params: dict[str, QuantParams]
    blocks: list[BlockRounding] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)

    def add(
        self,
        block: BlockRounding,
        roundings: Mapping[str, LayerRounding],
        steps: Mapping[str, QuantParams],
    ) -> None:
        """Take up what one block has become."""
        self.blocks.append(block)
        self.roundings.update(roundings)
        self.params.update(steps)
        self.settled.update(steps)


def refine_blocks(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    roundings: Mapping[str, LayerRounding],
    samples: Samples,
    run: Run,
) -> Refined:
    """Refine block after block, each against what the refined prefix really feeds it.

    A block whose error on samples that it is not trained on does not fall stays as it was, and
    so does one that cannot run in torch; its record says why. Deterministic for the same inputs.
    """
    config = run.config
    result = Refined(roundings=dict(roundings), params=dict(params))
    quantised = qdq.insert(model, plan, params, roundings, "int8")
    blocks = find_blocks(model, plan.layers)

    def take_up(index: int, outcome: Outcome) -> str:
        block = blocks[index]
        result.add(*outcome)
        _update(quantised, plan, result, block)
        return f"{block[0].node} … {block[-1].node}  {result.blocks[-1].summary}"

    with open_place(config) as place:
        size = min(config.batch_size, MINIBATCH)
        walk = BlockWalk(model, quantised, blocks, samples, size, place)

        def make(index: int) -> Outcome:
            work = _Refinement(model, plan, config, result, blocks[index], walk, index)
            with threads_limited(config.threads), exact(place.device):
                return work.run()

        Units(run, "refine", len(blocks)).walk(walk.advance, make, take_up)
    return result


Outcome = tuple[BlockRounding, dict[str, LayerRounding], dict[str, QuantParams]]


class _Refinement:
    """The work on one block, after the earlier ones in ``result``."""

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        config: QuantConfig,
        result: Refined,
        block: Block,
        walk: BlockWalk,
        index: int,
    ) -> None:
        self._model, self._plan, self._config = model, plan, config
        self._result, self._block = result, block
        self._walk, self._index, self._device = walk, index, walk.device
        every = range(walk.count)
        self._judged = every[JUDGED_EVERY - 1 :: JUDGED_EVERY] or every
        self._trained = [number for number in every if number not in self._judged] or every

    def run(self) -> Outcome:
        """The best of the block as it was, rounded anew, and trained; for ``Refined.add``."""
        names = tuple(layer.node for layer in self._block)
        # In the shadow the two would be parameters of their own, and come apart.
        if len({layer.weight for layer in self._block}) < len(names):
            return BlockRounding(nodes=names, skipped="two layers share a weight"), {}, {}
        try:
            shadow = build_shadow(self._walk.model, *self._walk.names(self._index), self._device)
            given = self._quantised(shadow, self._result.roundings)
            before = self._error(given)
            anew = self._quantised(shadow, self._rounded_anew(shadow))
            best, error = min(((given, before), (anew, self._error(anew))), key=itemgetter(1))
            trained = self._quantised(shadow, {**self._result.roundings, **best.roundings()})
            self._train(trained)
            best, error = min(((best, error), (trained, self._error(trained))), key=itemgetter(1))
        except ModelError as reason:
            return BlockRounding(nodes=names, skipped=str(reason)), {}, {}
        record = BlockRounding(nodes=names, error_before=before, error_after=error)
        return record, best.roundings(), best.steps()

    def _quantised(
        self, shadow: Shadow, roundings: Mapping[str, LayerRounding]
    ) -> QuantisedBlock:
        result = self._result
        return QuantisedBlock(
            shadow, self._block, roundings, result.params, self._plan, result.settled
        )

    def _rounded_anew(self, shadow: Shadow) -> dict[str, LayerRounding]:
        """The layers one by one, as the first time, now that refined blocks lie before them."""
        roundings = dict(self._result.roundings)
        readers = readers_of(self._plan.layers, {n: r.spec.bits for n, r in roundings.items()})
        for number, planned in enumerate(self._block):
            if len(readers[planned.node]) > 1:  # layers in other blocks read the weight, too
                continue
            bits = roundings[planned.node].spec.bits
            layer = open_layer(self._model, planned, self._result.params, bits, self._device)
            inputs = self._layer_inputs(self._quantised(shadow, roundings), planned)
            with torch_threads(layer, self._config.threads), torch.no_grad():
                moments = moments_of(layer, inputs, self._walk.samples, None)
                if moments.finite:
                    rounding = round_layer(layer, moments, self._config, number)
                    roundings[planned.node] = rounding
        return roundings

    def _layer_inputs(
        self, block: QuantisedBlock, layer: LayerPlan
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per batch what a layer reads in the float model, and in the quantised one.

        Padded tokens are NaN in the former, as ``Walk.inputs`` has them.
        """
        for number in range(self._walk.count):
            batch = self._walk.batch(self._index, number)
            plain: dict[str, torch.Tensor] = dict(_tensors(batch.plain))

            def keep(
                computed: str, value: torch.Tensor, plain: dict[str, torch.Tensor] = plain
            ) -> torch.Tensor:
                plain[computed] = value
                return value

            block.shadow(plain.copy(), None, keep)
            seen: dict[str, torch.Tensor] = {}
            block.forward(_tensors(batch.quantised), seen)
            x = plain[layer.x]
            yield self._walk.cleared(x, number) if layer.is_matrix else x, seen[layer.x]

    def _train(self, block: QuantisedBlock) -> None:
        """Adam with cosine decay, on minibatches of stored batches in random order."""
        # On the CPU, whatever the device, so that all devices draw the same.
        generator = torch.Generator().manual_seed(self._config.seed + self._index)
        if not (parameters := block.parameters()):
            return
        adam = torch.optim.Adam(parameters)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
        order: list[int] = []
        for _ in range(STEPS):
            adam.zero_grad()
            taken = 0
            while taken < min(MINIBATCH, self._walk.samples):
                order = order or torch.randperm(len(self._trained), generator=generator).tolist()
                batch = self._walk.batch(self._index, self._trained[order.pop()])
                taken += batch.samples
                loss = _loss(block.forward(_mixed(batch, generator)), batch) * batch.samples
                if not loss.requires_grad:
                    raise ModelError("its outputs have no gradient")
                loss.backward()  # type: ignore[no-untyped-call]
            _drop_undefined(adam)
            adam.step()
            decay.step()

    def _error(self, block: QuantisedBlock) -> float:
        """The loss over samples that are not trained on, with inputs of the quantised prefix."""
        total, samples = 0.0, 0
        with torch.no_grad():
            for batch in (self._walk.batch(self._index, number) for number in self._judged):
                outputs = block.forward(_tensors(batch.quantised))
                total += float(_loss(outputs, batch)) * batch.samples
                samples += batch.samples
        return total / samples


def _tensors(values: Mapping[str, Value]) -> dict[str, torch.Tensor]:
    tensors = {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}
    if foreign := values.keys() - tensors.keys():
        raise ModelError(f"PyTorch has no type for '{min(foreign)}'")
    return tensors


def _mixed(batch: BlockBatch, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Inputs of the quantised prefix, with a random share of elements from the float model."""
    feeds, plain = _tensors(batch.quantised), _tensors(batch.plain)
    for name, quantised in feeds.items():
        if quantised.is_floating_point():
            chosen = torch.rand(quantised.shape, generator=generator) < FLOAT_SHARE
            feeds[name] = torch.where(chosen.to(quantised.device), plain[name], quantised)
    return feeds


def _loss(outputs: Tensors, batch: BlockBatch) -> torch.Tensor:
    """Mean over the outputs of the squared error, each relative to its mean square.

    Else the output with the largest numbers would be all that counts.
    """
    wanted = _tensors(batch.outputs)
    floating = [name for name in wanted if wanted[name].is_floating_point()]
    if not floating:
        raise ModelError("its outputs are integers")
    losses = [_relative(outputs[name].to(wanted[name].device), wanted[name]) for name in floating]
    return torch.stack(losses).mean()


def _drop_undefined(adam: torch.optim.Adam) -> None:
    """Zeros for gradients that are NaN, as those of a row that is masked throughout are."""
    for group in adam.param_groups:
        for leaf in group["params"]:
            if leaf.grad is not None:
                leaf.grad.nan_to_num_(0.0, 0.0, 0.0)


def _relative(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The squared error over the power of ``wanted``, where that is finite."""
    finite = wanted.isfinite()
    if not bool(finite.all()):
        output, wanted = output[finite], wanted[finite]
        return (output - wanted).square().sum() / wanted.square().sum().clamp_min(TINY)
    return (output - wanted).square().mean() / wanted.square().mean().clamp_min(TINY)


def _update(quantised: ir.Model, plan: QuantPlan, result: Refined, block: Block) -> None:
    """Bring the model of the walk to the state of ``result``."""
    for name in result.settled:  # no other scale has changed
        qdq.update_scale(quantised, name, result.params[name])
    for layer in block:
        qdq.update_layer(quantised, layer, result.roundings[layer.node], result.params, plan)
