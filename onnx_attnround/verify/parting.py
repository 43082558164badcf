"""Where a quantised file parts from the float model, layer by layer, and why.

Of each layer three things run on the same samples: the layer in the float model, the layer in
the quantised file, and the float layer on what the quantised one reads. What the last two differ
by is the layer's own doing, what the first and the last differ by it has inherited.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from onnx_attnround import graph
from onnx_attnround.errors import ModelError
from onnx_attnround.ops import WEIGHTED_OPS
from onnx_attnround.qdq.arithmetic import dynamically
from onnx_attnround.records import Array
from onnx_attnround.samples import Samples
from onnx_attnround.verify.causes import LayerSums, diagnosed
from onnx_attnround.verify.compare import LAYER_BATCH, LAYER_SAMPLES, batches
from onnx_attnround.verify.pairs import Pair, match
from onnx_attnround.verify.results import LayerPair
from onnx_attnround.verify.runs import Forward, Kind, Models, Outputs, Step, open_one, sample_count
from onnx_attnround.verify.sites import Site, find_sites


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seat:
    """A pair with the one value of each side that stands for the same."""

    pair: Pair
    expected: str
    got: str


def compare_layer_pairs(
    models: Models,
    samples: Samples,
    threads: int | None,
    step: Step = lambda detail, count: None,
) -> tuple[tuple[LayerPair, ...], tuple[str, ...]]:
    """All layers that both models have, over 64 ``samples``, and the names of those left over.

    Errors as :func:`open_pair`.
    """
    (floats, ones), (quantised, others) = (
        find_sites(model, quantised=index == 1) for index, model in enumerate(models)
    )
    pairs = match(ones, others)
    if not pairs:
        return (), tuple(site.node for site in (*ones, *others))
    seats = _seats((floats, quantised), pairs, samples, threads)
    sums = _summed((floats, quantised), seats, samples, threads, step)
    paired = {id(site) for seat in seats for site in (seat.pair.float, seat.pair.quantised)}
    alone = [site.node for site in (*ones, *others) if id(site) not in paired]
    return diagnosed(sums), tuple(dict.fromkeys(alone))


def _seats(
    models: Models, pairs: Sequence[Pair], samples: Samples, threads: int | None
) -> list[_Seat]:
    """What stands for the same on both sides: the values that differ least on the first batch.

    A runtime may have folded into a layer what comes behind it, or not.
    """
    feed = next(batches(samples, LAYER_BATCH, LAYER_BATCH))
    expected = _opened(models[0], _values(pair.float for pair in pairs), "float", threads)(feed)
    others = _values(pair.quantised for pair in pairs)
    got = _opened(models[1], others, "quantised", threads)(feed)
    found = []
    for pair in pairs:
        options = [
            (_relative(expected[one], got[other]), i, j)
            for (i, one), (j, other) in product(
                enumerate(pair.float.ys), enumerate(pair.quantised.ys)
            )
            if expected[one].size == got[other].size
        ]
        if options and expected[pair.float.x].size == got[pair.quantised.x].size:
            _, i, j = min(options)
            seat = _Seat(pair=pair, expected=pair.float.ys[i], got=pair.quantised.ys[j])
            found.append(seat)
    return found


def _summed(
    models: Models, seats: Sequence[_Seat], samples: Samples, threads: int | None, step: Step
) -> list[LayerSums]:
    expected = [name for seat in seats for name in (seat.expected, seat.pair.float.x)]
    got = [name for seat in seats for name in (seat.got, seat.pair.quantised.x)]
    run_float = _opened(models[0], expected, "float", threads)
    run_quantised = _opened(models[1], got, "quantised", threads)
    alone = _layers_alone(models[0], seats, rounded=False, threads=threads)
    nearest = _layers_alone(models[0], seats, rounded=True, threads=threads)
    sums = [LayerSums(seat.pair) for seat in seats]
    for feed in batches(samples, LAYER_BATCH, LAYER_SAMPLES):
        a, b = run_float(feed), run_quantised(feed)
        reads = {_read(seat): _what_is_read(seat.pair, a, b) for seat in seats}
        inherited, rounded = alone({**feed, **reads}), nearest({**feed, **reads})
        for seat, each in zip(seats, sums, strict=True):
            y = a[seat.expected]
            each.add_input(a[seat.pair.float.x], reads[_read(seat)])
            each.add_output(
                y, b[seat.got].reshape(y.shape), inherited[seat.expected], rounded[seat.expected]
            )
        step("layers", sample_count(feed))
    return sums


def _what_is_read(pair: Pair, expected: Outputs, got: Outputs) -> Array:
    """What the quantised layer computes with, in the shape and type of the float model's input."""
    x, like = got[pair.quantised.x], expected[pair.float.x]
    if pair.quantised.dynamic:
        x = dynamically(x)
    result: Array = x.reshape(like.shape).astype(like.dtype)
    return result


def _opened(model: ir.Model, names: Sequence[str], kind: Kind, threads: int | None) -> Forward:
    """A run that gives the values ``names``, those that are fed included."""
    fed = {value.name for value in model.graph.inputs}
    made = list(dict.fromkeys(name for name in names if name not in fed))
    run = open_one(graph.with_outputs(model, made), kind, threads)
    return lambda feed: {**{name: feed[name] for name in names if name in feed}, **run(feed)}


def _layers_alone(
    model: ir.Model, seats: Sequence[_Seat], *, rounded: bool, threads: int | None
) -> Forward:
    """The layers of the float model, each of which reads an input of its own.

    With ``rounded`` weights these are the nearest ones of as many levels as the quantised file has,
    with a scale for each output.
    """
    copy = model.clone()
    nodes = {node.name: node for node in copy.graph}
    for seat in seats:
        node, levels = nodes[seat.pair.float.node], seat.pair.quantised.levels
        x = node.inputs[0]
        kind = ir.DataType.FLOAT if x is None or x.dtype is None else x.dtype
        given = ir.Value(name=_read(seat), type=ir.TensorType(kind))
        node.replace_input_with(0, given)
        copy.graph.inputs.append(given)
        if rounded and levels is not None:
            node.replace_input_with(1, _nearest(copy, node, levels))
    return open_one(graph.with_outputs(copy, [seat.expected for seat in seats]), "float", threads)


def _nearest(model: ir.Model, node: ir.Node, levels: int) -> ir.Value:
    """The weight of ``node`` rounded to codes of up to ``levels``, as a constant of the model."""
    given = node.inputs[1]
    tensor = None if given is None else ir.convenience.get_const_tensor(given)
    if tensor is None:
        raise ModelError(f"the weight of '{node.name}' is no constant; simplify the model")
    weight = tensor.numpy()
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    axis = WEIGHTED_OPS[node.op_type].channel_axis(attributes)
    rest = tuple(each for each in range(weight.ndim) if each != axis)
    widest = np.abs(weight).max(rest, keepdims=True)
    scale = np.where(widest > 0, widest / levels, 1).astype(weight.dtype)
    value = ir.Value(
        name=f"{node.name}/nearest", const_value=ir.tensor(np.rint(weight / scale) * scale)
    )
    model.graph.register_initializer(value)
    return value


def _values(sites: Iterable[Site]) -> list[str]:
    return [name for site in sites for name in (site.x, *site.ys)]


def _read(seat: _Seat) -> str:
    return f"{seat.pair.float.node}/read"


def _relative(expected: Array, got: Array) -> float:
    """The squared error relative to the power, and 1 where there is none."""
    one, other = (np.asarray(each, np.float64).ravel() for each in (expected, got))
    power = float(one @ one)
    return float(np.sum((other - one) ** 2)) / power if power else 1.0
