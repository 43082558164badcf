"""Goals on a small network: the files that are made, the one that is kept, and what is told."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnx_attnround import QuantConfig, QuantizeResult, quantize
from onnx_attnround.__main__ import main
from onnx_attnround.errors import CalibrationError, ConfigError, GateError
from onnx_attnround.pipeline import make_plan
from onnx_attnround.pipeline.goal import Proposal, _Made, _next, _wider

pytestmark = pytest.mark.slow

MODELS = Path(__file__).resolve().parents[2] / "models"
RESNET, CALIBRATION = MODELS / "digits_resnet.onnx", MODELS / "digits_calib.npz"
EVALUATION = MODELS / "digits_eval.npz"


def config(**options: Any) -> QuantConfig:
    return QuantConfig.parse({"threads": 1, "steps": 2, "observer": "minmax", **options})


@cache
def made(**options: Any) -> QuantizeResult:
    samples = np.load(CALIBRATION)["input"][:96]
    return quantize(RESNET, samples, config(**options), evaluation=EVALUATION)


@cache
def uniform(bits: int) -> QuantizeResult:
    return made(weight_bits=bits)


def worst(result: QuantizeResult) -> float:
    assert result.verification is not None
    assert result.verification.worst_output is not None
    return result.verification.worst_output.sqnr_db or 0.0


def size(result: QuantizeResult) -> int:
    assert result.verification is not None
    return result.verification.quantised_bytes


def test_a_goal_between_two_uniform_files_is_met_by_one_of_a_size_between_them() -> None:
    goal = round((worst(uniform(4)) + worst(uniform(8))) / 2, 1)
    result = made(until=f"sqnr={goal}")
    assert worst(result) >= goal
    assert size(uniform(4)) < size(result) < size(uniform(8))
    assert result.search is not None and result.search.missed is None
    assert 1 <= len(result.search.trials) <= 4
    kept = [trial for trial in result.search.trials if trial.kept]
    assert [(trial.size, trial.reached) for trial in kept] == [(size(result), True)]


def test_the_smallest_file_is_taken_where_it_will_do() -> None:
    result = made(until="sqnr=1")
    assert size(result) <= size(uniform(4)) + 300  # of the settings that the file records
    assert result.search is not None and len(result.search.trials) == 1


def test_speed_goes_before_size_where_that_is_preferred() -> None:
    result = made(until="sqnr=1", prefer="speed")
    assert set(result.allocation.bits.values()) == {8}


def between(share: float, **options: Any) -> tuple[QuantizeResult, QuantizeResult, float]:
    """A file all in integer, one for a goal beyond it, and that goal.

    It lies at a ``share`` of the way, in dB, to the file of weights alone.
    """
    whole, weights = made(float_tensors="never"), made(act_bits=32)
    goal = round((1 - share) * worst(whole) + share * worst(weights), 1)
    samples = np.load(CALIBRATION)["input"][:96]
    options = {"until": f"sqnr={goal}", **options}
    return whole, quantize(RESNET, samples, config(**options), evaluation=EVALUATION), goal


@pytest.mark.parametrize("slower", [False, True])
def test_some_activations_are_float_where_that_will_do_and_costs_no_speed(
    monkeypatch: pytest.MonkeyPatch, *, slower: bool
) -> None:
    monkeypatch.setattr(_Made, "slow", property(lambda made: slower and bool(made.proposal.floats)))
    whole, result, goal = between(0.2)
    assert worst(result) >= goal
    assert result.search is not None and result.search.missed is None
    tried = {(trial.act_bits, trial.in_float > 0) for trial in result.search.trials}
    assert {(8, False), (8, True)} <= tried
    (kept,) = (trial for trial in result.search.trials if trial.kept)
    if slower:
        assert kept.act_bits == 32 and not result.plan.activations
        return
    assert kept.act_bits == 8 and kept.in_float > 0
    assert 0 < len(result.plan.activations) < len(whole.plan.activations)
    again = quantize(RESNET, np.load(CALIBRATION)["input"][:96], result.config)
    assert again.plan.activations == result.plan.activations


def test_the_fastest_of_the_files_that_reach_the_goal_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raced: list[int] = []

    def last(models: Sequence[ir.Model], samples: object, batch: int) -> int:
        raced.append(len(models))
        return len(models) - 1

    monkeypatch.setattr("onnx_attnround.pipeline.goal.fastest", last)
    monkeypatch.setattr(_Made, "slow", property(lambda made: bool(made.proposal.floats)))
    _, result, _ = between(0.2, prefer="speed")
    assert result.search is not None and result.search.missed is None
    reached = [trial for trial in result.search.trials if trial.reached]
    assert raced == [len(reached)] and len(reached) > 1
    assert reached[-1].kept and reached[-1].act_bits == 32


@pytest.mark.parametrize(("target", "bits"), [("ort", 32), ("qnn", 16)])
def test_the_last_files_have_the_widest_activations_of_the_target(target: str, bits: int) -> None:
    options = config(target=target)
    plan, _ = make_plan(RESNET, options)
    wider = _wider(options, plan)
    assert wider is not None and wider.act_bits == bits
    assert _wider(wider, plan) is None


def test_activations_are_float_where_the_goal_wants_it() -> None:
    goal = worst(uniform(8)) + 6
    result = made(until=f"sqnr={goal:.1f}", weight_range="full")
    assert worst(result) >= goal - 0.05
    assert result.config.act_bits == 32
    assert result.search is not None
    assert [trial.act_bits for trial in result.search.trials][-1] == 32


def test_the_nearest_file_is_kept_where_none_reaches_the_goal(tmp_path: Path) -> None:
    result = made(until="sqnr=150")
    assert result.search is not None and result.search.missed is not None
    assert "goal sqnr=150 is not reached: in the nearest file SQNR" in result.search.missed
    assert worst(result) >= worst(uniform(8))
    output, report = tmp_path / "out.onnx", tmp_path / "report.json"
    arguments = [RESNET, output, "--calib", CALIBRATION, "--samples", 64, "--method", "nearest"]
    options = ["--until", "sqnr=150", "--quiet", "--report", report]
    assert main([str(each) for each in (*arguments, *options)]) == GateError.exit_code
    assert output.exists()
    search = json.loads(report.read_text())["search"]
    assert search["goal"] == "sqnr=150" and search["missed"] and search["trials"]


def test_a_missed_gate_has_the_file_of_the_search_and_writes_none(tmp_path: Path) -> None:
    samples, output = np.load(CALIBRATION)["input"][:96], tmp_path / "out.onnx"
    options = config(until="sqnr=1", min_sqnr=90, method="nearest")
    with pytest.raises(GateError, match="below `min_sqnr` 90") as caught:
        quantize(RESNET, samples, options, evaluation=EVALUATION, output=output)
    result = caught.value.result
    assert isinstance(result, QuantizeResult) and result.search is not None
    assert result.advice is not None
    assert not output.exists()


def test_a_drop_is_counted_by_labels() -> None:
    result = made(until="drop=20")
    assert result.verification is not None and result.verification.accuracy is not None
    assert result.verification.accuracy.drop_points <= 20
    samples = np.load(CALIBRATION)["input"][:64]
    with pytest.raises(CalibrationError, match="no labels"):
        quantize(RESNET, samples, config(until="drop=1"))


def test_a_metric_of_the_user_sees_all_outputs_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits_metric.py").write_text(
        "def right(outputs, labels):\n"
        "    (scores,) = outputs.values()\n"
        "    assert scores.shape == (len(labels), 10)\n"
        "    return (scores.argmax(1) == labels).mean()\n"
        "def broken(outputs, labels):\n"
        "    raise KeyError('of mine')\n"
    )
    monkeypatch.chdir(tmp_path)
    samples = np.load(CALIBRATION)["input"][:64]
    options = config(until="metric=digits_metric:right>=0.5", method="nearest")
    result = quantize(RESNET, samples, options, evaluation=EVALUATION)
    assert result.search is not None and result.search.missed is None
    assert "digits_metric:right is 0." in result.search.trials[-1].told
    with pytest.raises(ConfigError, match="the metric raised KeyError"):
        broken = config(until="metric=digits_metric:broken", method="nearest")
        quantize(RESNET, samples, broken, evaluation=EVALUATION)


def test_a_size_is_filled_and_kept() -> None:
    limit = (size(uniform(4)) + size(uniform(8))) // 2
    result = made(size=limit)
    assert size(uniform(4)) < size(result) <= limit
    assert worst(result) > worst(uniform(4))
    with pytest.raises(ConfigError, match="option `size`: the smallest file takes"):
        made(size=1000)


def test_the_settings_in_the_file_make_it_again() -> None:
    result = made(until="sqnr=1")
    samples = np.load(CALIBRATION)["input"][:96]
    again = quantize(RESNET, samples, result.config, evaluation=EVALUATION)
    for node, rounding in result.roundings.items():
        np.testing.assert_array_equal(rounding.codes, again.roundings[node].codes)


def test_two_files_tell_what_is_predicted_beside_the_noise() -> None:
    """Of errors that are predicted ten too high, and noise that is half of the true ones."""
    found = [Proposal(bits={}, cost=at, error=10.0 + 2.0 * (20 - at)) for at in range(21)]
    noise = [0.1 * (20 - at) for at in range(21)]  # 1 at the tenth, and less behind it
    measured = [(found[at].error, noise[at]) for at in (20, 18)]
    assert _next(found, measured, -1, 18) == 11
    assert _next(found, measured[:1], -1, 20) < 20
    assert _next(found, [*measured, (found[9].error, noise[9])], 9, 18) == 11
    assert _next(found, [(found[0].error, math.inf)], 0, 21) == 20
