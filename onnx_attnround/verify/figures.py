"""How far a quantised model is from a goal, with the standard error of what was measured."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_attnround.errors import CalibrationError, ConfigError
from onnx_attnround.goals import Goal
from onnx_attnround.records import Array
from onnx_attnround.samples import Samples
from onnx_attnround.verify.results import Verification
from onnx_attnround.verify.runs import BATCH, Forward

Metric = Callable[[Mapping[str, Array], Array | None], float]
"""From the outputs over all samples by name, ``[samples, ...]`` each, and labels to a number."""

MAY_LOSE = 0.01
"""The share of its value for the float model that a metric without a bound may lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What was measured of a goal, in words, and its ``excess``.

    That is what quantisation costs, a standard error on top, over what it may cost: up to 1 the
    goal is reached. Of an SQNR it is a ratio of noise powers.
    """

    told: str
    excess: float

    @property
    def reached(self) -> bool:
        """Whether the goal is reached."""
        return self.excess <= 1


def figure(goal: Goal, found: Verification, metric: tuple[float, float] | None) -> Figure:
    """The figure of ``goal``; ``metric`` has that of the float and of the quantised model.

    Raises ``CalibrationError`` for a figure that was not measured.
    """
    if goal.kind == "drop":
        return _drop(goal, found)
    if goal.kind == "agreement":
        return _agreement(goal, found)
    if goal.kind == "sqnr":
        return _sqnr(goal, found)
    if metric is None:
        raise CalibrationError(f"goal '{goal}': there are no samples to measure it on")
    return _metric(goal, *metric)


def load_metric(function: str) -> Metric:
    """The function that ``module:name`` names, looked for in the current folder too."""
    module, name = function.split(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"option `until`: cannot import '{function}', {error}; run where {module}.py lies, or "
            "install it"
        ) from error
    if not callable(found):
        raise ConfigError(f"option `until`: '{function}' is no function")
    return found  # type: ignore[no-any-return]


def measure_metric(
    run: Forward, samples: Samples, labels: Array | None, metric: Metric
) -> float:
    """The metric of the outputs that ``run`` gives over all samples."""
    collected: dict[str, list[Any]] = {}
    for feed in samples.batches(BATCH):
        for name, value in run(feed).items():
            collected.setdefault(name, []).append(value)
    outputs = {name: np.concatenate(parts) for name, parts in collected.items()}
    return _value(metric, outputs, labels)


def _value(metric: Metric, outputs: Mapping[str, Array], labels: Array | None) -> float:
    try:
        value = float(metric(outputs, labels))
    except Exception as error:  # it is the user's code: whatever it raises is told
        raise ConfigError(f"option `until`: the metric raised {error!r}") from error
    if not math.isfinite(value):
        raise ConfigError(f"option `until`: the metric gave {value}, expected a finite number")
    return value


def _drop(goal: Goal, found: Verification) -> Figure:
    accuracy = found.accuracy
    if accuracy is None:
        raise CalibrationError(f"goal '{goal}': no labels: give `evaluation` with `labels`")
    drop, error = accuracy.drop_points, accuracy.drop_error
    told = f"top-1 loses {drop:.2f} ± {error:.2f} points"
    return Figure(told=told, excess=_ratio(drop + error, goal.bound or 0.0))


def _agreement(goal: Goal, found: Verification) -> Figure:
    judged = [(out.agreement, out.judged) for out in found.outputs if out.agreement is not None]
    if not judged:
        raise CalibrationError(f"goal '{goal}': no output holds class scores: choose another goal")
    share, count = min(judged)
    error = math.sqrt(share * (1 - share) / count)
    told = f"{100 * share:.2f} ± {100 * error:.2f} % of the classes agree"
    missing = 100 * (1 - share + error)
    return Figure(told=told, excess=_ratio(missing, 100 - (goal.bound or 0.0)))


def _sqnr(goal: Goal, found: Verification) -> Figure:
    worst = found.worst_output
    if worst is None or worst.sqnr_db is None:
        raise CalibrationError(f"goal '{goal}': no output is float: choose another goal")
    error = worst.sqnr_error_db or 0.0
    spread = f" ± {error:.2f}" if error else ""
    told = f"SQNR of output '{worst.name}' is {worst.sqnr_db:.2f}{spread} dB"
    return Figure(told=told, excess=10 ** (((goal.bound or 0.0) - worst.sqnr_db + error) / 10))


def _metric(goal: Goal, expected: float, got: float) -> Figure:
    least = expected - MAY_LOSE * abs(expected) if goal.bound is None else goal.bound
    told = f"{goal.function} is {got:.4g}, at least {least:.4g} wanted, {expected:.4g} in float"
    if got >= least:
        return Figure(told=told, excess=min(_ratio(expected - got, expected - least), 1.0))
    return Figure(told=told, excess=max(_ratio(expected - got, expected - least), 1.0 + 1e-9))


def _ratio(cost: float, allowed: float) -> float:
    """Cost over what is allowed; where nothing is, any cost is too much."""
    if cost <= 0:
        return 0.0
    return cost / allowed if allowed > 0 else math.inf
