"""Smoothing: the same function, in tensors and weights that quantise better."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import input_specs
from onnx_attnround.plan import make_plan
from onnx_attnround.records import Array, QuantPlan, Smoothing
from onnx_attnround.samples import open_samples
from onnx_attnround.smooth import find_smoothing, smoothed
from onnx_attnround.smooth.groups import find_groups
from tests.small_models import build, run

TOKENS, WIDTH = 12, 16

# What lies between the input x of a layer (weights w, v, u) and what can take up a scale.
FOLDS = {
    "layer normalisation": """
        t = LayerNormalization <axis = -1> (x, gain, shift)
        y = MatMul (t, w)
    """,
    "layer normalisation as primitives": """
        mean = ReduceMean <axes = [-1]> (x)
        centred = Sub (x, mean)
        square = Mul (centred, centred)
        variance = ReduceMean <axes = [-1]> (square)
        deviation = Sqrt (variance)
        normal = Div (centred, deviation)
        scaled = Mul (normal, gain)
        t = Add (shift, scaled)
        y = MatMul (t, w)
    """,
    "three readers, and one of the shape": """
        t = LayerNormalization <axis = -1> (x, gain, shift)
        q = MatMul (t, w)
        k = MatMul (t, v)
        y0 = Add (q, k)
        shape = Shape (t)
        y = Reshape (y0, shape)
    """,
    "the layer before, through a Relu": """
        h = MatMul (x, w)
        b = Add (shift, h)
        t = Relu (b)
        y = MatMul (t, v)
    """,
    "the upper half of a gated unit": """
        gate = MatMul (x, w)
        open = Sigmoid (gate)
        up = MatMul (x, v)
        t = Mul (open, up)
        y = MatMul (t, u)
    """,
    "the values of attention": """
        value = MatMul (x, w)
        biased = Add (value, shift)
        split = Reshape (biased, heads)
        byhead = Transpose <perm = [0, 2, 1, 3]> (split)
        turned = Transpose <perm = [0, 1, 3, 2]> (byhead)
        scores = MatMul (byhead, turned)
        shares = Softmax <axis = -1> (scores)
        more = MatMul (x, v)
        moresplit = Reshape (more, heads)
        values = Transpose <perm = [0, 2, 1, 3]> (moresplit)
        mixed = MatMul (shares, values)
        back = Transpose <perm = [0, 2, 1, 3]> (mixed)
        t = Reshape (back, joined)
        y = MatMul (t, u)
    """,
    "values out of a joint projection, gathered": """
        all = MatMul (x, wide)
        five = Reshape (all, parts)
        front = Transpose <perm = [2, 0, 3, 1, 4]> (five)
        query = Gather <axis = 0> (front, zero)
        key = Gather <axis = 0> (front, one)
        values = Gather <axis = 0> (front, two)
        turned = Transpose <perm = [0, 1, 3, 2]> (key)
        scores = MatMul (query, turned)
        shares = Softmax <axis = -1> (scores)
        mixed = MatMul (shares, values)
        back = Transpose <perm = [0, 2, 1, 3]> (mixed)
        t = Reshape (back, joined)
        y = MatMul (t, u)
    """,
    "values out of a joint projection, split": """
        all = MatMul (x, wide)
        query, key, value = Split <axis = -1> (all, thirds)
        turned = Transpose <perm = [0, 2, 1]> (key)
        scores = MatMul (query, turned)
        shares = Softmax <axis = -1> (scores)
        t = MatMul (shares, value)
        y = MatMul (t, u)
    """,
}
MULS = {
    "a normalisation that an Add reads too": """
        t = LayerNormalization <axis = -1> (x, gain, shift)
        h = MatMul (t, w)
        y = Add (h, t)
    """,
    "a GELU of primitives": """
        h = MatMul (x, w)
        e = Erf (h)
        s = Add (e, unit)
        g = Mul (h, s)
        t = Mul (g, half)
        y = MatMul (t, v)
    """,
}


def model_of(nodes: str) -> ir.Model:
    """A model of these nodes on x, a dynamic batch of tokens, whose channels differ much."""
    lines = "\n".join(line.strip() for line in nodes.strip().splitlines())
    return build(
        f"""
        agraph (float[batch, {TOKENS}, {WIDTH}] x) => (float[batch, {TOKENS}, {WIDTH}] y)
        <float[{WIDTH}, {WIDTH}] w, float[{WIDTH}, {WIDTH}] v, float[{WIDTH}, {WIDTH}] u,
         float[{WIDTH}, {3 * WIDTH}] wide, float[{WIDTH}] gain, float[{WIDTH}] shift,
         int64[4] heads = {{0, {TOKENS}, 4, 4}}, int64[3] joined = {{0, {TOKENS}, {WIDTH}}},
         int64[5] parts = {{0, {TOKENS}, 3, 4, 4}}, int64[3] thirds = {{16, 16, 16}},
         int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}},
         float unit = {{1}}, float half = {{0.5}}> {{
        {lines}
        }}
        """
    )


def plan_of(model: ir.Model, **config: object) -> QuantPlan:
    return make_plan(model, QuantConfig.of(config), quantise_activations=True)


def feed(samples: int = 2) -> Array:
    values = np.random.default_rng(1).normal(size=(samples, TOKENS, WIDTH))
    return (values * np.geomspace(0.1, 10, WIDTH)).astype(np.float32)


def decibels(expected: Array, got: Array) -> float:
    noise = float(np.square(got.astype(np.float64) - expected).sum())
    return 10 * np.log10(float(np.square(expected.astype(np.float64)).sum()) / max(noise, 1e-30))


def infer(model: ir.Model) -> ir.Model:
    """The model with the shapes of all its values."""
    import onnx

    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))


@pytest.mark.parametrize("name", [*FOLDS, *MULS])
def test_a_smoothed_model_computes_the_same(name: str) -> None:
    model = infer(model_of({**FOLDS, **MULS}[name]))
    plan = plan_of(model)
    (group,) = [group for group in find_groups(model, plan) if group.name == "t"]
    assert group.folds == (name in FOLDS)
    scale = np.geomspace(0.2, 5, WIDTH).astype(np.float32)
    result, observers = smoothed(model, plan, {"t": Smoothing(scale=scale, observer="mse")})
    assert decibels(run(model, {"x": feed()})[0], run(result, {"x": feed()})[0]) > 110
    nodes = [sum(1 for _ in each.graph) for each in (model, result)]
    assert nodes[1] - nodes[0] == (name in MULS)
    assert list(observers) == ["t" if name in FOLDS else "t/smooth"]


@pytest.mark.parametrize("name", FOLDS)
def test_the_tensor_itself_is_divided(name: str) -> None:
    model = infer(model_of(FOLDS[name]))
    value = next(v for node in model.graph for v in node.outputs if v.name == "t")
    scale = np.geomspace(0.2, 5, WIDTH).astype(np.float32)
    plan = plan_of(model)
    result, _ = smoothed(model, plan, {"t": Smoothing(scale=scale, observer="mse")})
    tensors = []
    for each in (model, result):
        each.graph.outputs.append(
            next(v for node in each.graph for v in node.outputs if v.name == value.name)
        )
        tensors.append(run(each, {"x": feed()})[1])
    assert decibels(tensors[0] / scale, tensors[1]) > 110


def test_an_identity_before_the_layers_becomes_the_mul() -> None:
    """What parts float readers from those of codes costs no node more."""
    model = infer(
        model_of("""
            t0 = LayerNormalization <axis = -1> (x, gain, shift)
            t = Identity (t0)
            h = MatMul (t, w)
            y = Add (h, t0)
        """)
    )
    scale = np.geomspace(0.2, 5, WIDTH).astype(np.float32)
    result, _ = smoothed(model, plan_of(model), {"t": Smoothing(scale=scale, observer="mse")})
    assert [n.op_type for n in result.graph] == ["LayerNormalization", "Mul", "MatMul", "Add"]
    assert decibels(run(model, {"x": feed()})[0], run(result, {"x": feed()})[0]) > 110


def test_channels_that_differ_are_smoothed_and_others_left() -> None:
    """A gain with an outlier is found; the same model without one keeps its weights."""
    model = infer(model_of(FOLDS["layer normalisation"]))
    samples = open_samples({"x": feed(32)}, input_specs(model))
    gains = {"even": np.ones(WIDTH, np.float32), "outlier": np.ones(WIDTH, np.float32)}
    gains["outlier"][3] = 60
    for name, gain in gains.items():
        constant = model.graph.initializers["gain"]
        constant.const_value = ir.Tensor(gain, name="gain")
        model.graph.initializers["shift"].const_value = ir.Tensor(0 * gain, name="shift")
        config = QuantConfig()
        found = find_smoothing(model, plan_of(model), samples, config, lambda event: None)["t"]
        if name == "outlier":
            assert found.scale is not None
            assert np.argmax(found.scale) == 3
            assert found.scale[3] > 2 * np.median(found.scale)
        else:
            assert found.scale is None or np.ptp(np.log(found.scale)) < 1


def test_tensors_of_their_own_range_and_shared_scales_stay() -> None:
    """For qnn each tensor is quantised: what lies between must not change its range."""
    model = infer(model_of(FOLDS["the layer before, through a Relu"]))
    assert not [g for g in find_groups(model, plan_of(model, target="qnn")) if g.name == "t"]
    model = infer(model_of(FOLDS["layer normalisation"]))
    assert [g.folds for g in find_groups(model, plan_of(model, target="qnn"))] == [True]
