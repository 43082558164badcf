"""Some activations stay float: those that cost most of the accuracy, and little time in float.

The errors of single tensors nearly add up at the outputs, and a few tensors often cause most
of them: the first ones of a detector on photographs, on which all else builds, or what a branch
of its head reads. So each tensor is rounded alone, and those are taken one after the other that
save most of the error for the work that layers around them have in float. How many of them, is
judged on samples that they were not chosen on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_attnround.calibrate.output_error import NEGLIGIBLE, RoundedModel
from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import tensor_value, with_outputs
from onnx_attnround.ops import count_macs
from onnx_attnround.records import Array, LayerPlan, QuantParams, QuantPlan
from onnx_attnround.runtime.session import open_session, run_on_samples
from onnx_attnround.samples import Samples

ACCURATE = 1e-3
"""Error of each output below which nothing needs to be done: 30 dB."""

SHARE = 0.15
"""Of the work of all layers, at most so much is left to those around tensors in float, ..."""

POOR = -20.0
"""... unless the error at the outputs is still above this, in dB, ..."""

SHARE_OF_POOR = 0.35
"""... and then so much."""

LEAST_DB = 0.5
"""What must be taken off the error, in dB, to leave anything in float, ..."""

WORTH_DB = 0.2
"""... and what for each per cent of the work."""

ELEMENT = 16
"""Multiplications that take as long as to read or to write one element."""

PROBED = 12
"""Samples that errors of single tensors are measured on."""

TOGETHER = 8
"""Tensors that are rounded together first, neighbours, ..."""

GROUPS = 4
"""... and the groups of them, those that matter most, of which each is rounded by itself."""

TRIALS = (0.25, 0.5, 1.0)
"""Shares of the largest choice that are judged beside it."""

Part = tuple[str, ...]
"""One tensor, or neighbours that are taken together."""

Errors = Sequence[Array]
"""Of each output the errors of samples, as ``RoundedModel.errors`` has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatTensors:
    """Tensors that stay float, and what moves their elements.

    ``rounded_db`` and ``float_db`` are the error of the outputs with and without them rounded,
    ``share`` is that of the work which is left to float layers.
    """

    tensors: tuple[str, ...] = ()
    rounded_db: float = math.nan
    float_db: float = math.nan
    share: float = 0.0

    @property
    def note(self) -> str:
        """What was done, what it gains and costs, in a sentence."""
        named = ", ".join(f"'{name}'" for name in self.tensors[:3])
        more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
        return (
            f"activations left in float, with {self.share:.1%} of the work of all layers: "
            f"{named}{more}; rounded, they raise the error of the outputs from "
            f"{self.float_db:.1f} to {self.rounded_db:.1f} dB; `float_tensors` = never rounds them "
            "all the same"
        )


def find_float_tensors(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    samples: Samples,
    config: QuantConfig,
) -> FloatTensors:
    """The tensors that are worth the work of their layers in float, if any are.

    They are worth most where what they take off the error, in dB, less ``WORTH_DB`` for each per
    cent of the work is largest. Raises ``CalibrationError`` where ONNX Runtime fails on the
    samples.
    """
    params = plan.own(params)  # what moves codes is float where its source is
    parted = samples.split(min(PROBED, samples.count // 2))
    if parted is None:
        return FloatTensors()
    judged = RoundedModel(model, list(params), parted[0], config)
    found = judged.errors(params)
    whole = _decibels(found)
    if max((float(errors.mean()) for errors in found), default=0.0) < ACCURATE:
        return FloatTensors()
    work = _Work.of(model, plan, params, samples, config)
    probe = RoundedModel(model, list(params), parted[1], config)
    best, most = FloatTensors(rounded_db=whole, float_db=whole), LEAST_DB
    for chosen in _trials(_greedy(probe, params, work)):
        left = {name: params[name] for name in params.keys() - set(chosen)}
        error, share = _decibels(judged.errors(left)), work.share(chosen)
        worth = whole - error - WORTH_DB * 100 * share
        if worth >= most:
            ordered = tuple(name for name in plan.activations if _root(name, plan) in chosen)
            best, most = (
                FloatTensors(tensors=ordered, rounded_db=whole, float_db=error, share=share),
                worth,
            )
    return best


def by_worth(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    samples: Samples,
    config: QuantConfig,
) -> list[FloatTensors]:
    """Ever more tensors in float, from none to all of them: first what saves most for its work.

    Tensors that matter little come in groups. ``float_db`` is foretold by what the single ones
    and the groups cause, which adds up. Raises as :func:`find_float_tensors`.
    """
    params = plan.own(params)
    work = _Work.of(model, plan, params, samples, config)
    parted = samples.split(min(PROBED, samples.count - 1))
    probe = RoundedModel(model, list(params), samples if parted is None else parted[1], config)
    whole = probe.errors(params)
    rounded = _decibels(whole)
    single, groups = _parts(probe, params, whole, list(params))
    waiting = {**single, **groups}
    left, chosen = _all_of(whole, waiting), list[str]()
    found = [FloatTensors(rounded_db=rounded, float_db=_decibels(left))]
    while waiting:
        part, _ = _best(left, waiting, work, chosen)
        left = _less(left, waiting.pop(part))
        chosen += part
        found.append(
            FloatTensors(
                tensors=tuple(chosen),
                rounded_db=rounded,
                float_db=_decibels(left) if waiting else -math.inf,
                share=work.share(chosen),
            )
        )
    return found


def _greedy(probe: RoundedModel, params: Mapping[str, QuantParams], work: _Work) -> Iterator[str]:
    """Tensors, the one first that saves most for its work, while that is worth it."""
    whole = probe.errors(params)
    waiting, _ = _parts(
        probe, params, whole, [n for n in params if work.share([n]) <= SHARE_OF_POOR]
    )
    left, chosen = _all_of(whole, waiting), list[str]()
    while waiting:
        part, rate = _best(left, waiting, work, chosen)
        if rate < WORTH_DB * 100:
            return
        error = waiting.pop(part)
        most = SHARE_OF_POOR if _decibels(left) > POOR else SHARE
        if work.share([*chosen, *part]) <= most:
            left = _less(left, error)
            chosen += part
            yield from part


def _best(
    left: Errors, waiting: Mapping[Part, Errors], work: _Work, chosen: Sequence[str]
) -> tuple[Part, float]:
    """What saves most of the errors ``left`` for its work, and how many dB for all the work."""
    rates = {
        part: _saved(left, error) / work.added(part, chosen) for part, error in waiting.items()
    }
    part = max(rates, key=lambda each: rates[each])
    return part, rates[part]


def _parts(
    probe: RoundedModel, params: Mapping[str, QuantParams], whole: Errors, names: Sequence[str]
) -> tuple[dict[Part, Errors], dict[Part, Errors]]:
    """The errors of single tensors, of those that may be worth it, and of groups of all others.

    Neighbours are rounded together first: most matter so little that one run tells it of all.
    """
    starts = range(0, len(names), TOGETHER)
    groups = [tuple(names[start : start + TOGETHER]) for start in starts]
    found = {
        group: probe.only(group).errors({name: params[name] for name in group}) for group in groups
    }
    saved = [_saved(whole, found[group]) for group in groups]
    apart = [groups[at] for at in sorted(np.argsort(saved)[::-1][:GROUPS])]
    single: dict[Part, Errors] = {}
    for group in apart:
        rounded = probe.only(group)
        single |= {(name,): rounded.errors({name: params[name]}) for name in group}
    return single, {group: error for group, error in found.items() if group not in apart}


def _all_of(whole: Errors, parts: Mapping[Part, Errors]) -> Errors:
    """The errors of all: what the whole has more than the sum of ``parts`` is of what is none."""
    return [
        np.maximum(of_all, sum(of_each)) if of_each else of_all
        for of_all, *of_each in zip(whole, *parts.values(), strict=True)
    ]


def _less(errors: Errors, others: Errors) -> Errors:
    """What is left of the errors of each output."""
    return [np.maximum(one - other, 0.0) for one, other in zip(errors, others, strict=True)]


def _saved(whole: Errors, part: Errors) -> float:
    """What the whole has less in dB without a part."""
    return _decibels(whole) - _decibels(_less(whole, part))


def _decibels(errors: Errors) -> float:
    """The mean over outputs of that of samples; by the logarithm no single one decides."""
    means = [float(np.log10(NEGLIGIBLE + each).mean()) for each in errors]
    return 10 * float(np.mean(means)) if means else -math.inf


def _trials(order: Iterator[str]) -> Iterator[Sequence[str]]:
    """The first of the tensors, few and many, each choice once."""
    names = list(order)
    for count in sorted({math.ceil(share * len(names)) for share in TRIALS} - {0}):
        yield names[:count]


@dataclass(frozen=True, slots=True)
class _Work:
    """What layers and tensors take in float: multiplications, and elements that are moved.

    ``layers`` is the work of each layer by its node, ``around`` the layers that read or write
    a tensor, ``size`` the elements of a tensor, as work.
    """

    layers: Mapping[str, float]
    around: Mapping[str, frozenset[str]]
    size: Mapping[str, float]
    total: float

    @classmethod
    def of(
        cls,
        model: ir.Model,
        plan: QuantPlan,
        names: Collection[str],
        samples: Samples,
        config: QuantConfig,
    ) -> _Work:
        """From the shapes that one sample has."""
        ends = {name for layer in plan.layers for name in (layer.x, layer.y)}
        shapes = _shapes(model, sorted(ends | set(names)), samples, config)
        sizes = {name: ELEMENT * float(np.prod(shape)) for name, shape in shapes.items()}
        layers = {
            layer.node: _macs(layer, shapes) + sizes[layer.x] + sizes[layer.y]
            for layer in plan.layers
        }
        around: dict[str, set[str]] = {name: set() for name in names}
        for layer in plan.layers:
            for name in (_root(layer.x, plan), _root(_written(model, layer, plan), plan)):
                around.get(name, set()).add(layer.node)
        found = {name: frozenset(nodes) for name, nodes in around.items()}
        return cls(layers, found, {name: sizes[name] for name in names}, sum(layers.values()))

    def share(self, names: Sequence[str]) -> float:
        """Of the work of all layers, what is done in float if these tensors are."""
        nodes = frozenset[str]().union(*(self.around[name] for name in names))
        work = sum(self.layers[node] for node in nodes) + sum(self.size[name] for name in names)
        return work / max(self.total, 1.0)

    def added(self, more: Part, names: Sequence[str]) -> float:
        """What some more tensors add to the share of others."""
        return self.share([*names, *more]) - self.share(names)


def _root(name: str, plan: QuantPlan) -> str:
    """The tensor whose codes are moved to make this one."""
    while name in plan.same_range:
        name = plan.same_range[name]
    return name


def _written(model: ir.Model, layer: LayerPlan, plan: QuantPlan) -> str:
    """The tensor of codes that a layer makes: its output, or that of an activation behind it."""
    if layer.y in plan.activations:
        return layer.y
    readers = [node for node in model.graph if layer.y in (v.name for v in node.inputs if v)]
    behind = [value.name or "" for node in readers for value in node.outputs[:1]]
    return behind[0] if len(behind) == 1 else layer.y


def _macs(layer: LayerPlan, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiplications of one sample."""
    ends = shapes[layer.x], shapes[layer.y]
    return count_macs(layer.op_type, layer.attributes, layer.weight_shape, *ends) or 0


def _shapes(
    model: ir.Model, names: Sequence[str], samples: Samples, config: QuantConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors have of one sample."""
    computed = {value.name for node in model.graph for value in node.outputs}
    asked = [name for name in names if name in computed]
    session = open_session(with_outputs(model, asked), threads=config.threads, device=config.device)
    given = {value.name for value in session.get_inputs()}
    feeds = next(samples.batches(1))
    values = run_on_samples(session, asked, {name: feeds[name] for name in given})
    shapes = {name: values.shape for name, values in feeds.items()}
    shapes |= {name: value.shape for name, value in zip(asked, values, strict=True)}
    constants = model.graph.initializers
    return shapes | {name: tensor_value(model, name).shape for name in names if name in constants}
