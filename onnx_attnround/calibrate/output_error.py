"""The error at the model's outputs that ranges of activations cause, slice by slice.

A range that is best for its own tensor may be bad for the model: the rare large values that
it cuts off are what a detector's scores are made of. So the float model is run with its
activations rounded, weights as they are, and its outputs are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import CalibrationError
from onnx_attnround.graph import raise_opset
from onnx_attnround.qdq.arithmetic import params_from_range
from onnx_attnround.records import Array, QuantParams
from onnx_attnround.runtime.session import first_line, open_session
from onnx_attnround.samples import Feeds, Samples

JUDGED_SAMPLES = 64
"""Calibration samples that ranges are judged on, spread over all ..."""

JUDGED_BYTES = 64 << 20
"""... or as many of them as have no more bytes."""

BATCH = 8
CLIP_OPSET = 13  # Clip and Round as they are written here
FAINT = 1e-4
"""Slices that stay below this share of their output's largest magnitude do not count."""

LENGTHS = range(2, 513)
"""Lengths of axes that are looked at slice by slice."""

NEGLIGIBLE = 1e-6
"""An error of this share of the power is as good as none: 60 dB."""

_TINY = 1e-30
Grid = tuple[float, float, float]
"""Scale, and the lowest and highest level in steps from zero."""


WIDTHS = (0.0, 0.25, 0.5, 1.0)
"""Candidates for ranges: how far they go from that of least squares to the extrema."""


def choose_ranges(
    model: ir.Model,
    squares: Mapping[str, QuantParams],
    extrema: Mapping[str, QuantParams],
    samples: Samples,
    config: QuantConfig,
) -> dict[str, QuantParams]:
    """The parameters of all tensors whose ranges cause the least error at the outputs.

    A range lies between that of least mean squared error and the extrema, geometrically; how
    far, is one choice for the model: of each tensor by itself, few samples tell too little.
    Raises ``CalibrationError`` where ONNX Runtime fails on the samples.
    """
    rounded = RoundedModel(model, list(squares), samples, config)
    candidates = {
        width: {name: _between(params, extrema[name], width) for name, params in squares.items()}
        for width in WIDTHS
    }
    return min(candidates.values(), key=rounded.error)


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


def grid_of(params: QuantParams) -> Grid:
    """The levels that codes of ``params`` stand for."""
    zero, spec = float(params.zero_point), params.spec
    return float(params.scale), spec.qmin - zero, spec.qmax - zero


class RoundedModel:
    """The float model, whose activations are rounded to the grids of each run.

    ``names`` are the tensors that a run may round. Raises ``CalibrationError`` where ONNX
    Runtime fails on the ``samples``.
    """

    def __init__(
        self, model: ir.Model, names: Sequence[str], samples: Samples, config: QuantConfig
    ) -> None:
        self.names = [name for name in names if name not in model.graph.initializers]
        rounded = _with_grids(model, self.names)
        self._session = open_session(rounded, threads=config.threads, device=config.device)
        self._outputs = [o.name for o in self._session.get_outputs() if "float" in o.type]
        self._feeds = list(_judged(samples, min(config.batch_size, BATCH)))
        plain = open_session(model, threads=config.threads, device=config.device)
        self._expected = [self._run(plain, feeds) for feeds in self._feeds]
        self._slices = [_Slices.of(batches) for batches in zip(*self._expected, strict=True)]

    def error(self, params: Mapping[str, QuantParams]) -> float:
        """Mean over samples and float outputs of the logarithm (base e) of their error.

        The error of a sample is the mean over the slices of an output, along each axis of
        moderate length, of error power over the slice's mean power; half of it weighted by the
        square of what is expected, so that the few large values of a slice, the scores
        of what is found, are not lost among the many small. By the logarithm no single hard
        sample decides. Tensors without parameters stay float.
        """
        grids = self._table(params)
        logs: list[Array] = []
        for feeds, expected in zip(self._feeds, self._expected, strict=True):
            got = self._run(self._session, {**feeds, **grids})
            logs += [
                np.log(NEGLIGIBLE + slices.errors(*pair))
                for slices, *pair in zip(self._slices, expected, got, strict=True)
            ]
        return float(np.concatenate(logs).mean()) if logs else 0.0

    def _table(self, params: Mapping[str, QuantParams]) -> dict[str, Array]:
        free = (2.0**-100, -np.inf, np.inf)
        rows = [grid_of(params[name]) if name in params else free for name in self.names]
        columns = np.asarray(rows, np.float32).reshape(-1, 3).T
        return dict(zip(_GRIDS, map(np.ascontiguousarray, columns), strict=True))

    def _run(self, session: object, feeds: Feeds) -> list[Array]:
        try:
            return list(session.run(self._outputs, dict(feeds)))  # type: ignore[attr-defined]
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise CalibrationError(
                f"ONNX Runtime failed on the calibration samples: {first_line(error)}"
            ) from error


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
    """A copy that rounds each named tensor, for all its readers, to what three inputs say."""
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
        for number, node in enumerate((*picked, steps, whole, bounded, restored)):
            node.name = node.outputs[0].name = f"attnround/{index}_{number}"
            graph.append(node)
        for node, place in readers:
            node.replace_input_with(place, restored.outputs[0])
    graph.sort()
    return result


@dataclass(frozen=True, slots=True)
class _Slices:
    """The slices of one output that count: by axis, what errors of each are measured by.

    That are the means over the samples of power, and of power times square; infinite for
    slices that do not count.
    """

    units: Mapping[int, tuple[Array, Array]]

    @classmethod
    def of(cls, batches: Sequence[Array]) -> _Slices:
        """From what the float model gives; axes whose length changes have none."""
        shapes = {values.shape[1:] for values in batches}
        lengths = next(iter(shapes)) if len(shapes) == 1 else ()
        axes = [axis for axis, length in enumerate(lengths, 1) if length in LENGTHS]
        rows = max(sum(len(np.atleast_1d(values)) for values in batches), 1)
        largest = max(float(np.abs(_finite(values)).max(initial=0.0)) for values in batches)
        units: dict[int, tuple[Array, Array]] = {}
        for axis in axes or [0]:
            sums = [
                np.sum([_summed(_finite(v) ** power, axis).sum(0) for v in batches], 0) / rows
                for power in (2, 4)
            ]
            peak = np.max([_largest(_finite(values), axis) for values in batches], 0)
            counted = peak > FAINT * largest
            low, high = (np.where(counted, np.maximum(s, _TINY), np.inf) for s in sums)
            units[axis] = low, high
        return cls(units)

    def errors(self, expected: Array, got: Array) -> Array:
        """The error of each sample ``[n]``; 1 where the two cannot be compared."""
        if expected.shape != got.shape:
            return np.ones(len(np.atleast_1d(expected)))
        wanted = _finite(expected)
        noise = np.square(_finite(np.where(np.isfinite(expected), got, 0.0)) - wanted)
        found = []
        for axis, (powers, squares) in self.units.items():
            shares = _summed(noise, axis) / powers + _summed(noise * wanted**2, axis) / squares
            count = max(int(np.isfinite(powers).sum()), 1)
            found.append(shares.sum(-1) / (2 * count))
        errors: Array = np.mean(found, 0)
        return errors


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0).astype(np.float64)


def _summed(values: Array, axis: int) -> Array:
    """Sums over all but the samples and ``axis``, ``[n, slices]``; axis 0 is all in one."""
    rows = np.atleast_1d(values)
    others = tuple(other for other in range(1, rows.ndim) if other != axis)
    sums: Array = rows.sum(others).reshape(len(rows), -1)
    return sums


def _largest(values: Array, axis: int) -> Array:
    others = tuple(other for other in range(values.ndim) if other != axis or axis == 0)
    peaks: Array = np.atleast_1d(np.abs(values).max(others, initial=0.0))
    return peaks
