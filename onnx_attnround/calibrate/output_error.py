"""The error at the model's outputs that ranges of activations cause, slice by slice.

A range that is best for its own tensor may be bad for the model: the rare large values that
it cuts off are what a detector's scores are made of. So the float model is run with its
activations rounded, weights as they are, and its outputs are compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.calibrate.output_slices import Compared, Slices
from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import outputs_of_shares, raise_opset
from onnx_attnround.numerics import SURE
from onnx_attnround.qdq.arithmetic import params_from_range
from onnx_attnround.records import Array, QuantParams
from onnx_attnround.runtime.session import open_session, run_on_samples
from onnx_attnround.samples import Feeds, Samples

JUDGED_SAMPLES = 64
"""The most calibration samples that ranges are judged on, spread over all of them."""

JUDGED_BYTES = 64 << 20
"""The most bytes of inputs and outputs that ranges are judged on: of large ones fewer samples."""

BATCH = 8
"""The most samples of a run."""

CLIP_OPSET = 13
"""The opset in which Clip and Round are written here."""

NEGLIGIBLE = 1e-6
"""An error of this share of the power is as good as none: 60 dB."""

Levels = tuple[float, float, float]
"""Scale, and the lowest and highest level in steps from zero."""


WIDTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Candidates for ranges: how far they go from what an observer finds to the extrema."""

LEAST_JUDGED = 8
"""The samples that a candidate is judged on at least, before its standard error counts."""

WORTH = 0.05
"""What a candidate must be able to take off the logarithm of the error to be judged further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRanges:
    """The parameters of tensors by name, and what they cost.

    ``error`` is the mean error of the samples at the output that it is largest of, as
    :meth:`RoundedModel.errors` has it; 0 without an output of floats.
    """

    params: dict[str, QuantParams]
    error: float


def choose_ranges(
    model: ir.Model,
    observed: Mapping[str, QuantParams],
    extrema: Mapping[str, QuantParams],
    samples: Samples,
    config: QuantConfig,
) -> ChosenRanges:
    """The parameters of all tensors whose ranges cause the least error at the outputs.

    A range lies between the ``observed`` one and the extrema, geometrically; how far, is one
    choice for the model: of each tensor by itself, few samples tell too little. Ranges that
    lose fewer extremes of the outputs come first, then those of less error.
    Raises ``CalibrationError`` where ONNX Runtime fails on the samples.
    """
    candidates = [
        {name: _between(params, extrema[name], width) for name, params in observed.items()}
        for width in WIDTHS
    ]
    best, found = RoundedModel(model, list(observed), samples, config).best(candidates)
    return ChosenRanges(params=candidates[best], error=found.largest)


def _between(inner: QuantParams, outer: QuantParams, width: float) -> QuantParams:
    """The parameters of a range between two others; ``width`` 0 is the first."""
    ends = zip(_range(inner), _range(outer), strict=True)
    low, high = (
        math.copysign(abs(a) ** (1 - width) * abs(b) ** width, b) if a and b else max(a, b, key=abs)
        for a, b in ends
    )
    return params_from_range(inner.spec, low, high)


def _range(params: QuantParams) -> tuple[float, float]:
    scale, low, high = grid_of(params)
    return scale * low, scale * high


def grid_of(params: QuantParams) -> Levels:
    """The levels that codes of ``params`` stand for."""
    zero, spec = float(params.zero_point), params.spec
    return float(params.scale), spec.qmin - zero, spec.qmax - zero


class RoundedModel:
    """The float model, whose activations are rounded to the grids of each run.

    ``names`` are the tensors that a run may round, which takes time also where it does not;
    ``dynamic`` are always rounded, over the range that they have in each run. Raises
    ``CalibrationError`` where ONNX Runtime fails on the ``samples``.
    """

    def __init__(
        self,
        model: ir.Model,
        names: Sequence[str],
        samples: Samples,
        config: QuantConfig,
        *,
        dynamic: Collection[str] = (),
    ) -> None:
        self._model, self._config, self._dynamic = model, config, dynamic
        plain = open_session(model, threads=config.threads, device=config.device)
        self._outputs = [o.name for o in plain.get_outputs() if "float" in o.type]
        self._feeds: list[Feeds] = []
        expected: list[list[Array]] = []
        for feeds in _judged(samples, min(config.batch_size, BATCH)):
            self._feeds.append(feeds)
            expected.append(self._run(plain, feeds))
            held = (*chain(*expected), *chain(*(each.values() for each in self._feeds)))
            if sum(values.nbytes for values in held) > JUDGED_BYTES:
                break
        del plain  # before another session takes as much memory
        shares = outputs_of_shares(model)
        found = dict(zip(self._outputs, zip(*expected, strict=True), strict=True))
        self._outputs = [name for name in found if any(values.size for values in found[name])]
        self._slices = [Slices(found[name], one_kind=name in shares) for name in self._outputs]
        self._round(names)

    def only(self, names: Sequence[str]) -> RoundedModel:
        """The same on the same samples, of which a run may round these tensors alone."""
        result = copy(self)
        result._round(names)
        return result

    def _round(self, names: Sequence[str]) -> None:
        self.names = [name for name in names if name not in self._model.graph.initializers]
        rounded = _with_dynamic_ranges(_with_grids(self._model, self.names), self._dynamic)
        threads, device = self._config.threads, self._config.device
        self._session = open_session(rounded, threads=threads, device=device)

    def best(self, candidates: Sequence[Mapping[str, QuantParams]]) -> tuple[int, Judged]:
        """The place of the best of ``candidates``, and what was found of it on all samples.

        They are run side by side, batch after batch, and what is surely not better than
        another, or hardly, is given up: to run them all takes the time.
        """
        judged = [Judged(self._table(params), len(self._slices)) for params in candidates]
        order = self._order
        running = judged
        for batch in order:
            for each in running:
                self._judge(each, batch)
            first = min(running, key=lambda each: each.rank)
            running = [each for each in running if each is first or each.may_beat(first)]
        # What was given up for its error may yet be the one that loses no extreme.
        again = [each for each in judged if each not in running and each.lost < first.lost]
        for each in again:
            for batch in order[each.batches :]:
                self._judge(each, batch)
        first = min((*running, *again), key=lambda each: each.rank)
        return judged.index(first), first

    def errors(self, params: Mapping[str, QuantParams]) -> list[Array]:
        """The error of each sample, for each float output.

        Tensors that are not in ``params`` stay float.

        It is the mean over the slices of an output, along each axis of moderate length, of error
        power over the mean power of slices of one kind; half of it weighted by the square of
        what is expected, so that the few large values are not lost among the many small.
        """
        return self.best([params])[1].errors

    def error(self, params: Mapping[str, QuantParams]) -> float:
        """The error of all outputs, as :class:`Judged` has it."""
        return self.best([params])[1].rank[1]

    @property
    def _order(self) -> list[int]:
        """The batches, those first that weigh most."""
        batches = range(len(self._feeds))
        weights = [sum(each.weights[at].sum() for each in self._slices) for at in batches]
        return [int(at) for at in np.argsort(weights, kind="stable")[::-1]]

    def _judge(self, judged: Judged, batch: int) -> None:
        """Run what is judged on one more batch."""
        feeds = self._feeds[batch]
        parts = zip(self._slices, self.outputs({**feeds, **judged.grids}), strict=True)
        rows = next((len(values) for values in feeds.values() if values.ndim), 1)
        judged.add([slices.compare(batch, values) for slices, values in parts], rows)

    def outputs(self, feeds: Feeds) -> list[Array]:
        """The float outputs, with the grids among the ``feeds``."""
        return self._run(self._session, feeds)

    def _run(self, session: ort.InferenceSession, feeds: Feeds) -> list[Array]:
        return run_on_samples(session, self._outputs, feeds) if self._outputs else []

    def _table(self, params: Mapping[str, QuantParams]) -> dict[str, Array]:
        free = (0.0, 0.0, 0.0)  # of no step: the tensor is taken as it is
        rows = [grid_of(params[name]) if name in params else free for name in self.names]
        columns = np.asarray(rows, np.float32).reshape(-1, 3).T
        return dict(zip(_GRIDS, map(np.ascontiguousarray, columns), strict=True))


class Judged:
    """What rounding to one set of grids does to the outputs, over the batches so far.

    ``grids`` are fed to the model, ``lost`` is how many extremes of the outputs are lost.
    """

    def __init__(self, grids: Mapping[str, Array], outputs: int) -> None:
        self.grids = grids
        self.batches = self.samples = self.lost = 0
        self._errors: list[list[Array]] = [[] for _ in range(outputs)]
        self._weights: list[list[Array]] = [[] for _ in range(outputs)]

    def add(self, found: Sequence[Compared], samples: int) -> None:
        """Take in what was found of each output, of one batch of ``samples``."""
        self.batches, self.samples = self.batches + 1, self.samples + samples
        for errors, weights, each in zip(self._errors, self._weights, found, strict=True):
            errors.append(each.errors)
            weights.append(each.weights)
            self.lost += each.lost

    @property
    def errors(self) -> list[Array]:
        """The errors of the samples, for each output, as :meth:`RoundedModel.errors` has them."""
        return [np.concatenate(errors) for errors in self._errors]

    @property
    def largest(self) -> float:
        """The mean error of the samples at the output that it is largest of."""
        return max((float(errors.mean()) for errors in self.errors), default=0.0)

    @property
    def rank(self) -> tuple[int, float]:
        """How many extremes are lost, and the error; less is better.

        The error is the mean of the logarithms (base e) of those of samples and outputs, so that
        no single hard sample decides, weighted by what they have of the signal.
        """
        logs, weights = self._logs
        return self.lost, float(np.average(logs, weights=weights)) if logs.size else 0.0

    def may_beat(self, other: Judged) -> bool:
        """Whether the error may be less by ``WORTH`` on more samples, compared one by one."""
        logs, weights = self._logs
        less = other._logs[0] - logs
        if self.samples < LEAST_JUDGED or not less.size:
            return True
        mean = float(np.average(less, weights=weights))
        variance = float(np.average(np.square(less - mean), weights=weights))
        counted = self.samples * weights.mean() ** 2 / np.square(weights).mean()
        return mean + SURE * math.sqrt(variance / counted) >= WORTH

    @property
    def _logs(self) -> tuple[Array, Array]:
        """The logarithms of the errors of all outputs in a row, and their weights."""
        if not self._errors:
            return np.zeros(0), np.zeros(0)
        errors, weights = (
            np.concatenate([*chain(*each)]) for each in (self._errors, self._weights)
        )
        return np.log(NEGLIGIBLE + errors), weights if weights.any() else np.ones_like(weights)


_GRIDS = ("attnround/scale", "attnround/low", "attnround/high")


def _judged(samples: Samples, batch_size: int) -> Iterator[Feeds]:
    """Batches of some samples, spread over all of them."""
    parted = samples.split(JUDGED_SAMPLES)
    return (samples if parted is None else parted[1]).batches(batch_size)


def _with_grids(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy that rounds each named tensor for all its readers, to grids that are fed to it.

    So one session serves all candidates.
    """
    result = raise_opset(model.clone(), max(model.opset_imports.get("", 0), CLIP_OPSET))
    graph = result.graph
    tables = [
        ir.Value(name=name, shape=ir.Shape([len(names)]), type=ir.TensorType(ir.DataType.FLOAT))
        for name in _GRIDS
    ]
    graph.inputs.extend(tables)
    values = {value.name: value for node in graph for value in node.outputs}
    values.update((value.name, value) for value in graph.inputs)
    for index, name in enumerate(names):
        raw = values[name]
        readers = [(usage.node, usage.idx) for usage in raw.uses()]
        at = ir.Value(
            name=f"attnround/index_{index}",
            shape=ir.Shape([]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(np.asarray(index, np.int64)),
        )
        graph.register_initializer(at)
        picked = [ir.node("Gather", [table, at]) for table in tables]
        scale, low, high = (node.outputs[0] for node in picked)
        steps = ir.node("Div", [raw, scale])
        whole = ir.node("Round", [steps.outputs[0]])
        bounded = ir.node("Clip", [whole.outputs[0], low, high])
        restored = ir.node("Mul", [bounded.outputs[0], scale])
        is_rounded = ir.node("Cast", [scale], {"to": int(ir.DataType.BOOL)})
        taken = ir.node("Where", [is_rounded.outputs[0], restored.outputs[0], raw])
        added = (*picked, steps, whole, bounded, restored, is_rounded, taken)
        for number, node in enumerate(added):
            node.name = node.outputs[0].name = f"attnround/{index}_{number}"
            graph.append(node)
        for node, place in readers:
            node.replace_input_with(place, taken.outputs[0])
    graph.sort()
    return result


def _with_dynamic_ranges(model: ir.Model, names: Collection[str]) -> ir.Model:
    """``model``, each named tensor rounded over its range in each run for all readers; in place."""
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    for index, name in enumerate(names):
        raw = values[name]
        readers = [(usage.node, usage.idx) for usage in raw.uses()]
        codes = ir.node("DynamicQuantizeLinear", [raw], num_outputs=3)
        rounded = ir.node("DequantizeLinear", codes.outputs)
        for number, node in enumerate((codes, rounded)):
            node.name = f"attnround/dynamic_{index}_{number}"
            for end, value in enumerate(node.outputs):
                value.name = f"{node.name}_{end}"
            model.graph.append(node)
        for reader, place in readers:
            reader.replace_input_with(place, rounded.outputs[0])
    model.graph.sort()
    return model
