"""What only feeds a Softmax has a range of scores, however far down its mask is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checked_conversion import convert
from small_models import build, build_proto

from onnx_attnround import QuantConfig
from onnx_attnround.calibrate import calibrate
from onnx_attnround.graph import input_specs
from onnx_attnround.records import QuantSpec
from onnx_attnround.samples import open_samples

LEAST = float(np.finfo(np.float32).min)
HEAD = "net (float[N,4,6] s, float[N,1,6] m) => (float[N,4,6] y)"
"""Scores, and a mask that is 1 where it masks."""

ADDED = HEAD + "<float k = {{{fill}}}> {{ b = Mul(m, k)  t = Add(s, b)  y = Softmax(t) }}"
WHERE = HEAD + (
    "<float k = {{{fill}}}> {{ c = Cast<to = 9>(m)  t = Where(c, k, s)  y = Softmax(t) }}"
)
SUBTRACTED = HEAD + (
    "<float one = {{1}}, float k = {{{large}}}> {{"
    "f = Sub(m, one)  g = Add(f, one)  b = Mul(g, k)  t = Sub(s, b)  y = Softmax(t) }}"
)
FLAGS = HEAD + (  # (keep - 1) * 10000
    "<float one = {{1}}, float k = {{{large}}}> {{ n = Neg(m)  b = Mul(n, k)  t = Add(s, b)"
    "  y = Softmax(t) }}"
)
SCALED_AND_MOVED = HEAD + (
    "<float k = {{{fill}}}, float d = {{2}}, int64[3] shape = {{0, 1, 24}},"
    " int64[3] back = {{0, 4, 6}}>"
    "{{ b = Mul(m, k)  u = Add(s, b)  v = Div(u, d)  w = Reshape(v, shape)  z = Reshape(w, back)"
    "  t = Transpose<perm = [0, 1, 2]>(z)  y = Softmax(t) }}"
)
BOUNDED_BELOW = HEAD + (  # as some exporters write it
    "<float k = {{{fill}}}> {{ b = Mul(m, k)  u = Add(s, b)  t = Max(u, k)  y = Softmax(t) }}"
)


def samples(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = (np.arange(6) >= rng.integers(2, 7, size=(32, 1, 1))).astype(np.float32)
    return {"s": 3 * rng.normal(size=(32, 4, 6)).astype(np.float32), "m": mask}


def ranges(
    model: ir.Model, feeds: dict[str, np.ndarray], bits: int = 8
) -> dict[str, tuple[float, float]]:
    """The range of each tensor of the graph, as its codes have it."""
    names = [v.name for node in model.graph for v in node.outputs if v.name != "c"]
    names += [name for name in model.graph.initializers if name in ("k",)]
    spec = QuantSpec(bits=bits, signed=False, symmetric=False)
    found = calibrate(
        model,
        dict.fromkeys(names, spec),
        open_samples(feeds, input_specs(model)),
        QuantConfig(threads=1),
        same_range={},
        on_event=lambda event: None,
    )

    def ends(name: str) -> tuple[float, float]:
        params = found.params[name]
        low = (spec.qmin - float(params.zero_point)) * float(params.scale)
        return low, (spec.qmax - float(params.zero_point)) * float(params.scale)

    return {name: ends(name) for name in names}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("fill", [-1e4, LEAST])
@pytest.mark.parametrize("text", [ADDED, WHERE, SUBTRACTED, FLAGS, SCALED_AND_MOVED, BOUNDED_BELOW])
def test_masks_need_no_range(text: str, fill: float, bits: int) -> None:
    found = ranges(build(text.format(fill=fill, large=-fill)), samples(), bits)
    below = math.log(6) + (bits + 1) * math.log(2)
    for name in found.keys() & {"t", "b", "k", "u", "v", "w", "z"}:
        low, high = found[name]
        assert max(abs(low), abs(high)) < 2.1 * (30 + below), name
    # A row's largest element and all that counts beside it lie within the range of the sum.
    assert found["t"][0] < -below / 2


def test_minus_infinity_needs_no_range() -> None:
    model = build(WHERE.format(fill=-1))
    model.graph.initializers["k"].const_value = ir.tensor(np.float32(-np.inf))
    found = ranges(model, samples())
    assert -60 < found["t"][0] < -5
    assert -60 < found["k"][0] < -5


def test_what_else_is_read_keeps_its_range() -> None:
    text = ADDED.format(fill=-1e4).replace("(float[N,4,6] y)", "(float[N,4,6] y, float[N,1,6] b)")
    found = ranges(build(text), samples())
    assert found["b"][0] == pytest.approx(-1e4, rel=0.01)
    assert found["t"][0] > -60


def test_rows_that_are_all_mask_do_not_count() -> None:
    feeds = samples()
    feeds["m"][3] = 1.0
    assert ranges(build(ADDED.format(fill=-1e4)), feeds)["t"][0] > -60


def test_scores_without_a_mask_keep_the_range_of_the_observer() -> None:
    feeds = samples()
    feeds["s"] /= 10
    feeds["m"][:] = 0
    low, high = ranges(build(ADDED.format(fill=-1e4)), feeds)["t"]
    assert low == pytest.approx(feeds["s"].min(), rel=0.2)
    assert high == pytest.approx(feeds["s"].max(), rel=0.2)


def test_before_opset_13_a_softmax_normalises_all_axes_behind() -> None:
    model = build(ADDED.format(fill=-1e4), opset=12)
    feeds = samples()
    rows = (feeds["s"] - 1e4 * feeds["m"]).reshape(32, 24).max(1)  # of axes 1 and 2
    floor = math.floor(rows.min()) - math.log(24) - 9 * math.log(2)
    assert ranges(model, feeds)["t"][0] == pytest.approx(floor, abs=0.3)


# --- whole models ------------------------------------------------------------------------

ATTENTION = """net (float[N,6,8] x, float[N,1,6] m) => (float[N,6,8] y)
<float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,8] wo, float k = {-1}> {
    q = MatMul(x, wq)
    h = MatMul(x, wk)
    v = MatMul(x, wv)
    p = Transpose<perm = [0, 2, 1]>(h)
    r = MatMul(q, p)
    c = Cast<to = 9>(m)
    b = Where(c, k, m)
    s = Add(r, b)
    a = Softmax(s)
    z = MatMul(a, v)
    y = MatMul(z, wo)
}"""


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("fill", [-1e4, LEAST, -np.inf])
def test_masked_attention_on_a_target_that_quantises_all(
    fill: float, act_bits: int, tmp_path: Path
) -> None:
    model = build_proto(ATTENTION)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "k"]
    mask = onnx.numpy_helper.from_array(np.float32(fill), "k")
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, mask])
    rng = np.random.default_rng(0)
    masks = (np.arange(6) >= rng.integers(2, 7, size=(64, 1, 1))).astype(np.float32)
    feeds = {"x": rng.normal(size=(64, 6, 8)).astype(np.float32), "m": masks}
    convert(model, tmp_path, [feeds], sqnr=20, target="qnn", act_bits=act_bits)
