"""Which tensors may have a range in each run."""

from __future__ import annotations

import pytest
from layered_models import layered
from small_models import build

from onnx_attnround import QuantConfig
from onnx_attnround.errors import ConfigError
from onnx_attnround.pipeline import make_plan
from onnx_attnround.pipeline.activations import plan_parted
from onnx_attnround.plan.dynamic import can_be_dynamic

# One MatMul reads what a Gelu of primitives makes, one what a convolution does, whose kernel
# writes codes; a Gemm and an Add read the rest.
MIXED = """
    g (float[N,4,8] x, float[N,8,6,1] z) => (float[N,4,8] y, float[N,8,6,8] v, float[N,5] u)
    <float[8,8] w0, float[8,8] w1, float[8,8,1,1] wc, float[8,8] w2, float[8,5] w3, float[5] b3>
    { a = MatMul(x, w0)  t = Tanh(a)  b = MatMul(t, w1)  y = Add(b, t)
      c = Conv(z, wc)  p = Transpose<perm=[0,2,3,1]>(c)  q = MatMul(p, w2)
      v = Transpose<perm=[0,3,1,2]>(q)
      m = ReduceMean<axes=[1], keepdims=0>(b)  s = Tanh(m)  u = Gemm(s, w3, b3) }"""


def candidates(**settings: object) -> tuple[str, ...]:
    config = QuantConfig.of(None, **settings)
    model, plan = plan_parted(build(MIXED), config, quantise_activations=True)
    return can_be_dynamic(model, plan)


def test_what_float_nodes_make_and_matmul_alone_reads() -> None:
    assert candidates() == ("x", "t/parted")


def test_widths_that_dynamic_quantisation_lacks_stay_static() -> None:
    assert candidates(activation_bits={"t": 16}) == ("x",)
    assert candidates(act_bits=16) == ()


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "qnn"])
def test_targets_that_do_not_multiply_so_are_told_of_static(target: str) -> None:
    with pytest.raises(ConfigError, match="`activations`: target '.*' takes static, got dynamic"):
        make_plan(layered("branches"), target=target, activations="dynamic")


def test_few_bits_cannot_be_dynamic() -> None:
    with pytest.raises(ConfigError, match="for `act_bits` of 8, got 4; give static"):
        make_plan(layered("branches"), act_bits=4, activations="dynamic")


def test_the_plan_tells_which_are() -> None:
    plan, _ = make_plan(build(MIXED), activations="dynamic")
    assert plan.dynamic == ("x", "t/parted")
    plan, _ = make_plan(build(MIXED))
    assert plan.dynamic == ()
