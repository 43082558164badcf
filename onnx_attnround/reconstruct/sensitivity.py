"""The cost of each width of each layer to the model's outputs, for ``plan/bits.py`` to weigh.

For the allocator ``gram``, and for goals, all widths count (:func:`layer_errors`).

The walk over the float model gives each layer's moments, and with them the error
``N(b)`` of rounding to nearest with ``b`` bits, relative to the variance of the
layer's output. How much of a layer's error reaches the model's outputs is measured:
with that layer alone rounded, to ``PROBE_BITS``, the outputs are off by ``E``, as a
share of their power. Then ``b`` bits cost ``E N(b) / N(PROBE_BITS)``.

Where all layers have one width but for the most sensitive ones, ``E`` of that width is enough,
and no walk is needed (:func:`errors_alone`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run, Units
from onnx_attnround.graph import choices, take_choices, tensor_value, with_outputs
from onnx_attnround.numerics import TINY
from onnx_attnround.qdq.arithmetic import dequantize, spread
from onnx_attnround.reconstruct.layerwise import (
    OpenLayer,
    moments_of,
    open_layer,
    round_layer,
    round_plain,
    torch_threads,
)
from onnx_attnround.reconstruct.walk import walking
from onnx_attnround.records import (
    Array,
    BitAllocation,
    LayerErrors,
    LayerPlan,
    LayerRounding,
    QuantPlan,
    readers_of,
)
from onnx_attnround.rounding.moments import Moments
from onnx_attnround.runtime.device import open_device
from onnx_attnround.runtime.session import open_session, run_on_samples
from onnx_attnround.samples import Feeds, Samples

PROBE_BITS = 4
"""The width that a layer is rounded to while the error of the model's outputs is measured."""

PROBE_SAMPLES = 64
"""The samples, at least, on which it is measured, if there are as many."""

PASSES = 1
"""The runs over all samples that :func:`errors_alone` may take the time of, all layers together."""

LEAST_SAMPLES = 4
"""The samples that it measures each layer on, at least; ``PROBE_SAMPLES`` at most."""


def layer_errors(
    model: ir.Model,
    plan: QuantPlan,
    samples: Samples,
    run: Run,
) -> LayerErrors:
    """The error of the outputs, by node name and each of ``bit_choices``; deterministic.

    Activations stay float. The error of a layer whose inputs are too large to be
    squared is taken to be ``4^-b``. Raises ``CalibrationError`` if the model does not
    run on the samples.
    """
    config, device = run.config, open_device(run.config.device)
    first = {node: group[0] for node, group in readers_of(plan.layers).items()}
    layers = [each for each in plan.layers if first[each.node] is each]  # one reader of a weight
    probe = _Probe(model, plan.layers, samples, config)

    with walking(model, None, layers, samples, config) as walk:

        def make(index: int) -> Mapping[int, float]:
            layer = open_layer(model, layers[index], {}, PROBE_BITS, device)
            with torch_threads(layer, config.threads):
                moments = moments_of(layer, walk.inputs(index), samples.count, None)
                return _costs(layer, moments, probe, config)

        return _of_readers(run, first, layers, walk.advance, make)


def errors_alone(
    model: ir.Model, plan: QuantPlan, samples: Samples, run: Run
) -> LayerErrors:
    """The error of the outputs with each layer alone rounded to nearest, to ``weight_bits``.

    In other respects as :func:`layer_errors`, and so is what it raises.
    """
    config, bits = run.config, run.config.weight_bits
    first = {node: group[0] for node, group in readers_of(plan.layers).items()}
    layers = [each for each in plan.layers if first[each.node] is each]
    widths = dict.fromkeys(first, bits)
    uniform = BitAllocation(bits=widths, coding_length={}, mean_bits=float(bits))
    roundings = round_plain(model, plan, {}, uniform)
    count = min(max(PASSES * samples.count // len(layers), LEAST_SAMPLES), PROBE_SAMPLES)
    parts = samples.split(count)
    probe = _Probe(model, plan.layers, samples if parts is None else parts[1], config)

    def make(index: int) -> Mapping[int, float]:
        return {bits: probe.error(layers[index], roundings[layers[index].node])}

    return _of_readers(run, first, layers, lambda index: None, make)


def _of_readers(
    run: Run,
    first: Mapping[str, LayerPlan],
    layers: Sequence[LayerPlan],
    advance: Callable[[int], None],
    make: Callable[[int], Mapping[int, float]],
) -> LayerErrors:
    """What ``make`` finds of ``layers``, for all nodes that read their weights.

    ``first`` has the layer that stands for each node.
    """
    errors: dict[str, Mapping[int, float]] = {}

    def take_up(index: int, costs: Mapping[int, float]) -> str:
        errors[layers[index].node] = costs
        return layers[index].node

    Units(run, "measure", len(layers)).walk(advance, make, take_up)
    return {node: errors[layer.node] for node, layer in first.items()}


def _costs(
    layer: OpenLayer, moments: Moments, probe: _Probe, config: QuantConfig
) -> dict[int, float]:
    """The error of the outputs by the bits of one layer."""
    if not moments.finite:
        return {bits: 4.0**-bits for bits in config.bit_choices}
    nearest = config.model_copy(update={"method": "nearest"})
    roundings = {
        bits: round_layer(
            replace(layer, spec=layer.plan.spec_of(bits)), moments, nearest, index=0
        )
        for bits in {*config.bit_choices, PROBE_BITS}
    }
    usual = roundings[PROBE_BITS]
    share = probe.error(layer.plan, usual) / max(usual.mse_final, TINY)
    return {bits: share * roundings[bits].mse_final for bits in config.bit_choices}


class _Probe:
    """The float model on the choices that it makes, with one layer's weight and bias replaced."""

    def __init__(
        self, model: ir.Model, layers: Sequence[LayerPlan], samples: Samples, config: QuantConfig
    ) -> None:
        named = {name for layer in layers for name in (layer.weight, layer.bias) if name}
        self._shapes = {name: tensor_value(model, name).shape for name in sorted(named)}
        copy = _overridable(model, self._shapes)
        taken = take_choices(copy, model, choices(model.graph, {each.node for each in layers}))
        self._session = open_session(copy, threads=config.threads, device=config.device)
        self._names = [o.name for o in self._session.get_outputs() if "float" in o.type]
        feeds = _first(samples, config.batch_size)
        self._feeds = list(_with_choices(model, taken, feeds, config))
        self._expected = [self._run(feeds) for feeds in self._feeds]

    def error(self, layer: LayerPlan, rounding: LayerRounding) -> float:
        """Error over power of each float output, summed; 0 if none can be compared."""
        replaced = self._replaced(layer, rounding)
        sums = np.zeros((len(self._names), 2))
        for feeds, expected in zip(self._feeds, self._expected, strict=True):
            got = self._run({**feeds, **replaced})
            sums += [_powers(*pair) for pair in zip(got, expected, strict=True)]
        return float((sums[:, 0] / np.maximum(sums[:, 1], TINY)).sum())

    def _run(self, feeds: Feeds) -> list[Array]:
        return run_on_samples(self._session, self._names, feeds)

    def _replaced(self, layer: LayerPlan, rounding: LayerRounding) -> dict[str, Array]:
        """The weight as the codes have it, and the corrected bias where the layer has one."""
        codes, spec = rounding.codes.astype(np.float32), rounding.spec
        scale, zero = (
            spread(values, codes.shape, spec) for values in (rounding.scale, rounding.zero_point)
        )
        replaced = {layer.weight: dequantize(codes, scale, zero).astype(np.float32)}
        bias = rounding.bias
        if layer.bias and bias is not None and bias.size == np.prod(self._shapes[layer.bias]):
            replaced[layer.bias] = bias.reshape(self._shapes[layer.bias])
        return replaced


def _with_choices(
    model: ir.Model, taken: Mapping[str, str], feeds: Iterator[Feeds], config: QuantConfig
) -> Iterator[Feeds]:
    """The feeds, with what ``model`` chooses or draws on them for the inputs ``taken``."""
    if not taken:
        yield from feeds
        return
    sources = list(taken.values())
    session = open_session(
        with_outputs(model, sources), threads=config.threads, device=config.device
    )
    for feed in feeds:
        yield {**feed, **dict(zip(taken, run_on_samples(session, sources, feed), strict=True))}


def _overridable(model: ir.Model, names: Mapping[str, object]) -> ir.Model:
    """A copy in which these constants are the defaults of inputs.

    So one session serves the probes of all layers.
    """
    result = model.clone()
    for name in names:
        value = result.graph.initializers[name]
        if not value.is_graph_input():
            result.graph.inputs.append(value)
    return result


def _first(samples: Samples, batch_size: int) -> Iterator[Feeds]:
    """Batches of at least ``PROBE_SAMPLES`` samples in all, or of all there are."""
    seen = 0
    for feeds in samples.batches(min(batch_size, PROBE_SAMPLES)):
        yield feeds
        seen += max((len(values) for values in feeds.values() if values.ndim), default=1)
        if seen >= PROBE_SAMPLES:
            return


def _powers(got: Array, expected: Array) -> tuple[float, float]:
    """Sums of squares of the error and of what is expected; 0 where the two do not compare."""
    if got.shape != expected.shape:
        return 0.0, 0.0
    comparable = np.isfinite(got) & np.isfinite(expected)
    wanted = expected[comparable].astype(np.float64)
    error = got[comparable] - wanted
    return float(error @ error), float(wanted @ wanted)
