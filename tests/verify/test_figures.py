"""Figures of goals: what was measured, its standard error, and how far it is from the bound."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from onnx_attnround.errors import CalibrationError, ConfigError
from onnx_attnround.goals import Goal
from onnx_attnround.verify import Accuracy, Latency, OutputComparison, Verification
from onnx_attnround.verify.figures import figure, load_metric


def found(
    *, accuracy: Accuracy | None = None, outputs: tuple[OutputComparison, ...] = ()
) -> Verification:
    latency = Latency(
        batch=1, pairs=3, float_ms=1.0, quantised_ms=1.0, speedup=1.0, spread=(1.0, 1.0)
    )
    return Verification(
        samples=1000,
        basis="evaluation",
        outputs=outputs,
        accuracy=accuracy,
        layer_sqnr={},
        not_compared=(),
        latency=latency,
        float_bytes=4,
        quantised_bytes=1,
    )


def output(**figures: float) -> OutputComparison:
    return OutputComparison(name="y", max_abs_error=0.0, **{"sqnr_db": 30.0, **figures})  # type: ignore[arg-type]


def test_the_error_of_a_drop_is_that_of_the_differences() -> None:
    """As of the mean of 30 ones, 20 minus ones and 950 zeros."""
    differences = np.repeat([1.0, -1.0, 0.0], [30, 20, 950])
    accuracy = Accuracy(samples=1000, float_correct=900, quantised_correct=890, flipped=50)
    expected = 100 * differences.std() / math.sqrt(1000)
    assert accuracy.drop_points == pytest.approx(100 * differences.mean())
    assert accuracy.drop_error == pytest.approx(expected)
    reading = figure(Goal(kind="drop", bound=2.0), found(accuracy=accuracy), None)
    assert reading.excess == pytest.approx((1.0 + expected) / 2.0)
    assert reading.told == f"top-1 loses 1.00 ± {expected:.2f} points"


@pytest.mark.parametrize(("bound", "reached"), [(1.5, False), (1.8, True)])
def test_a_drop_within_its_standard_error_of_the_bound_is_none_yet(
    bound: float, reached: bool
) -> None:
    accuracy = Accuracy(samples=1000, float_correct=900, quantised_correct=890, flipped=50)
    assert figure(Goal(kind="drop", bound=bound), found(accuracy=accuracy), None).reached == reached


def test_a_gain_reaches_any_drop() -> None:
    accuracy = Accuracy(samples=10, float_correct=8, quantised_correct=9, flipped=0)
    assert figure(Goal(kind="drop", bound=0.0), found(accuracy=accuracy), None).excess == 0.0


def test_agreement_is_that_of_the_worst_output() -> None:
    outputs = output(agreeing=990, judged=1000), output(agreeing=970, judged=1000), output()
    error = math.sqrt(0.97 * 0.03 / 1000)
    reading = figure(Goal(kind="agreement", bound=98.0), found(outputs=outputs), None)
    assert reading.excess == pytest.approx((0.03 + error) / 0.02)
    assert not reading.reached


def test_an_sqnr_reaches_a_bound_by_its_standard_error() -> None:
    goal = Goal(kind="sqnr", bound=30.0)
    few, many = (
        figure(goal, found(outputs=(output(sqnr_db=31.0, sqnr_error_db=error),)), None)
        for error in (2.0, 0.5)
    )
    assert not few.reached and many.reached
    assert "31.00 ± 2.00 dB" in few.told


def test_the_excess_of_an_sqnr_is_a_ratio_of_powers() -> None:
    reading = figure(Goal(kind="sqnr", bound=33.0), found(outputs=(output(),)), None)
    assert reading.excess == pytest.approx(10**0.3)
    equal = figure(Goal(kind="sqnr", bound=33.0), found(outputs=(output(sqnr_db=math.inf),)), None)
    assert equal.excess == 0.0


@pytest.mark.parametrize(
    ("bound", "got", "reached"),
    [(0.9, 0.91, True), (0.9, 0.9, True), (0.9, 0.89, False), (None, 0.991, True)]
    + [(None, 0.989, False), (1.5, 1.6, True), (1.5, 1.2, False)],
)
def test_a_metric_is_held_against_its_bound_or_the_float_model(
    bound: float | None, got: float, reached: bool
) -> None:
    goal = Goal(kind="metric", bound=bound, function="mine:f1")
    assert figure(goal, found(), (1.0, got)).reached == reached


@pytest.mark.parametrize("goal", ["drop=1", "agreement=99", "metric=mine:f1"])
def test_what_was_not_measured_is_told(goal: str) -> None:
    with pytest.raises(CalibrationError, match=goal):
        figure(Goal.parse(goal), found(outputs=(output(),)), None)


def test_a_metric_is_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metric_of_mine.py").write_text("def f1(outputs, labels):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_metric("metric_of_mine:f1")({}, None) == 1.0
    with pytest.raises(ConfigError, match="option `until`: cannot import 'metric_of_mine:f2'"):
        load_metric("metric_of_mine:f2")
    with pytest.raises(ConfigError, match="run where metric_of_nobody.py lies"):
        load_metric("metric_of_nobody:f1")
