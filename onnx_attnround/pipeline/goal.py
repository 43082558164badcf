"""The smallest or the fastest file that reaches a goal: proposed, made, measured, corrected.

What a width of a layer costs at the outputs is measured once (``reconstruct/sensitivity.py``),
with what rounded activations cost beside it. The widths of all layers then form a row from
the smallest to the most accurate file (``plan/bits.py``). One of them is made and
measured on samples that nothing was fitted to. How far it is from the goal says which
to make next: noise at the outputs adds up, and figures follow it by a power that is known.

Where the widest weights do not reach the goal, activations form a second row, from all of them
rounded to all in float (``calibrate/float_tensors.py``), gone along in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from onnx_attnround import qdq
from onnx_attnround.calibrate.float_tensors import by_worth
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
from onnx_attnround.plan.patterns import tensor_names
from onnx_attnround.records import LayerErrors, QuantPlan
from onnx_attnround.report.result import GoalSearch, QuantizeResult, Trial
from onnx_attnround.simplify import simplify
from onnx_attnround.verify.figures import Figure, figure, load_metric, measure_metric
from onnx_attnround.verify.runs import open_one
from onnx_attnround.verify.speed import fastest, serialised_bytes

FILES = 4
"""Files made at most of one row."""

CLOSE = 0.02
"""A file is cheap enough where none is to be had that costs less by this share."""

POWER = {"drop": 1.0, "agreement": 0.5, "sqnr": 1.0, "metric": 1.0}
"""How a figure follows the noise power at the outputs: a margin between two classes is crossed
in proportion to the amplitude of the noise, and of those crossings that turn right into wrong
and back the first order cancels."""

AIM = 0.95
"""The noise that a proposal aims at, 1 just reaching the goal: one that just misses is lost."""

FURTHEST = 30.0
"""The factor of noise power by which one proposal differs from the last, at most."""

Measured = list[tuple[float, float]]
"""Of each file the error that was foretold, and the noise measured, 1 where the goal is reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A file to make: what it costs, and the error that is foretold of it.

    ``bits`` are those of each layer by node name, ``floats`` activations that stay float beside
    those that do anyway. ``cost`` is one that files of a row differ by: bytes of weight codes, or
    work, 1 in integer and 2 in float. ``error`` is noise over power of the outputs.
    """

    bits: dict[str, int]
    floats: tuple[str, ...] = ()
    cost: float
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
    fitting = [each for each in found if around + each.cost <= limit]
    if not fitting:
        raise ConfigError(
            f"option `size`: the smallest file takes {around + found[0].cost:,} bytes, more than "
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
    return serialised_bytes(model) - int(proposal.cost)


def _until(run: Run, given: Loaded) -> tuple[list[Run], Prepared, QuantizeResult]:
    """The best file for the goal: in integer if that can reach it, else with activations in float.

    Some of them, if that may do, else all, which costs speed.
    """
    search = _Search(run, given)
    config = _in_integer(run.config)
    prepared, measured = search.widths(config)
    plan = prepared.plan
    if not search.reached and plan.activations and plan.target.placement != "everything":
        search.activations(prepared, config, measured)
    wider = _wider(config, plan)
    done = any(made.reading.reached and not made.slow for made in search.made)
    if wider is not None and not done:
        search.widths(wider)
    return search.runs, *search.best()


def _in_integer(config: QuantConfig) -> QuantConfig:
    """The config of the first files: for speed, with nothing left in float for accuracy."""
    fast = {"float_tensors": "never"} if config.prefer == "speed" else {}
    return config.model_copy(update=fast)


def _wider(config: QuantConfig, plan: QuantPlan) -> QuantConfig | None:
    """The config with the widest activations that the target takes, if they are wider."""
    target = plan.target
    widest = max(target.activation_bits) if target.placement == "everything" else 32
    if not plan.activations or config.act_bits >= widest:
        return None
    return config.model_copy(update={"act_bits": widest, "activation_bits": {}})


@dataclass(frozen=True, slots=True)
class _Made:
    """A file, what it was proposed as and made of, and its figure."""

    proposal: Proposal
    reading: Figure
    prepared: Prepared
    result: QuantizeResult

    @property
    def slow(self) -> bool:
        """Whether it was made slower than the float model here by what was left in float."""
        found, here = self.result.verification, self.result.plan.target.runtime == "onnxruntime"
        return bool(self.proposal.floats) and here and found is not None and found.latency.slower

    def told(self, *, kept: bool) -> Trial:
        """What the report says of it."""
        result, found = self.result, self.result.verification
        return Trial(
            act_bits=result.config.act_bits if result.plan.activations else 32,
            in_float=len(self.proposal.floats or self.prepared.floats),
            mean_bits=result.bits_per_weight,
            size=_bytes(result),
            speedup=found.latency.speedup if found else math.nan,
            told=self.reading.told,
            reached=self.reading.reached,
            kept=kept,
        )


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
        self.made: list[_Made] = []
        self._errors: LayerErrors | None = None
        self._in_float: float | None = None

    @property
    def reached(self) -> bool:
        """Whether a file reaches the goal."""
        return any(each.reading.reached for each in self.made)

    def best(self) -> tuple[Prepared, QuantizeResult]:
        """The smallest or fastest file that reaches the goal, else the nearest; its origin."""
        missed, those = None, [each for each in self.made if each.reading.reached]
        if not those:
            best = min(self.made, key=lambda each: each.reading.excess)
            missed = f"goal {self.goal} is not reached: in the nearest file {best.reading.told}"
        elif self.run.config.prefer == "speed":
            best = self._fastest(those)
        else:
            best = min(those, key=lambda each: _bytes(each.result))
        trials = tuple(each.told(kept=each is best) for each in self.made)
        search = GoalSearch(goal=str(self.goal), trials=trials, missed=missed)
        return best.prepared, replace(best.result, search=search)

    def _fastest(self, those: Sequence[_Made]) -> _Made:
        """The fastest here, in turns; for another runtime, that of the least work in float."""
        judged, target = self.given.judged_on, those[0].prepared.plan.target
        found = those[0].result.verification
        if len(those) == 1 or judged is None or found is None or target.runtime != "onnxruntime":
            return min(those, key=lambda each: each.proposal.cost)
        with self.run.stage("race"):
            models = [each.result.model for each in those]
            return those[fastest(models, judged, found.latency.batch)]

    def widths(self, config: QuantConfig) -> tuple[Prepared, Measured]:
        """Make files of one precision of the activations, until the goal is met closely."""
        label = "" if config.act_bits == self.run.config.act_bits else "wider"
        run, prepared = self._prepare(config, label)
        found = proposals(prepared, run.config, _activation_error(prepared, run.config))
        if self.run.config.prefer == "speed":
            found = found[-1:]  # widths change the size alone

        def make(proposal: Proposal, number: int) -> Figure:
            trial = run.part(_settings(run.config, proposal), f"{number}")
            return self._make(trial, prepared, proposal)

        return prepared, self._along(found, _first(found, self.goal), make)

    def activations(self, base: Prepared, config: QuantConfig, measured: Measured) -> None:
        """Make files with ever more activations in float, until the goal is met closely.

        ``measured`` are the files of ``base``, where those in float are its own. It ends where a
        file is slower than the float model, or all that are left are foretold to miss the goal.
        """
        with self.run.stage("probe"):
            first, *found = float_proposals(base, config)
        if not found:
            return
        _, noise = min(measured)
        known = [(first.error, noise)]

        def make(proposal: Proposal, number: int) -> Figure:
            run, prepared = self._prepare(_settings(config, proposal), f"floats {number}")
            return self._make(run, prepared, proposal)

        def hopeless(measured: Measured) -> bool:
            far = not self.reached and found[-1].error > _wanted(measured)
            return far or self.made[-1].slow

        # What a single file foretells may be far off: then one halfway tells more.
        far = found[-1].error > _wanted(known)
        at = len(found) // 2 if far else _next(found, known, -1, len(found))
        self._along(found, at, make, known, hopeless)

    def _prepare(self, config: QuantConfig, label: str) -> tuple[Run, Prepared]:
        run, prepared = prepare(self.run.part(config, label), self.given, self._errors)
        self.runs.append(run)
        self._errors = prepared.errors
        return run, prepared

    def _along(
        self,
        found: Sequence[Proposal],
        at: int,
        make: Callable[[Proposal, int], Figure],
        known: Sequence[tuple[float, float]] = (),
        hopeless: Callable[[Measured], bool] = lambda measured: False,
    ) -> Measured:
        """Make some of a row, ``at`` the place of the first; what was measured, ``known`` too."""
        missed, met = -1, len(found)
        measured = list(known)
        for number in range(1, FILES + 1):
            reading = make(found[at], number)
            measured.append((found[at].error, reading.excess ** (1 / POWER[self.goal.kind])))
            if reading.reached:
                met = at
            else:
                missed = at
            if met - missed <= 1 or _close(found, missed, met) or hopeless(measured):
                break
            at = _next(found, measured, missed, met)
        return measured

    def _make(self, run: Run, prepared: Prepared, proposal: Proposal) -> Figure:
        """One file and its figure."""
        result = make(run, prepared)
        if result.verification is None:
            raise CalibrationError(f"goal '{self.goal}': there are no samples to measure it on")
        reading = figure(self.goal, result.verification, self._metric_of(run, result))
        self.made.append(_Made(proposal, reading, prepared, result))
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


def proposals(prepared: Prepared, config: QuantConfig, base: float = 0.0) -> list[Proposal]:
    """Bits of all layers whose bits are free, from the smallest file to the most accurate.

    ``base`` is the error of all that is not their doing.
    """
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
    return [
        Proposal(
            bits={
                layer.node: width
                for group, width in zip(groups, widths, strict=True)
                for layer in group
            },
            cost=sum(of[b] for of, b in zip(costs, widths, strict=True)) // 8,
            error=base + sum(of[b] for of, b in zip(measured, widths, strict=True)),
        )
        for widths in by_error_saved(measured, costs)
    ]


def float_proposals(base: Prepared, config: QuantConfig) -> list[Proposal]:
    """The widest weights with ever more activations in float: from those of ``base`` to nearly all.

    Raises ``CalibrationError`` where ONNX Runtime fails on the samples.
    """
    model, samples = base.simplified, base.given.samples
    if samples is None:
        return []
    known = tensor_names(simplify(base.given.original)[0])
    widest = proposals(base, config)[-1]
    return [
        replace(
            widest,
            floats=tuple(
                dict.fromkeys(_given(model, each, known) for each in (*base.floats, *step.tensors))
            ),
            cost=1 + step.share,
            error=widest.error + 10 ** (step.float_db / 10),
        )
        for step in by_worth(model, base.plan, base.ranges.params, samples, config)[:-1]
    ]


def _given(model: ir.Model, name: str, known: Collection[str]) -> str:
    """The tensor that settings can name, which ``name`` was made of by splitting or smoothing."""
    makers = {value.name: node for node in model.graph for value in node.outputs}
    while name not in known:
        source = makers[name].inputs[0]
        name = "" if source is None else source.name or ""
    return name


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


def _next(found: Sequence[Proposal], measured: Measured, missed: int, met: int) -> int:
    """The cheapest file of those still in question whose noise should be low enough."""
    return min(max(_smallest(found, _wanted(measured)), missed + 1), met - 1)


def _wanted(measured: Measured) -> float:
    """The error to foretell of a file that just reaches the goal.

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
    return wanted


def _smallest(found: Sequence[Proposal], error: float) -> int:
    """The place of the first whose error is within ``error``; the last if there is none."""
    return next((at for at, each in enumerate(found) if each.error <= error), len(found) - 1)


def _close(found: Sequence[Proposal], missed: int, met: int) -> bool:
    """Whether the file that meets the goal costs about as little as the next that may not."""
    if met == len(found):
        return False
    cheaper = found[missed + 1].cost
    return found[met].cost - cheaper <= CLOSE * found[met].cost


def _settings(config: QuantConfig, proposal: Proposal) -> QuantConfig:
    """The config that makes the proposed file, without a search and without gates."""
    without = dict.fromkeys(("until", "size", "min_sqnr", "max_drop"))
    bits: dict[str, object] = {
        "layer_bits": {**config.layer_bits, **proposal.bits},
        "weight_bits": config.bit_choices[0],  # beside which `first_last_bits` holds as it is
    }
    if proposal.floats:
        floats = dict.fromkeys(proposal.floats, 32) | config.activation_bits
        bits |= {"activation_bits": floats, "float_tensors": "never"}
    return config.model_copy(update={**without, **bits, "strict": False})


def _bytes(result: QuantizeResult) -> int:
    return result.verification.quantised_bytes if result.verification else 0
