"""Activations stay float where that is what the outputs need, and it costs little."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import quantize
from onnx_attnround.calibrate import float_tensors
from onnx_attnround.calibrate.float_tensors import by_worth
from onnx_attnround.calibrate.output_error import ChosenRanges, RoundedModel, choose_ranges
from onnx_attnround.graph import input_specs
from onnx_attnround.pipeline import activations
from onnx_attnround.records import Array
from onnx_attnround.samples import open_samples

FRAGILE = """g (float[N,3,16,16] x) => (float[N,8,8,8] y)
    <float[4,3,1,1] a, float[4] shift, float[64,4,3,3] b, float[64,64,3,3] c, float[8,64,1,1] d>
    { p = Conv(x, a, shift)
      q = Relu(p)
      r = Conv<strides=[2,2], pads=[1,1,1,1]>(q, b)
      s = Relu(r)
      t = Conv<pads=[1,1,1,1]>(s, c)
      u = Relu(t)
      y = Conv(u, d) }"""


FRAGILE_END = """g (float[N,3,16,16] x) => (float[N,8,8,8] y)
    <float[64,3,1,1] d, float[64,64,3,3] c, float[4,64,1,1] a, float[4] shift, float[8,4,3,3] b>
    { s = Conv<strides=[2,2]>(x, d)
      t = Relu(s)
      u = Conv<pads=[1,1,1,1]>(t, c)
      v = Relu(u)
      p = Conv(v, a, shift)
      q = Relu(p)
      y = Conv<pads=[1,1,1,1]>(q, b) }"""


def model_of(*, fragile: bool, text: str = FRAGILE) -> tuple[ir.Model, Array]:
    """Where ``fragile``, what the layer behind ``q`` tells apart is little beside a large sum."""
    model, rng = build(text), np.random.default_rng(0)
    x = rng.normal(size=(160, 3, 16, 16)).astype(np.float32)
    for value in model.graph.initializers.values():
        if value.name == "shift":
            values = np.full(4, 60.0 if fragile else 0.5)
        else:
            shape = value.const_value.shape.numpy()
            values = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        if value.name == "b" and fragile:
            values -= values.mean(1, keepdims=True)  # blind to what all four have in common
        value.const_value = ir.tensor(values.astype(np.float32), name=value.name)
    return model, x


def converted(*, fragile: bool, text: str = FRAGILE, **options: Any) -> Any:
    model, x = model_of(fragile=fragile, text=text)
    return quantize(model, {"x": x}, {"threads": 1, "steps": 0, "smooth": "never", **options})


def note_of(result: Any) -> str:
    return next((note for note in result.notes if "left in float" in note), "")


@pytest.fixture(scope="module")
def rounded() -> Any:
    return converted(fragile=True, float_tensors="never")


def test_a_fragile_end_stays_float() -> None:
    result = converted(fragile=True, text=FRAGILE_END)
    assert "'q'" in note_of(result)
    assert "q" not in result.plan.activations
    assert "t" in result.plan.activations


def test_a_fragile_stem_stays_float(rounded: Any) -> None:
    result = converted(fragile=True)
    assert "left in float" in note_of(result)
    assert "q" not in result.plan.activations
    assert {"s", "u"} <= result.plan.activations.keys()
    gained = result.verification.outputs[0].sqnr_db - rounded.verification.outputs[0].sqnr_db
    assert gained > 3


def test_the_ranges_of_the_others_are_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays float has drowned what they cost."""
    made: list[ChosenRanges] = []

    def choose(*given: Any) -> ChosenRanges:
        made.append(choose_ranges(*given))
        return made[-1]

    monkeypatch.setattr(activations, "choose_ranges", choose)
    result = converted(fragile=True)
    (again,) = made
    assert result.plan.activations.keys() == again.params.keys()
    assert {name: found.scale for name, found in result.ranges.params.items()} == {
        name: found.scale for name, found in again.params.items()
    }


def test_never_means_never(rounded: Any) -> None:
    assert not note_of(rounded)
    assert "q" in rounded.plan.activations


def test_a_sound_stem_is_rounded() -> None:
    result = converted(fragile=False)
    assert not note_of(result)
    assert "q" in result.plan.activations


def test_a_row_of_float_tensors_goes_from_none_to_all() -> None:
    result = converted(fragile=True, float_tensors="never", holdout=0)
    model, x = model_of(fragile=True)
    samples = open_samples({"x": x}, input_specs(model))
    given = (model, result.plan, result.ranges.params, samples, result.config)
    row = by_worth(*given)
    assert [len(each.tensors) for each in row] == list(range(len(row)))
    assert row[1].tensors == ("q",)
    assert set(row[-1].tensors) == set(result.plan.own(result.ranges.params))
    errors = [each.float_db for each in row]
    assert errors == sorted(errors, reverse=True)
    alone = RoundedModel(model, ["q"], samples, result.config)
    rest = RoundedModel(model, list(row[-1].tensors), samples, result.config)
    without = {n: p for n, p in result.ranges.params.items() if n != "q"}
    measured = 10 * np.log10(np.exp([alone.error(result.ranges.params), rest.error(without)]))
    assert measured[0] > measured[1]
    assert abs(measured[1] - row[1].float_db) < 3


@pytest.mark.parametrize(("poor", "most"), [(-80.0, 0.5), (80.0, 0.01)])
def test_more_stays_float_while_the_outputs_are_poor(
    poor: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = converted(fragile=True, float_tensors="never", holdout=0)
    model, x = model_of(fragile=True)
    samples = open_samples({"x": x}, input_specs(model))
    monkeypatch.setattr(float_tensors, "POOR", poor)
    monkeypatch.setattr(float_tensors, "SHARE", 0.01)
    monkeypatch.setattr(float_tensors, "SHARE_OF_POOR", 0.5)
    monkeypatch.setattr(float_tensors, "WORTH_DB", 0.01)
    given = (model, result.plan, result.ranges.params, samples, result.config)
    found = float_tensors.find_float_tensors(*given)
    assert bool(found.tensors) == (most > 0.01)
    assert found.share <= most
