"""Activation ranges: the one streaming pass over the samples that feeds the observers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.calibrate.observers import OBSERVERS, Observer
from onnx_attnround.calibrate.output_error import choose_ranges
from onnx_attnround.calibrate.softmax_bounds import FREE, Limits, SoftmaxBounds
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import CalibrationError, ModelError
from onnx_attnround.qdq.arithmetic import params_from_range
from onnx_attnround.records import Array, Event, OnEvent, QuantParams, QuantSpec, TensorStats
from onnx_attnround.runtime.session import open_session, run_on_samples
from onnx_attnround.samples import Feeds, Samples
from onnx_attnround.samples.mask import find_mask, tokens, zero_padding

__all__ = ["OBSERVERS", "Calibration", "Observer", "calibrate", "left_out_note", "observed"]

ACTIVATION_BYTES = 256 << 20
"""The bytes of activations that one run may return at most, where the model's batch is free."""

TOLD = 3
"""The tensors that a note names at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Statistics of each observed tensor, and the parameters of each quantised one.

    ``left_out`` maps tensors to the share of their elements that are NaN or infinite, and
    which no range can hold. ``error`` is that of the outputs where all these tensors are
    rounded, as ``ChosenRanges`` has it; NaN where it was not measured. Between the ``observed``
    parameters and those of the ``extrema`` lie what was chosen; none where there was no choice.
    """

    stats: Mapping[str, TensorStats]
    params: Mapping[str, QuantParams]
    observed: Mapping[str, QuantParams] = field(default_factory=dict)
    extrema: Mapping[str, QuantParams] = field(default_factory=dict)
    left_out: Mapping[str, float] = field(default_factory=dict)
    error: float = math.nan


def calibrate(
    model: ir.Model,
    activations: Mapping[str, QuantSpec],
    samples: Samples,
    config: QuantConfig,
    *,
    same_range: Mapping[str, str],
    on_event: OnEvent,
    observers: Mapping[str, str] | None = None,
) -> Calibration:
    """Observe the tensors of ``activations`` over all ``samples``, in one pass.

    A tensor in ``same_range`` is not observed: it gets the parameters of the
    tensor at the end of its chain. ``config`` tells the observer, the device, and
    how many samples to run at a time at most; ``observers`` the observers of tensors that
    have another one. What only feeds a Softmax is
    bounded by what a Softmax can tell apart; elsewhere, elements that are NaN or infinite do not
    count, and neither do padded tokens, where the model has a mask of them. Raises
    ``CalibrationError`` if ONNX Runtime fails on a sample or a tensor holds nothing else,
    ``ModelError`` if a tensor is unknown.
    """
    roots = {name: _root(name, same_range) for name in (*activations, *same_range)}
    specs: dict[str, QuantSpec] = {}
    for name, root in roots.items():
        spec = activations.get(root, activations.get(name))
        if spec is not None:
            specs.setdefault(root, spec)
    chosen = dict.fromkeys(specs, config.observer) | dict(observers or {})
    watches = {root: _Watch(root, OBSERVERS[chosen[root]]()) for root in specs}
    most_bits = max((spec.bits for spec in specs.values()), default=8)
    bounds = SoftmaxBounds(model, specs.keys(), most_bits)
    names = [*specs, *sorted(bounds.observed - specs.keys())]
    for name, value in observed(model, names, samples, config, "calibrate", on_event):
        bounds.update(name, value)
        if name in watches:
            watches[name].update(value)
    limits = bounds.limits()
    params = {
        root: params_from_range(spec, *watches[root].range(spec, limits.get(root, FREE)))
        for root, spec in specs.items()
    }
    seen, extrema, error = params, dict[str, QuantParams](), math.nan
    # Ranges of the least error are judged at the outputs against wider ones; extrema have none.
    if specs and config.observer != "minmax":
        extrema = {
            root: params_from_range(spec, *watches[root].extrema(limits.get(root, FREE)))
            for root, spec in specs.items()
        }
        chosen_ranges = choose_ranges(model, params, extrema, samples, config)
        params, error = chosen_ranges.params, chosen_ranges.error

    def for_all(found: Mapping[str, QuantParams]) -> dict[str, QuantParams]:
        return {name: found[root] for name, root in roots.items() if root in found}

    return Calibration(
        stats={root: watch.observer.stats(root) for root, watch in watches.items()},
        params=for_all(params),
        observed=for_all(seen if extrema else {}),
        extrema=for_all(extrema),
        left_out={
            root: watch.left_out
            for root, watch in watches.items()
            if watch.left_out and root not in limits
        },
        error=error,
    )


def left_out_note(ranges: Calibration) -> list[str]:
    """A note on elements of activations that are no numbers, if there were any."""
    if not ranges.left_out:
        return []
    told = [f"'{name}' ({share:.2%})" for name, share in ranges.left_out.items()]
    more = f" and {len(told) - TOLD} more" if len(told) > TOLD else ""
    return [
        "NaN or infinite on calibration samples, in the float model too, and left out of ranges "
        f"and moments: {', '.join(told[:TOLD])}{more}; check the samples' preprocessing, if that "
        "is no masking"
    ]


@dataclass(slots=True)
class _Watch:
    """One tensor: an observer of its finite elements, and a count of the others."""

    name: str
    observer: Observer
    elements: int = 0
    not_finite: int = 0
    infinite: tuple[bool, bool] = (False, False)  # below, above

    @property
    def left_out(self) -> float:
        """The share of elements that are NaN or infinite."""
        return self.not_finite / max(self.elements, 1)

    def update(self, value: Array) -> None:
        """Take in a batch, with 0, which every range holds, in place of NaN and infinities."""
        if value.dtype.kind != "f":
            raise ModelError(
                f"tensor '{self.name}' is {value.dtype}, expected a float tensor: exclude its node"
            )
        self.elements += value.size
        try:
            self.observer.update(value)
        except CalibrationError:  # nothing was taken in
            finite = np.isfinite(value)
            self.not_finite += value.size - int(np.count_nonzero(finite))
            below, above = self.infinite
            self.infinite = below or bool(np.isneginf(value).any()), above or bool(
                np.isposinf(value).any()
            )
            self.observer.update(np.where(finite, value, value.dtype.type(0)))

    def range(self, spec: QuantSpec, limits: Limits) -> tuple[float, float]:
        """The range to quantise: as observed, or its extrema cut at the ``limits``.

        Beyond the limits are masks, next to which a histogram tells nothing of the rest. Raises
        ``CalibrationError`` where there is not one finite element.
        """
        extrema = self.extrema(limits)
        if extrema != self.extrema(FREE):
            return extrema
        if self.elements and self.not_finite == self.elements:
            raise CalibrationError(
                f"tensor '{self.name}' holds NaN or Inf alone on the calibration samples: "
                "check the samples' preprocessing, or give it 32 bits, float, in `activation_bits`"
            )
        return self.observer.range(spec)

    def extrema(self, limits: Limits) -> tuple[float, float]:
        """The extrema as observed, cut at the ``limits``."""
        seen, (below, above) = self.observer.stats(self.name), self.infinite
        low, high = limits
        cut_low = math.isfinite(low) and (below or seen.lo < low)
        cut_high = math.isfinite(high) and (above or seen.hi > high)
        return low if cut_low else seen.lo, high if cut_high else seen.hi


def _root(name: str, same_range: Mapping[str, str]) -> str:
    seen = {name}
    while name in same_range:
        name = same_range[name]
        if name in seen:
            raise ModelError(f"tensor '{name}' shares its range with itself: exclude its node")
        seen.add(name)
    return name


def observed(
    model: ir.Model,
    names: list[str],
    samples: Samples,
    config: QuantConfig,
    stage: str,
    on_event: OnEvent,
) -> Iterator[tuple[str, Array]]:
    """Each named tensor's value, batch after batch, as one pass over the samples finds them.

    ``stage`` is what events are told of. Raises as :func:`calibrate`.
    """
    exposed, constants = _exposed(model, names)
    session = open_session(exposed, threads=config.threads, device=config.device)
    size, mask = config.batch_size, find_mask(model)
    yield from _runs(session, names, constants, samples, size, mask, stage, on_event)


def _runs(
    session: ort.InferenceSession,
    names: list[str],
    constants: Mapping[str, Array],
    samples: Samples,
    batch_size: int,
    mask: str | None,
    stage: str,
    on_event: OnEvent,
) -> Iterator[tuple[str, Array]]:
    """Each named tensor's value, batch after batch, 0 at padded tokens; constants come once."""
    fed = {value.name for value in session.get_inputs()} & set(names)
    fetched = [name for name in names if name not in fed and name not in constants]
    for name in constants:
        yield name, constants[name]
    size = _affordable(session, fetched, samples, batch_size)
    done = 0
    for feeds in samples.batches(size):
        values = chain(((name, feeds[name]) for name in fed), _run(session, fetched, feeds))
        kept = tokens(feeds, mask)
        yield from ((name, zero_padding(value, kept)) for name, value in values)
        rows = min((len(feed) for feed in feeds.values() if feed.ndim), default=1)
        done = min(done + rows, samples.count)
        on_event(Event(stage=stage, done=done, total=samples.count, detail="samples"))


def _run(
    session: ort.InferenceSession, names: list[str], feeds: Feeds
) -> Iterator[tuple[str, Array]]:
    # Without names, too: whether the model runs on the samples is to come out here.
    values = run_on_samples(session, names, feeds)
    yield from zip(names, values, strict=False)


def _affordable(
    session: ort.InferenceSession, names: list[str], samples: Samples, batch_size: int
) -> int:
    """``batch_size``, lowered until the activations of one run stay below the bound."""
    first = next(samples.batches(1))
    used = sum(value.nbytes for _, value in _run(session, names, first))
    return max(1, min(batch_size, ACTIVATION_BYTES // max(used, 1)))


def _exposed(model: ir.Model, names: list[str]) -> tuple[ir.Model, dict[str, Array]]:
    """A copy of ``model`` with the named tensors as outputs, and those that are constants."""
    exposed = model.clone()
    graph = exposed.graph
    computed = {value.name: value for node in graph for value in node.outputs}
    given = {value.name for value in (*graph.inputs, *graph.outputs)}
    constants: dict[str, Array] = {}
    for name in names:
        constant = graph.initializers[name].const_value if name in graph.initializers else None
        if constant is not None:
            constants[name] = constant.numpy()
        elif name in computed and name not in given:
            graph.outputs.append(computed[name])
        elif name not in given:
            raise ModelError(f"tensor '{name}' is not in the graph: simplify the model again")
    return exposed, constants
