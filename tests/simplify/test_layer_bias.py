"""Each layer gets a bias of its own, one number per output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checked_conversion import convert
from small_models import build, build_proto, random_feeds, run

from onnx_attnround.simplify.layer_bias import give_own_bias

SHARED = """net (float[N,4,8,8] x) => (float[N,4,8,8] y)
<float[4,4,3,3] v, float[4,4,3,3] w, float[4] b> {
    h = Conv<pads = [1, 1, 1, 1]>(x, v, b)
    r = Relu(h)
    y = Conv<pads = [1, 1, 1, 1]>(r, w, b)
}"""
GROUPS = """net (float[N,4,5] x) => (float[N,6,10] y) <float[4,3,2] w, float[6] b> {
    h = ConvTranspose<group = 2, strides = [2]>(x, w, b)
    y = Relu(h)
}"""
READ_ELSEWHERE = """net (float[N,8] x) => (float[N,8] y) <float[8,8] v, float[8] b> {
    h = Gemm(x, v, b)
    y = Mul(h, b)
}"""


def gemms(bias: str) -> str:
    return f"""net (float[N,8] x) => (float[N,6] y)
<float[8,16] u, float[6,16] w, {bias} b> {{
    h = Gemm(x, u, b)
    r = Relu(h)
    y = Gemm<transB = 1>(r, w, b)
}}"""


@pytest.mark.parametrize("bias", ["float", "float[1]", "float[1,1]"])
def test_a_broadcast_bias_becomes_a_row_of_each_layer(bias: str) -> None:
    model = build(gemms(bias))
    feeds = random_feeds(model)
    expected = run(model, feeds)
    assert give_own_bias(model) == 2
    rows = [node.inputs[2] for node in model.graph if node.op_type == "Gemm"]
    assert [tuple(row.const_value.shape) for row in rows] == [(16,), (6,)]
    np.testing.assert_array_equal(run(model, feeds)[0], expected[0])


@pytest.mark.parametrize("text", [SHARED, READ_ELSEWHERE])
def test_a_bias_that_others_read_is_copied(text: str) -> None:
    model = build(text)
    feeds = random_feeds(model)
    expected = run(model, feeds)
    assert give_own_bias(model) == 1
    np.testing.assert_array_equal(run(model, feeds)[0], expected[0])
    assert give_own_bias(model) == 0


def test_a_bias_of_a_layer_s_own_stays() -> None:
    model = build(GROUPS)
    assert give_own_bias(model) == 0
    assert "b" in model.graph.initializers


@pytest.mark.parametrize("reconstruct", ["layer", "block"])
@pytest.mark.parametrize("act_bits", [8, 32])
@pytest.mark.parametrize("text", [gemms("float"), gemms("float[1]"), SHARED, READ_ELSEWHERE])
def test_models_with_such_biases(
    text: str, act_bits: int, reconstruct: str, tmp_path: Path
) -> None:
    model = build_proto(text)
    x = random_feeds(ir.from_proto(model))["x"]
    feeds = {"x": np.random.default_rng(0).normal(size=(64, *x.shape[1:])).astype(np.float32)}
    convert(
        model, tmp_path, [feeds], sqnr=20, weight_bits=6, act_bits=act_bits, reconstruct=reconstruct
    )


@pytest.mark.parametrize("target", ["qnn", "tensorrt", "ort"])
@pytest.mark.parametrize("reconstruct", ["layer", "block"])
def test_a_transposed_convolution_in_groups(
    reconstruct: str, target: str, tmp_path: Path
) -> None:
    feeds = {"x": np.random.default_rng(0).normal(size=(64, 4, 5)).astype(np.float32)}
    convert(build_proto(GROUPS), tmp_path, [feeds], target=target, reconstruct=reconstruct)
