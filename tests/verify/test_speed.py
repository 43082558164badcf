"""How sure it is that one of two models is slower, and where their time goes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import quantize
from onnx_attnround.graph import input_specs
from onnx_attnround.samples import open_samples
from onnx_attnround.verify import Latency
from onnx_attnround.verify.speed import fastest


def latency(speedup: float, low: float, high: float, pairs: int) -> Latency:
    return Latency(
        batch=1, pairs=pairs, float_ms=1.0, quantised_ms=1.0, speedup=speedup, spread=(low, high)
    )


def test_the_error_is_the_deviation_of_medians() -> None:
    drawn = np.random.default_rng(0).normal(1.0, 0.1, size=(4000, 25))
    low, high = np.percentile(drawn, [25, 75])
    found = latency(1.0, float(low), float(high), 25).error
    assert found == pytest.approx(np.median(drawn, axis=1).std(), rel=0.05)


@pytest.mark.parametrize(
    ("speedup", "pairs", "slower"),
    [
        (0.95, 25, True),  # the quartiles hold 1, but the median of so many runs does not
        (0.95, 3, False),
        (1.02, 25, False),
        (0.5, 3, True),
    ],
)
def test_many_runs_tell_what_few_do_not(speedup: float, pairs: int, slower: bool) -> None:
    assert latency(speedup, speedup - 0.06, speedup + 0.06, pairs).slower is slower


CHAIN = """g (float[N,8,32,32] x) => (float[N,8,32,32] y)
    <float[64,8,3,3] a, float[8,64,3,3] b>
    { p = Conv<pads=[1,1,1,1]>(x, a)
      q = Relu(p)
      y = Conv<pads=[1,1,1,1]>(q, b) }"""


def test_the_time_of_each_kind_of_node_is_told_of_both_models() -> None:
    x = np.random.default_rng(0).normal(size=(24, 8, 32, 32)).astype(np.float32)
    result = quantize(build(CHAIN), {"x": x}, {"steps": 0, "keep_integer": True})
    assert result.verification is not None
    found = {each.op_type: each for each in result.verification.kernels}
    assert found["Conv"].float_ms > 0 and found["Conv"].quantised_ms == 0
    assert found["QLinearConv"].quantised_ms > 0 and found["QLinearConv"].float_ms == 0
    slowest = [max(each.float_ms, each.quantised_ms) for each in result.verification.kernels]
    assert slowest == sorted(slowest, reverse=True)
    whole = sum(each.float_ms for each in found.values())
    assert 0.1 < whole / result.verification.latency.float_ms < 10


def test_the_fastest_is_found_wherever_it_stands() -> None:
    large, small = build(CHAIN), build(CHAIN.replace("32,32] y", "1,1] y"))
    for node in small.graph:
        if node.op_type == "Conv":
            node.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 0, 0])
            node.attributes["strides"] = ir.AttrInt64s("strides", [10, 10])
    x = np.random.default_rng(0).normal(size=(4, 8, 32, 32)).astype(np.float32)
    samples = open_samples({"x": x}, input_specs(large))
    assert fastest([large, small, large], samples, 4) == 1
    assert fastest([small, large], samples, 4) == 0
