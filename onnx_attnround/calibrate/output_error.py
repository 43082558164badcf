"""The error at the model's outputs that ranges of activations cause, slice by slice.

A range that is best for its own tensor may be bad for the model: the rare large values that
it cuts off are what a detector's scores are made of. So the float model is run with its
activations rounded, weights as they are, and its outputs are compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import outputs_of_shares, raise_opset
from onnx_attnround.numerics import TINY
from onnx_attnround.qdq.arithmetic import params_from_range
from onnx_attnround.records import Array, QuantParams
from onnx_attnround.runtime.session import open_session, run_on_samples
from onnx_attnround.samples import Feeds, Samples

JUDGED_SAMPLES = 64
"""The most calibration samples that ranges are judged on, spread over all of them."""

JUDGED_BYTES = 64 << 20
"""The most bytes of inputs that ranges are judged on: of large inputs fewer samples are taken."""

BATCH = 8
"""The most samples of a run."""

CLIP_OPSET = 13
"""The opset in which Clip and Round are written here."""

FAINT = 1e-4
"""Slices and values that stay below this share of an output's largest magnitude do not count."""

LENGTHS = range(2, 513)
"""The lengths of axes that are compared slice by slice: of classes, coordinates, channels."""

NEGLIGIBLE = 1e-6
"""An error of this share of the power is as good as none: 60 dB."""

KEPT = 0.8
"""An extreme that keeps less than this share of its distance from its slice's mean is lost.

A score above a threshold may be below it with a fifth less, and then what it is of is not found.
"""

OTHER_KIND = 10.0
"""Slices whose extreme is so many times smaller than the next larger one are of another kind."""

Levels = tuple[float, float, float]
"""Scale, and the lowest and highest level in steps from zero."""


WIDTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Candidates for ranges: how far they go from what an observer finds to the extrema."""


def choose_ranges(
    model: ir.Model,
    observed: Mapping[str, QuantParams],
    extrema: Mapping[str, QuantParams],
    samples: Samples,
    config: QuantConfig,
) -> dict[str, QuantParams]:
    """The parameters of all tensors whose ranges cause the least error at the outputs.

    A range lies between the ``observed`` one and the extrema, geometrically; how far, is one
    choice for the model: of each tensor by itself, few samples tell too little. Ranges that
    lose fewer extremes of the outputs come first, then those of less error.
    Raises ``CalibrationError`` where ONNX Runtime fails on the samples.
    """
    rounded = RoundedModel(model, list(observed), samples, config)
    candidates = {
        width: {name: _between(params, extrema[name], width) for name, params in observed.items()}
        for width in WIDTHS
    }
    return min(candidates.values(), key=rounded.judge)


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
        self._feeds = list(_judged(samples, min(config.batch_size, BATCH)))
        self._round(names)
        plain = open_session(model, threads=config.threads, device=config.device)
        expected = [self._run(plain, feeds) for feeds in self._feeds]
        shares = outputs_of_shares(model)
        self._slices = [
            Slices(batches, one_kind=name in shares)
            for name, batches in zip(self._outputs, zip(*expected, strict=True), strict=True)
        ]

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
        self._outputs = [o.name for o in self._session.get_outputs() if "float" in o.type]

    def judge(self, params: Mapping[str, QuantParams]) -> tuple[int, float]:
        """How many extremes of the outputs are lost, and the error.

        Tensors that are not in ``params`` stay float.

        The error is the mean of the logarithms (base e) of those of samples and outputs, so that
        no single hard sample decides.
        """
        found = self._compare(params)
        logs = [np.log(NEGLIGIBLE + errors) for errors, _ in found]
        lost = sum(missing for _, missing in found)
        return lost, float(np.concatenate(logs).mean()) if logs else 0.0

    def errors(self, params: Mapping[str, QuantParams]) -> list[Array]:
        """The error of each sample, for each float output.

        It is the mean over the slices of an output, along each axis of moderate length, of error
        power over the mean power of slices of one kind; half of it weighted by the square of
        what is expected, so that the few large values are not lost among the many small.
        """
        return [errors for errors, _ in self._compare(params)]

    def _compare(self, params: Mapping[str, QuantParams]) -> list[tuple[Array, int]]:
        """The errors of each output, and how many of its extremes are lost."""
        grids = self._table(params)
        got = [self.outputs({**feeds, **grids}) for feeds in self._feeds]
        return [
            slices.compare(batches)
            for slices, batches in zip(self._slices, zip(*got, strict=True), strict=True)
        ]

    def error(self, params: Mapping[str, QuantParams]) -> float:
        """The error alone, as :meth:`judge` has it."""
        return self.judge(params)[1]

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


_GRIDS = ("attnround/scale", "attnround/low", "attnround/high")


def _judged(samples: Samples, batch_size: int) -> list[Feeds]:
    """Batches of some samples, spread over all of them."""
    parted = samples.split(JUDGED_SAMPLES)
    chosen, used = [], 0
    for feeds in (samples if parted is None else parted[1]).batches(batch_size):
        chosen.append(feeds)
        used += sum(values.nbytes for values in feeds.values())
        if used > JUDGED_BYTES:
            break
    return chosen


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


class Slices:
    """The slices of one output along each axis of moderate length, as the float model gives them.

    An output has one slice, itself, if it has no such axis or its shape changes. All are of
    ``one_kind``, or of those that :func:`kinds_of` finds.
    """

    def __init__(self, batches: Sequence[Array], *, one_kind: bool = False) -> None:
        self._rows = [len(np.atleast_1d(values)) for values in batches]
        self._fixed = len({values.shape[1:] for values in batches}) == 1
        self.expected = self._joined(batches)
        lengths = self.expected.shape[1:] if self._fixed else ()
        self._axes = [axis for axis, length in enumerate(lengths, 1) if length in LENGTHS] or [0]
        largest = float(np.abs(self.expected).max(initial=0.0))
        self._along = [
            _Along.of(self._sliced(self.expected, axis), largest, one_kind) for axis in self._axes
        ]

    def compare(self, batches: Sequence[Array]) -> tuple[Array, int]:
        """The error of each sample, and how many extremes of slices are lost.

        Where the shapes are others, each sample has the error 1.
        """
        got = self._joined(batches)
        if got.shape != self.expected.shape:
            return np.ones(len(self._sliced(self.expected, self._axes[0]))), 0
        found, lost = [], 0
        for axis, along in zip(self._axes, self._along, strict=True):
            expected, other = self._sliced(self.expected, axis), self._sliced(got, axis)
            found.append(along.errors(expected, other))
            lost += along.lost(other)
        return np.mean(found, 0), lost

    def _joined(self, batches: Sequence[Array]) -> Array:
        """All samples ``[n, ...]``, float64; where shapes change, all elements in a row."""
        finite = [np.where(np.isfinite(v), v, 0.0).astype(np.float64) for v in batches]
        if self._fixed and len({values.shape[1:] for values in batches}) == 1:
            return np.concatenate([np.atleast_1d(values) for values in finite])
        return np.concatenate([values.ravel() for values in finite])

    def _sliced(self, values: Array, axis: int) -> Array:
        """``[n, slices, elements]``."""
        if axis == 0:
            return values.reshape(len(values), 1, -1)
        moved = np.moveaxis(values, axis, 1)
        return moved.reshape(*moved.shape[:2], -1)


@dataclass(frozen=True, slots=True)
class _Along:
    """The yardstick for errors of the slices along one axis.

    ``powers`` and ``squares`` are the means over samples, and over slices of one kind, of sums
    of squares and of fourth powers; ``counted`` are the slices that count. ``extremes`` are
    where each slice has its highest and its lowest value, and these values; they are measured
    from ``means``. All are ``[slices]``.
    """

    powers: Array
    squares: Array
    counted: Array
    means: Array
    extremes: tuple[tuple[Array, Array], ...]

    @classmethod
    def of(cls, expected: Array, largest: float, one_kind: bool) -> _Along:
        flat = expected.swapaxes(0, 1).reshape(expected.shape[1], -1)
        found = [flat.argmax(1), flat.argmin(1)]
        at = np.arange(len(flat))
        reach = np.abs(flat).max(1)
        counted = reach > FAINT * largest
        kinds = np.zeros(len(reach), np.int64) if one_kind else kinds_of(reach)
        return cls(
            powers=_mean_of_kind(np.square(expected).sum(2).mean(0), kinds, counted),
            squares=_mean_of_kind((expected**4).sum(2).mean(0), kinds, counted),
            counted=counted,
            means=flat.mean(1),
            extremes=tuple((place, flat[at, place]) for place in found),
        )

    def errors(self, expected: Array, got: Array) -> Array:
        """The error of each sample ``[n]``: mean over the slices that count."""
        noise = np.square(got - expected)
        shares = noise.sum(2) / self.powers + (noise * expected**2).sum(2) / self.squares
        errors: Array = shares[:, self.counted].sum(1) / (2 * max(int(self.counted.sum()), 1))
        return errors

    def lost(self, got: Array) -> int:
        """How many extremes keep less than ``KEPT`` of their distance from the mean."""
        flat = got.swapaxes(0, 1).reshape(got.shape[1], -1)
        at, lost = np.arange(len(flat)), 0
        for place, value in self.extremes:
            distance = value - self.means
            kept = (flat[at, place] - self.means) / np.where(distance == 0, 1.0, distance)
            lost += int(((kept < KEPT) & (distance != 0) & self.counted).sum())
        return lost


def kinds_of(reach: Array) -> Array:
    """A number for the kind of each slice, from their extremes ``[slices]``.

    Slices are of one kind where, sorted by their extremes, none is much smaller than the one
    before: rows of a picture, classes that come up often and seldom; boxes in pixels and scores
    are two.
    """
    order = np.argsort(-reach, kind="stable")
    apart = reach[order][:-1] > OTHER_KIND * reach[order][1:]
    kinds = np.empty(len(reach), np.int64)
    kinds[order] = np.concatenate([[0], np.cumsum(apart)])
    return kinds


def _mean_of_kind(values: Array, kinds: Array, counted: Array) -> Array:
    """For each slice the mean over those of its kind that count."""
    sums = np.bincount(kinds, values * counted)
    means: Array = np.maximum(sums / np.maximum(np.bincount(kinds, counted), 1), TINY)
    return means[kinds]
