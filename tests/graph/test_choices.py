"""A copy that is given the choices and draws of a model goes its way, to the same numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from choosing_models import CHOOSING, choosing
from small_models import build, random_feeds, run

from onnx_attnround.graph import choices, parted_choices, take_choices, with_outputs


@pytest.mark.parametrize("name", CHOOSING)
def test_a_copy_on_the_choices_of_the_model_computes_the_same(name: str) -> None:
    model = choosing(name)
    copy = model.clone()
    taken = take_choices(copy, model, choices(model.graph, {"first"}))
    assert len(taken) == 1
    feeds = random_feeds(model)
    expected, *lent = run(with_outputs(model, ["y", *taken.values()]), feeds)
    (got,) = run(copy, {**feeds, **dict(zip(taken, lent, strict=True))})
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", CHOOSING)
def test_nothing_is_left_that_chooses_or_draws(name: str) -> None:
    model = choosing(name)
    copy = model.clone()
    take_choices(copy, model, choices(model.graph, {"first"}))
    assert choices(copy.graph, {"first"}) == ()


def test_what_no_change_reaches_is_no_choice() -> None:
    model = build("""g (float[N,4] x) => (float[N,4] y, int64[N,1] z) <float[4,4] w>
        { z = ArgMax<axis=1>(x)  y = MatMul(x, w) }""")
    assert choices(model.graph, {"MatMul_0"}) == ()
    assert choices(model.graph, set()) == ()


def test_shapes_and_codes_are_no_choices() -> None:
    model = build("""g (float[N,4] x) => (float[N,4] y) <float[4,4] w, float s, uint8 zero = {3}>
        { a = MatMul(x, w)  n = Shape(a)  q = QuantizeLinear(a, s, zero)
          d = DequantizeLinear(q, s, zero)  y = Reshape(d, n) }""")
    assert choices(model.graph, {"MatMul_0"}) == ()


def test_the_values_of_a_topk_are_those_of_the_copy_in_the_rows_of_the_model() -> None:
    model = build("""g (float[1,5] x) => (float[1,2] best) <float[5] w, int64[1] k = {2}>
        { [scale] a = Mul(x, w)  best, i = TopK(a, k) }""")
    copy = model.clone()
    copy.graph.initializers["w"].const_value = ir.tensor(np.float32([5, 4, 3, 2, 1]), name="w")
    assert take_choices(copy, model, ["TopK_0"]) == {"i": "i"}
    (got,) = run(copy, {"x": np.ones((1, 5), np.float32), "i": np.int64([[4, 0]])})
    np.testing.assert_array_equal(got, [[1, 5]])


def test_nodes_of_the_copy_alone_are_changes() -> None:
    model = choosing("top rows")
    copy = model.clone()
    assert parted_choices(model, copy) == ()
    copy.graph.node("first").name = "another"
    assert parted_choices(model, copy) == ("TopK_0",)
