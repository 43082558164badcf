"""The first activations stay float where that is what the outputs need, and it costs little."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import quantize
from onnx_attnround.records import Array

FRAGILE = """g (float[N,3,16,16] x) => (float[N,8,8,8] y)
    <float[4,3,1,1] a, float[4] shift, float[64,4,3,3] b, float[64,64,3,3] c, float[8,64,1,1] d>
    { p = Conv(x, a, shift)
      q = Relu(p)
      r = Conv<strides=[2,2], pads=[1,1,1,1]>(q, b)
      s = Relu(r)
      t = Conv<pads=[1,1,1,1]>(s, c)
      u = Relu(t)
      y = Conv(u, d) }"""


def model_of(*, fragile: bool) -> tuple[ir.Model, Array]:
    """Where ``fragile``, what the layers behind tell apart are differences beside a large sum."""
    model, rng = build(FRAGILE), np.random.default_rng(0)
    x = rng.normal(size=(160, 3, 16, 16)).astype(np.float32)
    for value in model.graph.initializers.values():
        if value.name == "shift":
            values = np.full(4, 40.0 if fragile else 0.5)
        else:
            shape = value.const_value.shape.numpy()
            values = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        if value.name == "b" and fragile:
            values -= values.mean(1, keepdims=True)  # blind to what all four have in common
        value.const_value = ir.tensor(values.astype(np.float32), name=value.name)
    return model, x


def converted(*, fragile: bool, **options: Any) -> Any:
    model, x = model_of(fragile=fragile)
    return quantize(model, {"x": x}, {"threads": 1, "steps": 0, "smooth": "never", **options})


def note_of(result: Any) -> str:
    return next((note for note in result.notes if "stay float" in note), "")


@pytest.fixture(scope="module")
def rounded() -> Any:
    return converted(fragile=True, float_stem="never")


def test_a_fragile_stem_stays_float(rounded: Any) -> None:
    result = converted(fragile=True)
    assert "stay float" in note_of(result)
    assert "q" not in result.plan.activations
    assert {"s", "u"} <= result.plan.activations.keys()
    gained = result.verification.outputs[0].sqnr_db - rounded.verification.outputs[0].sqnr_db
    assert gained > 3


def test_never_means_never(rounded: Any) -> None:
    assert not note_of(rounded)
    assert "q" in rounded.plan.activations


def test_a_sound_stem_is_rounded() -> None:
    result = converted(fragile=False)
    assert not note_of(result)
    assert "q" in result.plan.activations
