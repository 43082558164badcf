"""After a poor result: which layers and tensors cost the outputs most, as settings that help.

Each of those that rounding changes most is rounded alone in the float model, and the outputs are
measured. What the finished file loses without one would tell less: the layers behind it have
learned to make up for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnx_attnround import graph
from onnx_attnround.calibrate import Calibration
from onnx_attnround.qdq.arithmetic import dequantize, quantize, range_of, spread
from onnx_attnround.records import (
    Array,
    LayerPlan,
    LayerRounding,
    QuantParams,
    QuantPlan,
    TensorStats,
)
from onnx_attnround.samples import Samples
from onnx_attnround.verify.compare import output_sqnr

TRIED = 10
"""Layers, and as many tensors, that are rounded in turn."""

TOLD = 5
"""The most costly ones, which are named."""

SAMPLES = 6
"""Samples that a trial is measured on."""

Key = Literal["exclude", "layer_bits", "activation_bits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A setting, and the SQNR in dB that is left of the worst output with ``name`` alone rounded.

    ``bits`` is what ``layer_bits`` or ``activation_bits`` should give it, ``None`` to ``exclude``.
    """

    key: Key
    name: str
    bits: int | None
    alone_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The remedies, those of what costs most first.

    ``share`` is theirs of the squared errors that all layers and tensors tried cause alone.
    """

    remedies: tuple[Remedy, ...]
    share: float

    @property
    def block(self) -> str:
        """Lines of a config file in TOML."""
        parts = []
        if excluded := [each for each in self.remedies if each.key == "exclude"]:
            lines = [f"    {_text(each.name)},{_remark(each)}" for each in excluded]
            parts.append("\n".join(["exclude = [", *lines, "]"]))
        for key in ("layer_bits", "activation_bits"):
            if found := [each for each in self.remedies if each.key == key]:
                lines = [f"{_text(each.name)} = {each.bits}{_remark(each)}" for each in found]
                parts.append("\n".join([f"[{key}]", *lines]))
        return "\n\n".join(parts)


def advise(
    simplified: ir.Model,
    plan: QuantPlan,
    ranges: Calibration,
    roundings: Mapping[str, LayerRounding],
    samples: Samples,
    threads: int | None,
) -> Advice | None:
    """What costs the outputs of the ``simplified`` float model most; ``None`` if nothing does.

    Errors as :func:`verify`.
    """
    layers = {layer.node: layer for layer in plan.layers if layer.node in roundings}
    found = []
    for node in _worst(_weight_errors(simplified, layers, roundings)):
        spec, trial = roundings[node].spec, simplified.clone()
        _round_weight(trial, layers[node], roundings[node])
        alone = output_sqnr(simplified, trial, samples, threads, limit=SAMPLES)
        key: Key = "exclude" if spec.bits >= 8 else "layer_bits"
        bits = None if spec.bits >= 8 else 8
        found.append(Remedy(key=key, name=node, bits=bits, alone_db=alone))
    for tensor in _worst(_range_errors(ranges)):
        trial = simplified.clone()
        _round_tensor(trial, tensor, ranges.params[tensor])
        alone = output_sqnr(simplified, trial, samples, threads, limit=SAMPLES)
        name, bits = _as_given(simplified, tensor), ranges.params[tensor].spec.bits
        wider = 8 if bits < 8 else 32
        found.append(Remedy(key="activation_bits", name=name, bits=wider, alone_db=alone))
    costly = _costly(found)
    told: list[Remedy] = []
    floats = 0
    for remedy in costly:
        floats += remedy.key == "exclude"
        if len(told) < TOLD and (remedy.key != "exclude" or 2 * floats <= len(layers)):
            told.append(remedy)  # with most layers in float little is left of the file
    if not told:
        return None
    share = sum(map(_noise, told)) / sum(map(_noise, costly))
    return Advice(remedies=tuple(told), share=share)


def _noise(remedy: Remedy) -> float:
    return float(10 ** (-remedy.alone_db / 10))


def _costly(found: Sequence[Remedy]) -> list[Remedy]:
    """Those that cost anything, the most costly first, each name once."""
    ordered = sorted(found, key=lambda each: each.alone_db)
    once = {(each.key, each.name): each for each in reversed(ordered)}
    return [
        each
        for each in ordered
        if -math.inf < each.alone_db < math.inf and once[each.key, each.name] is each
    ]


def _as_given(model: ir.Model, tensor: str) -> str:
    """The name of a tensor in the model as it was given, where an Identity parts its readers."""
    value = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)[tensor]
    maker = value.producer()
    source = None if maker is None or maker.op_type != "Identity" else maker.inputs[0]
    return tensor if source is None else source.name or tensor


def _nearest(weight: Array, rounding: LayerRounding) -> Array:
    """A weight rounded to nearest with the scales that it has in the file."""
    spec = rounding.spec
    scale, zero = (
        spread(each, weight.shape, spec).astype(np.float64)
        for each in (rounding.scale, rounding.zero_point)
    )
    codes = quantize(weight.astype(np.float64), scale, zero, spec.qmin, spec.qmax)
    rounded: Array = dequantize(codes, scale, zero).astype(weight.dtype)
    return rounded


def _weight_errors(
    simplified: ir.Model,
    layers: Mapping[str, LayerPlan],
    roundings: Mapping[str, LayerRounding],
) -> dict[str, float]:
    """The squared error of each weight, rounded to nearest, relative to its power."""
    found = {}
    for node, layer in layers.items():
        weight = graph.tensor_value(simplified, layer.weight)
        found[node] = _share(_nearest(weight, roundings[node]) - weight, weight)
    return found


def _range_errors(ranges: Calibration) -> dict[str, float]:
    """The squared error that codes make of each tensor that was observed, relative to its power."""
    return {
        name: _range_error(ranges.stats[name], params)
        for name, params in ranges.params.items()
        if name in ranges.stats and not params.spec.dynamic
    }


def _range_error(stats: TensorStats, params: QuantParams) -> float:
    spec, scale, zero = params.spec, float(params.scale), float(params.zero_point)
    if stats.hist is None or stats.edges is None:  # as for values spread evenly
        values, counts = np.linspace(stats.lo, stats.hi, 1001), np.ones(1001)
    else:
        values, counts = (stats.edges[:-1] + stats.edges[1:]) / 2, stats.hist
    got = dequantize(quantize(values, scale, zero, spec.qmin, spec.qmax), scale, zero)
    root = np.sqrt(counts)
    return _share((got - values) * root, values * root)


def _share(error: Array, signal: Array) -> float:
    power = float(np.sum(signal * signal))
    return float(np.sum(error * error)) / power if power else 0.0


def _worst(errors: Mapping[str, float]) -> Iterator[str]:
    """The names of the largest errors, those first."""
    yield from sorted((name for name in errors if errors[name]), key=lambda name: -errors[name])[
        :TRIED
    ]


def _round_weight(model: ir.Model, layer: LayerPlan, rounding: LayerRounding) -> None:
    """Round the weight of one layer, in place, to nearest."""
    node = next(node for node in model.graph if node.name == layer.node)
    weight = graph.tensor_value(model, layer.weight)
    value = ir.Value(
        name=f"{layer.node}/rounded", const_value=ir.tensor(_nearest(weight, rounding))
    )
    model.graph.register_initializer(value)
    node.replace_input_with(1, value)


def _round_tensor(model: ir.Model, tensor: str, params: QuantParams) -> None:
    """Let all readers of a tensor see it rounded, in place.

    By operators of floats, which there are in any opset and for any width.
    """
    value = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)[tensor]
    kind = np.float32 if value.dtype is None else value.dtype.numpy()
    low, high = range_of(params)
    steps: list[tuple[str, float]] = [
        ("Max", low), ("Min", high), ("Div", float(params.scale)), ("Add", 0.5), ("Floor", 0.0),
        ("Mul", float(params.scale)),
    ]  # fmt: skip
    readers, made, nodes = list(value.uses()), value, []
    for op_type, number in steps:
        inputs = [made]
        if op_type != "Floor":
            name = f"{tensor}/{op_type}"
            inputs.append(ir.Value(name=name, const_value=ir.tensor(np.asarray(number, kind))))
            model.graph.register_initializer(inputs[1])
        nodes.append(ir.node(op_type, inputs))
        made = nodes[-1].outputs[0]
    for reader in readers:
        reader.node.replace_input_with(reader.idx, made)
    for index, output in enumerate(model.graph.outputs):
        if output is value:
            made.name, value.name = value.name, f"{tensor}/exact"
            made.type, made.shape = value.type, value.shape
            model.graph.outputs[index] = made
    model.graph.extend(nodes)
    model.graph.sort()


def _text(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)  # strings of JSON are strings of TOML


def _remark(remedy: Remedy) -> str:
    return f"  # {remedy.alone_db:.1f} dB"
