"""The smallest or the fastest file that reaches a goal: proposed, made, measured, corrected.

What a width of a layer costs at the outputs is measured once (``reconstruct/sensitivity.py``),
with what rounded activations cost beside it. The widths of all layers then form a row from
the smallest to the most accurate file (``plan/bits.py``). One of them is made and
measured on samples that nothing was fitted to. How far it is from the goal says which
to make next: noise at the outputs adds up, and figures follow it by a power that is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_attnround import qdq
from onnx_attnround.calibrate.output_error import RoundedModel
from onnx_attnround.config import QuantConfig
from onnx_attnround.context import Run
from onnx_attnround.errors import CalibrationError, ConfigError
from onnx_attnround.goals import Goal
from onnx_attnround.pipeline import (
    allocate_bits,
    conclude,
    make,
    prepare,
    storage_of,
    written,
)
from onnx_attnround.pipeline.prepared import Loaded, Prepared
from onnx_attnround.plan.bits import by_error_saved, free_layers
from onnx_attnround.records import LayerErrors
from onnx_attnround.report.result import GoalSearch, QuantizeResult, Trial
from onnx_attnround.verify.figures import Figure, figure, load_metric, measure_metric
from onnx_attnround.verify.runs import open_one
from onnx_attnround.verify.speed import serialised_bytes

FILES = 4
"""Files made at most for one precision of the activations."""

CLOSE = 0.02
"""A file is small enough where none is to be had that is smaller by this share of its weights."""

POWER = {"drop": 1.0, "agreement": 0.5, "sqnr": 1.0, "metric": 1.0}
"""How a figure follows the noise power at the outputs: a margin between two classes is crossed
in proportion to the amplitude of the noise, and of those crossings that turn right into wrong
and back the first order cancels."""

AIM = 0.95
"""The noise that a proposal aims at, 1 just reaching the goal: one that just misses is lost."""

FURTHEST = 30.0
"""The factor of noise power by which one proposal differs from the last, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The bits of each layer, by node name, what they take, and the error that they predict.

    ``stored`` counts bytes of weight codes, ``error`` is noise over power of the outputs.
    """

    bits: dict[str, int]
    stored: int
    error: float


def reach(run: Run, given: Loaded, output: Path | str | None) -> QuantizeResult:
    """The best file for ``until``, or within ``size``; written to ``output``.

    Where no file reaches the goal, that which comes nearest is written, and the result says
    so. Raises what :func:`quantize` raises, and ``ConfigError`` for a size that is too small.
    """
    config = run.config
    if given.samples is None or given.judged_on is None:
        raise CalibrationError(
            "what a goal or a size needs is measured, but there are no samples: give `calibration`"
        )
    runs, prepared, made = (_within_size if config.until is None else _until)(run, given)
    last = replace(run, seconds=dict(made.seconds))
    made = conclude(last, prepared, replace(made, seconds=last.seconds), output)
    for each in runs:
        each.checkpoint.remove()
    return made


def _within_size(run: Run, given: Loaded) -> tuple[list[Run], Prepared, QuantizeResult]:
    """The most accurate file of the size, after one rounding, and the run that made it."""
    run, prepared = prepare(run, given)
    found = proposals(prepared, run.config)
    limit = run.config.size or 0
    around = _bytes_around(prepared, run.config, found[0])
    fitting = [each for each in found if around + each.stored <= limit]
    if not fitting:
        raise ConfigError(
            f"option `size`: the smallest file takes {around + found[0].stored:,} bytes, more than "
            f"{limit:,}: allow more, or narrower `bit_choices`"
        )
    made = make(run.part(_settings(run.config, fitting[-1]), "size"), prepared)
    return [run], prepared, made


def _bytes_around(prepared: Prepared, config: QuantConfig, proposal: Proposal) -> int:
    """What the file takes beside the codes of its weights, from one that is rounded to nearest."""
    from onnx_attnround.reconstruct.layerwise import round_plain

    config = _settings(config, proposal)
    allocation = allocate_bits(prepared, config)
    params = prepared.ranges.params
    roundings = round_plain(prepared.simplified, prepared.plan, params, allocation)
    model, _ = written(prepared, params, roundings, config, allocation)
    return serialised_bytes(model) - proposal.stored


def _until(run: Run, given: Loaded) -> tuple[list[Run], Prepared, QuantizeResult]:
    """The best file for the goal, with activations in integer if that can reach it."""
    search = _Search(run, given)
    for config in _precisions(run.config):
        search.within(config)
        if search.reached:
            break
    return search.runs, *search.best()


def _precisions(config: QuantConfig) -> list[QuantConfig]:
    """The config, and that with float activations, which costs speed, where it has others."""
    floats = {"act_bits": 32, "activation_bits": {}}
    return [config] if config.act_bits == 32 else [config, config.model_copy(update=floats)]


class _Search:
    """What was tried, and the best of it."""

    def __init__(self, run: Run, given: Loaded) -> None:
        self.run, self.given = run, given
        self.goal = Goal.parse(run.config.until or "")
        self.metric = None if self.goal.function is None else load_metric(self.goal.function)
        if self.goal.kind == "drop" and given.labels is None:
            raise CalibrationError(
                f"goal '{self.goal}': no labels to count top-1 by: give `evaluation` with "
                "`labels`, or a goal of agreement"
            )
        self.runs: list[Run] = []
        self.made: list[tuple[Figure, Prepared, QuantizeResult]] = []
        self._errors: LayerErrors | None = None
        self._in_float: float | None = None

    @property
    def reached(self) -> bool:
        """Whether a file reaches the goal."""
        return any(reading.reached for reading, _, _ in self.made)

    def best(self) -> tuple[Prepared, QuantizeResult]:
        """The smallest file that reaches the goal, else the nearest, and what it is made of."""
        missed = None
        if self.reached:
            those = [made for made in self.made if made[0].reached]
            _, prepared, found = min(those, key=lambda made: _bytes(made[2]))
        else:
            nearest, prepared, found = min(self.made, key=lambda made: made[0].excess)
            missed = f"goal {self.goal} is not reached: in the nearest file {nearest.told}"
        trials = tuple(
            Trial(
                act_bits=result.config.act_bits,
                mean_bits=result.bits_per_weight,
                size=_bytes(result),
                speedup=result.verification.latency.speedup if result.verification else math.nan,
                told=reading.told,
                reached=reading.reached,
                kept=result is found,
            )
            for reading, _, result in self.made
        )
        search = GoalSearch(goal=str(self.goal), trials=trials, missed=missed)
        return prepared, replace(found, search=search)

    def within(self, config: QuantConfig) -> None:
        """Make files of one precision of the activations, until the goal is met closely."""
        run = self.run.part(config, "" if config is self.run.config else "in float")
        run, prepared = prepare(run, self.given, self._errors)
        self.runs.append(run)
        self._errors = prepared.errors
        found = proposals(prepared, run.config)
        if self.run.config.prefer == "speed":
            found = found[-1:]  # widths change the size alone
        missed, met = -1, len(found)
        measured: list[tuple[float, float]] = []
        at = _first(found, self.goal)
        for number in range(FILES):
            trial = run.part(_settings(run.config, found[at]), f"{number + 1}")
            reading = self._make(trial, prepared)
            if reading.reached:
                met = at
            else:
                missed = at
            if met - missed <= 1 or _close(found, missed, met):
                return
            noise = reading.excess ** (1 / POWER[self.goal.kind])
            measured.append((found[at].error, noise))
            at = _next(found, measured, missed, met)

    def _make(self, run: Run, prepared: Prepared) -> Figure:
        """One file and its figure."""
        result = make(run, prepared)
        if result.verification is None:
            raise CalibrationError(f"goal '{self.goal}': there are no samples to measure it on")
        reading = figure(self.goal, result.verification, self._metric_of(run, result))
        self.made.append((reading, prepared, result))
        return reading

    def _metric_of(self, run: Run, result: QuantizeResult) -> tuple[float, float] | None:
        """The user's metric of the float model, measured once, and of a file; if there is one."""
        metric, judged, labels = self.metric, self.given.judged_on, self.given.labels
        if metric is None or judged is None:
            return None
        threads = run.config.threads
        with run.stage("metric"):
            if self._in_float is None:
                in_float = open_one(self.given.original, "float", threads)
                self._in_float = measure_metric(in_float, judged, labels, metric)
            made = open_one(result.model, "quantised", threads)
            return self._in_float, measure_metric(made, judged, labels, metric)


def proposals(prepared: Prepared, config: QuantConfig) -> list[Proposal]:
    """Bits of all layers whose bits are free, from the smallest file to the most accurate."""
    plan, params, errors = prepared.plan, prepared.ranges.params, prepared.errors or {}
    groups = free_layers(plan.layers, config)
    storage = storage_of(plan, config)
    first = [group[0] for group in groups]
    costs = [
        {
            bits: layer.parameters * qdq.stored_bits(layer, bits, params, storage, plan.target)
            for bits in config.bit_choices
        }
        for layer in first
    ]
    measured = [errors[layer.node] for layer in first]
    base = _activation_error(prepared, config)
    return [
        Proposal(
            bits={
                layer.node: width
                for group, width in zip(groups, widths, strict=True)
                for layer in group
            },
            stored=sum(of[b] for of, b in zip(costs, widths, strict=True)) // 8,
            error=base + sum(of[b] for of, b in zip(measured, widths, strict=True)),
        )
        for widths in by_error_saved(measured, costs)
    ]


def _activation_error(prepared: Prepared, config: QuantConfig) -> float:
    """Noise over power of the outputs with the activations alone rounded."""
    params, samples = prepared.ranges.params, prepared.given.samples
    own = prepared.plan.own(params)
    if not own or samples is None:
        return 0.0
    rounded = RoundedModel(prepared.simplified, list(own), samples, config)
    return math.exp(rounded.error(own))


def _first(found: Sequence[Proposal], goal: Goal) -> int:
    """What to make first: the smallest that should do for an SQNR, else the smallest of all."""
    if goal.kind != "sqnr" or goal.bound is None:
        return 0
    return _smallest(found, 10 ** (-goal.bound / 10))


def _next(
    found: Sequence[Proposal], measured: Sequence[tuple[float, float]], missed: int, met: int
) -> int:
    """The smallest file of those still in question whose noise should be low enough.

    ``measured`` has the predicted error and the measured noise of each file so far, 1 where the
    goal is just reached. One file tells a factor between the two; two tell what is predicted
    beside it, such as the error of the activations.
    """
    at, noise = measured[-1]
    wanted = AIM * at / min(max(noise, 1 / FURTHEST), FURTHEST)
    (first, low), *others = sorted(measured, key=lambda each: abs(each[1] - 1.0))
    for second, high in others[:1]:
        slope = (high - low) / (second - first) if second != first else 0.0
        if 0 < slope < math.inf:
            wanted = first + (AIM - low) / slope
    return min(max(_smallest(found, wanted), missed + 1), met - 1)


def _smallest(found: Sequence[Proposal], error: float) -> int:
    """The place of the first whose error is within ``error``; the last if there is none."""
    return next((at for at, each in enumerate(found) if each.error <= error), len(found) - 1)


def _close(found: Sequence[Proposal], missed: int, met: int) -> bool:
    """Whether the file that meets the goal is about as small as the next that may not."""
    if met == len(found):
        return False
    smaller = found[missed + 1].stored
    return found[met].stored - smaller <= CLOSE * found[met].stored


def _settings(config: QuantConfig, proposal: Proposal) -> QuantConfig:
    """The config that makes the proposed file, without a search and without gates."""
    without = dict.fromkeys(("until", "size", "min_sqnr", "max_drop"))
    bits = {
        "layer_bits": {**config.layer_bits, **proposal.bits},
        "weight_bits": config.bit_choices[0],  # beside which `first_last_bits` holds as it is
    }
    return config.model_copy(update={**without, **bits, "strict": False})


def _bytes(result: QuantizeResult) -> int:
    return result.verification.quantised_bytes if result.verification else 0
