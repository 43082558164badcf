"""Chains of exporters: factors and terms behind layers, hard-sigmoid and hard-swish."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from simplified import check, ops
from small_models import build

NUMBERS = (
    "float three = {3}, float[1] three1 = {3}, float zero = {0}, float six = {6}, "
    "float five = {5}, float sixth = {0.16666667}, float two = {2}, float[6] c, "
    "float[1,6,1,1] c4, float[6,1,1] c3, float[1,1,1,6] last"
)


def behind_conv(body: str, op: str = "Conv(x, w, b)", weight: str = "6,4,3,3") -> ir.Model:
    return build(
        f"g (float[N,4,8,8] x) => (float[N,6,h,v] y) "
        f"<float[{weight}] w, float[6] b, {NUMBERS}> {{ a = {op} {body} }}"
    )


@pytest.mark.parametrize(
    "body",
    [
        "m = Mul(a, two) y = Add(m, three1)",
        "m = Mul(c4, a) y = Add(c3, m)",
        "m = Div(a, c3) y = Sub(m, c4)",
        "m = Sub(two, a) y = Add(m, c3)",
    ],
)
@pytest.mark.parametrize(
    ("op", "weight"),
    [
        ("Conv(x, w, b)", "6,4,3,3"),
        ("Conv(x, w)", "6,4,3,3"),
        ("ConvTranspose<group=2>(x, w, b)", "4,3,2,2"),
    ],
)
def test_factors_and_terms_go_into_the_layer(body: str, op: str, weight: str) -> None:
    result, _ = check(behind_conv(body, op, weight))
    assert ops(result) == ["ConvTranspose" if op.startswith("ConvTranspose") else "Conv"]


@pytest.mark.parametrize("op", ["Gemm(x, w, b)", "Gemm<transB=1>(x, t)"])
def test_factors_and_terms_go_into_a_gemm(op: str) -> None:
    model = build(
        f"g (float[3,4] x) => (float[3,6] y) <float[4,6] w, float[6,4] t, float[6] b, {NUMBERS}> "
        f"{{ a = {op} m = Mul(a, c) y = Add(m, three) }}"
    )
    assert ops(check(model)[0]) == ["Gemm"]


@pytest.mark.parametrize(
    "body",
    [
        "m = Mul(a, a) y = Tanh(m)",  # no constant
        "m = Div(two, a) y = Tanh(m)",  # no factor
        "m = Mul(a, last) y = Exp(m)",  # along another axis
        "m = Mul(a, two) y = Add(m, a)",  # others read what comes before
    ],
)
def test_what_is_no_factor_per_channel_stays(body: str) -> None:
    model = build(
        f"g (float[N,4,8,8] x) => (float[N,6,8,6] y) "
        f"<float[6,4,1,3] w, float[6] b, {NUMBERS}> {{ a = Conv(x, w, b) {body} }}"
    )
    assert len(ops(check(model)[0])) == 3


GATES = {
    "clip": "g = Clip(p, zero, six)",
    "min of max": "q = Max(p, zero) g = Min(q, six)",
    "max of min": "q = Min(six, p) g = Max(zero, q)",
    "min of relu": "q = Relu(p) g = Min(q, six)",
    "relu of min": "q = Min(p, six) g = Relu(q)",
}
SWISHES = {
    "product, Div": "m = Mul(x, g) y = Div(m, six)",
    "product, Mul": "m = Mul(g, x) y = Mul(m, sixth)",
    "gate, Div": "m = Div(g, six) y = Mul(x, m)",
    "gate, Mul": "m = Mul(sixth, g) y = Mul(m, x)",
    "tensor, Div": "m = Div(x, six) y = Mul(m, g)",
    "tensor, Mul": "m = Mul(x, sixth) y = Mul(g, m)",
}


def line(body: str, add: str = "Add(x, three)", opset: int = 17) -> ir.Model:
    return build(
        f"g (float[N,4] x) => (float[N,4] y) <{NUMBERS}> {{ p = {add} {body} }}", opset=opset
    )


@pytest.mark.parametrize("add", ["Add(x, three)", "Add(three1, x)"])
@pytest.mark.parametrize("swish", SWISHES)
@pytest.mark.parametrize("gate", GATES)
def test_hard_swish_in_each_manner(gate: str, swish: str, add: str) -> None:
    result, _ = check(line(f"{GATES[gate]} {SWISHES[swish]}", add))
    assert ops(result) == ["HardSigmoid", "Mul"]


@pytest.mark.parametrize("body", ["y = Div(g, six)", "m = Mul(g, sixth) y = Exp(m)"])
@pytest.mark.parametrize("gate", GATES)
def test_hard_sigmoid_alone(gate: str, body: str) -> None:
    result, _ = check(line(f"{GATES[gate]} {body}"))
    assert ops(result) == ["HardSigmoid", *["Exp"] * ("Exp" in body)]


@pytest.mark.parametrize(
    "body",
    [
        "g = Clip(p, zero, six) m = Mul(x, g) y = Div(m, five)",  # another divisor
        "g = Clip(p, two, six) m = Mul(x, g) y = Div(m, six)",  # does not start at 0
        "g = Clip(p, zero, six) m = Mul(x, g) d = Div(m, six) y = Add(d, g)",  # the gate is read
        "g = Clip(p, zero, six) m = Mul(x, g) d = Div(m, six) y = Add(d, p)",  # the line is read
        "g = Clip(p, zero, six) m = Mul(x, g) y = Div(six, m)",  # divides the other way
        "g = Clip(p, zero) m = Mul(x, g) y = Div(m, six)",  # no upper bound
        "g = Clip(p, zero, six) m = Mul(g, g) y = Div(m, six)",  # squared
    ],
)
def test_other_gates_stay(body: str) -> None:
    result, _ = check(line(body))
    assert "HardSigmoid" not in ops(result)


def test_a_gate_behind_a_layer_is_clipped_by_its_q() -> None:
    """Squeeze and excitation: the line goes into the Conv, and no float node is left."""
    body = "y = HardSigmoid<alpha = 0.2, beta = 0.5>(a)"
    assert ops(check(behind_conv(body))[0]) == ["Conv", "Clip"]
    chain = "p = Add(a, three) g = Clip(p, zero, six) y = Div(g, six)"
    result, _ = check(behind_conv(chain))
    assert ops(result) == ["Conv", "Clip"]
    low, high = (value.const_value.numpy() for value in result.graph[1].inputs[1:])
    assert (low, high) == (0, 1)
    assert low.shape == high.shape == ()


def test_chains_between_layers_leave_two_nodes_each() -> None:
    body = (
        "m = Mul(a, two) s = Add(m, c3) p = Add(s, three) g = Clip(p, zero, six) "
        "q = Mul(s, g) r = Div(q, six) y = Conv(r, v)"
    )
    model = build(
        f"g (float[N,4,8,8] x) => (float[N,6,6,6] y) "
        f"<float[6,4,3,3] w, float[6] b, float[6,6,1,1] v, {NUMBERS}> "
        f"{{ a = Conv(x, w, b) {body} }}"
    )
    result, _ = check(model)
    assert ops(result) == ["Conv", "HardSigmoid", "Mul", "Conv"]
    assert np.isclose(result.graph[1].attributes.get_float("alpha"), 1 / 6)
