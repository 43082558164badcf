"""The first activations of a network stay float where they cost most of its accuracy.

All layers build on what the first ones get wrong, and these compute little: in detectors and
text finders on photographs, the tensors of the stem often cause most of the error at the
outputs, with a few per cent of the multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_attnround.calibrate.output_error import RoundedModel
from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import with_outputs
from onnx_attnround.ops import count_macs
from onnx_attnround.records import QuantParams, QuantPlan
from onnx_attnround.runtime.session import open_session, run_on_samples
from onnx_attnround.samples import Samples

ACCURATE_DB = -30.0
"""The error at the outputs, in dB of their power, below which nothing needs to be done."""

WORTH_DB = 3.0
"""The dB that a stem in float must take off the error: half of its power."""

SHARE = 0.1
"""The share of the multiplications that a stem in float may hold at most."""

LEAST = 0.9
"""The shortest stem is taken that has this share of the best stem's gain, both in dB."""

_DB = 10 / math.log(10)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatStem:
    """Tensors that stay float, and the error of the outputs in dB with and without them rounded."""

    tensors: tuple[str, ...] = ()
    rounded_db: float = math.nan
    float_db: float = math.nan

    @property
    def note(self) -> str:
        """A sentence on the tensors that stay float, and on what that gains."""
        first, last = self.tensors[0], self.tensors[-1]
        return (
            f"the first {len(self.tensors)} activations, '{first}' to '{last}', stay float: "
            f"rounded, they raise the error of the outputs from {self.float_db:.1f} to "
            f"{self.rounded_db:.1f} dB; `float_stem` = never rounds them all the same"
        )


def find_float_stem(
    model: ir.Model,
    plan: QuantPlan,
    params: Mapping[str, QuantParams],
    samples: Samples,
    config: QuantConfig,
) -> FloatStem:
    """The shortest stem that is worth its time in float, if any is.

    Raises ``CalibrationError`` where ONNX Runtime fails on the samples.
    """
    # What only moves codes has the grid of its source, and is float where that is.
    params = {name: found for name, found in params.items() if name not in plan.same_range}
    rounded = RoundedModel(model, list(params), samples, config)
    whole = _DB * rounded.error(params)
    if whole < ACCURATE_DB:
        return FloatStem()
    stems = list(_stems(model, plan, params.keys(), samples, config))
    if not stems:
        return FloatStem()
    errors = [
        _DB * rounded.error({name: params[name] for name in params.keys() - set(stem)})
        for stem in stems
    ]
    gain = whole - min(errors)
    if gain < WORTH_DB:
        return FloatStem()
    stem, error = next(
        (stem, error)
        for stem, error in zip(stems, errors, strict=True)
        if whole - error >= LEAST * gain
    )
    return FloatStem(tensors=tuple(stem), rounded_db=whole, float_db=error)


def _stems(
    model: ir.Model,
    plan: QuantPlan,
    names: Collection[str],
    samples: Samples,
    config: QuantConfig,
) -> Iterator[Sequence[str]]:
    """The first tensors in the order of the graph, up to each layer that ``SHARE`` allows."""
    place = {value.name: at for at, node in enumerate(model.graph, 1) for value in node.outputs}
    order = sorted(names, key=lambda name: (place.get(name, 0), name))
    macs = _macs(model, plan, samples, config)
    total, spent = sum(macs.values()), 0
    readers: dict[str, int] = {}
    for layer in plan.layers:
        root = layer.x
        while root in plan.same_range:
            root = plan.same_range[root]
        readers[root] = readers.get(root, 0) + macs[layer.node]
    for end, name in enumerate(order, 1):
        spent += readers.get(name, 0)
        if spent > SHARE * total:
            return
        # Tensors up to the input of the next layer come along: in float they cost no layer.
        following = order[end : end + 1]
        if not following or readers.get(following[0], 0):
            yield order[:end]


def _macs(
    model: ir.Model, plan: QuantPlan, samples: Samples, config: QuantConfig
) -> dict[str, int]:
    """Multiplications of each layer, by node name, from the shapes that one sample has."""
    names = sorted({name for layer in plan.layers for name in (layer.x, layer.y)})
    computed = {value.name for node in model.graph for value in node.outputs}
    asked = [name for name in names if name in computed]
    session = open_session(with_outputs(model, asked), threads=config.threads, device=config.device)
    given = {value.name for value in session.get_inputs()}
    feeds = next(samples.batches(1))
    values = run_on_samples(session, asked, {name: feeds[name] for name in given})
    shapes = {name: values.shape for name, values in feeds.items()}
    shapes |= {name: value.shape for name, value in zip(asked, values, strict=True)}
    return {
        layer.node: count_macs(
            layer.op_type,
            layer.attributes,
            layer.weight_shape,
            shapes[layer.x],
            shapes[layer.y],
        )
        or 0
        for layer in plan.layers
    }
