"""Goals as text: what they mean, and what is no goal."""

from __future__ import annotations

import pytest

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError
from onnx_attnround.goals import Goal


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("drop=0.5", Goal(kind="drop", bound=0.5)),
        ("drop = .5", Goal(kind="drop", bound=0.5)),
        ("agreement=99", Goal(kind="agreement", bound=99.0)),
        ("sqnr=-3", Goal(kind="sqnr", bound=-3.0)),
        ("sqnr=3e1", Goal(kind="sqnr", bound=30.0)),
        ("metric=mine:f1", Goal(kind="metric", bound=None, function="mine:f1")),
        ("metric=my.own:f1 >= 0.9", Goal(kind="metric", bound=0.9, function="my.own:f1")),
    ],
)
def test_a_goal_is_a_figure_and_a_bound(text: str, goal: Goal) -> None:
    assert Goal.parse(text) == goal
    assert Goal.parse(str(goal)) == goal


@pytest.mark.parametrize(
    "text",
    ["", "drop", "drop=", "drop=much", "loss=1", "drop=-1", "agreement=101", "sqnr=1e999"]
    + ["metric=f1", "metric=mine:f1>=", "metric=mine:f1<=2", "drop=0.5,sqnr=3"],
)
def test_anything_else_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ConfigError, match="goal"):
        Goal.parse(text)
    with pytest.raises(ConfigError, match="option `until`: .*goal"):
        QuantConfig(until=text)


def test_a_config_holds_a_goal_in_one_form() -> None:
    assert QuantConfig(until="drop = .50").until == "drop=0.5"


@pytest.mark.parametrize(
    "pair",
    [
        {"until": "drop=1", "mean_bits": 4},
        {"until": "drop=1", "size": "1MB"},
        {"size": 1000, "mean_bits": 4},
    ],
)
def test_one_setting_decides_the_bits(pair: dict[str, object]) -> None:
    first, second = sorted(pair, key=["mean_bits", "size", "until"].index)
    with pytest.raises(ConfigError, match=f"`{first}` and `{second}` each decide the bits"):
        QuantConfig.parse(pair)


def test_settings_beside_a_goal_that_have_no_effect_are_told() -> None:
    assert QuantConfig(until="drop=1", weight_bits=4).idle() == [
        "option `weight_bits` has no effect: `until` decides the bits"
    ]
    assert QuantConfig(prefer="speed").idle() == [
        "option `prefer` has no effect: there is no `until`"
    ]
