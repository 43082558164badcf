"""Layers in front of a logarithm stay float."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import quantize
from onnx_attnround.config import QuantConfig
from onnx_attnround.plan import make_plan

SPECTRUM = """net (float[n, 40, 64] x) => (float[n, 40, 8] y)
<float[64, 33] re, float[64, 33] im, float[33, 16] bank, float[16, 8] w,
 float small = {1e-6}, float one = {1}>
{
    a = MatMul (x, re)
    b = MatMul (x, im)
    aa = Mul (a, a)
    bb = Mul (b, b)
    p = Add (aa, bb)
    m = Sqrt (p)
    f = MatMul (m, bank)
    g = BEHIND
    l = Log (g)
    y = MatMul (l, w)
}"""
REASON = "a logarithm reads what it computes"


def spectrum(behind: str = "Add (f, small)") -> ir.Model:
    model = build(SPECTRUM.replace("BEHIND", behind))
    bank = model.graph.initializers["bank"]
    places = np.linspace(0, 32, 16)
    peaks = np.clip(1 - np.abs(np.arange(33)[:, None] - places) / 2, 0, None)
    peaks -= 0.02 * (peaks == 0) * (np.random.default_rng(0).random(peaks.shape) < 0.1)
    bank.const_value = ir.tensor(peaks.astype(np.float32), name="bank")
    return model


def layers(model: ir.Model, **settings: object) -> list[str]:
    plan = make_plan(model, QuantConfig(**settings), quantise_activations=True)
    return [layer.weight for layer in plan.layers]


@pytest.mark.parametrize(
    "behind", ["Add (f, small)", "Max (f, small)", "Clip (f, small)", "Abs (f)"]
)
def test_what_a_spectrum_is_made_by_stays_float(behind: str) -> None:
    model = spectrum(behind)
    plan = make_plan(model, QuantConfig(), quantise_activations=True)
    assert [layer.weight for layer in plan.layers] == ["w"]
    assert [reason.startswith(REASON) for reason in plan.skipped.values()] == [True] * 3


@pytest.mark.parametrize(
    "behind", ["Add (f, one)", "Relu (f)", "Sigmoid (f)", "Clip (f, one)", "Clip (f, small, one)"]
)
def test_behind_an_activation_or_a_large_constant_nothing_is_lost(behind: str) -> None:
    assert layers(spectrum(behind)) == ["re", "im", "bank", "w"]


def test_a_network_with_bounded_activations_is_quantised_as_ever() -> None:
    text = """net (float[n, 8] x) => (float[n, 8] y)
    <float[8, 32] v, float[32, 16] w, float[16, 8] u, float low = {0}, float high = {6},
     float small = {1e-6}>
    { a = MatMul (x, v) b = Clip (a, low, high) c = MatMul (b, w) d = Clip (c, low, high)
      e = MatMul (d, u) f = Add (e, small) y = Log (f) }"""
    assert layers(build(text)) == ["v", "w"]


def test_who_includes_such_a_layer_has_it() -> None:
    model = spectrum()
    assert layers(model, include=["*"]) == ["re", "im", "bank", "w"]


def test_there_is_no_nan_behind_it() -> None:
    """Filters that let small values through between large ones would make some negative."""
    rng = np.random.default_rng(1)
    loud = rng.normal(size=(48, 40, 1)) * np.sin(np.arange(64) * 0.7)
    x = (loud + 1e-3 * rng.normal(size=(48, 40, 64))).astype(np.float32)
    model = build(SPECTRUM.replace("BEHIND", "Abs (f)"))
    found = quantize(model, x, threads=1).verification
    assert found is not None
    assert found.outputs[0].sqnr_db > 30
