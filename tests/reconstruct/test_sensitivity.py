"""sensitivity: errors of the outputs by layer and width, against models quantised in earnest."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from choosing_models import CHOOSING, choosing
from layered_models import LAYERED, layered, noise
from small_models import build

from onnx_attnround import QuantConfig, graph
from onnx_attnround.context import Run
from onnx_attnround.plan import make_plan as plan_model
from onnx_attnround.reconstruct.layerwise import round_plain
from onnx_attnround.reconstruct.sensitivity import (
    LEAST_SAMPLES,
    PROBE_SAMPLES,
    errors_alone,
    layer_errors,
)
from onnx_attnround.records import BitAllocation, Event, LayerErrors
from onnx_attnround.runtime.session import open_session
from onnx_attnround.samples import open_samples
from onnx_attnround.simplify import simplify

MODELS = Path(__file__).resolve().parents[2] / "models"


def config(**options: Any) -> QuantConfig:
    return QuantConfig.parse({"threads": 1, **options})


def measured(model: ir.Model, feeds: Any, **options: Any) -> LayerErrors:
    plan = plan_model(model, config(), quantise_activations=True)
    samples = open_samples(feeds, graph.input_specs(model))
    return layer_errors(model, plan, samples, Run(config(**options)))


@cache
def digits() -> tuple[ir.Model, np.ndarray]:
    model, _ = simplify(graph.load(MODELS / "digits_resnet.onnx"))
    return model, np.load(MODELS / "digits_calib.npz")["input"][:PROBE_SAMPLES]


def test_it_is_the_error_of_the_model_with_one_layer_quantised() -> None:
    """A Conv without correlations to speak of: one layer, whose bias takes up the mean error."""
    model = build("g (float[N,6] x) => (float[N,4] y) <float[6,4] v, float[4] b>"
                  "{ y = Gemm(x, v, b) }")  # fmt: skip
    feeds = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    (errors,) = measured(model, feeds, bit_choices=[3, 4, 6]).values()
    plan = plan_model(model, config(), quantise_activations=True)
    wanted = open_session(model).run(None, {"x": feeds})[0]
    for bits in (3, 4, 6):
        allocation = BitAllocation(
            bits={plan.layers[0].node: bits}, coding_length={}, mean_bits=bits
        )
        (rounding,) = round_plain(model, plan, {}, allocation).values()
        weight = rounding.codes * rounding.scale[None]
        constants = {name: graph.tensor_value(model, name) for name in ("v", "b")}
        got = feeds @ weight + constants["b"]
        got -= (got - wanted).mean(0)
        plain = np.square(got - wanted).sum() / np.square(wanted).sum()
        assert errors[bits] == pytest.approx(plain, rel=0.35), bits


def test_errors_fall_with_the_bits_and_are_told_for_every_layer() -> None:
    events: list[Event] = []
    model, feeds = digits()
    plan = plan_model(model, config(), quantise_activations=True)
    samples = open_samples(feeds, graph.input_specs(model))
    errors = layer_errors(model, plan, samples, Run(config(), events.append))
    assert list(errors) == [layer.node for layer in plan.layers]
    for of_layer in errors.values():
        assert list(of_layer) == [2, 3, 4, 5, 6, 8]
        assert np.all(np.diff(list(of_layer.values())) < 0)
        assert 1e-9 < of_layer[8] < of_layer[2] < 10
    assert [event.done for event in events] == list(range(1, len(plan.layers) + 1))
    assert {event.stage for event in events} == {"measure"}
    again = layer_errors(model, plan, samples, Run(config(batch_size=7)))
    for node, of_layer in errors.items():
        assert again[node] == pytest.approx(of_layer, rel=0.05)


def test_what_does_not_reach_the_outputs_costs_little() -> None:
    """Two branches of one size, of which one counts a hundredth."""
    model = build("""
        g (float[N,6] x) => (float[N,6] y)
        <float[6,6] v, float[6,6] w, float[6,6] u, float hundredth = {0.01}>
        { h = MatMul(x, u)  a = MatMul(h, v)  b = MatMul(h, w)  c = Mul(b, hundredth)
          s = Add(a, c)  y = Relu(s) }""")
    feeds = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    errors = measured(model, feeds)
    loud, quiet = (errors[node.name] for node in list(model.graph)[1:3])
    assert 1e-6 < quiet[4] / loud[4] < 1e-3


@pytest.mark.parametrize("name", LAYERED)
def test_models_of_every_shape(name: str) -> None:
    model = layered(name)
    feeds = noise(model, 8, seed=1)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    errors = measured(model, feeds)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert errors
    for of_layer in errors.values():
        assert all(np.isfinite(error) and error >= 0 for error in of_layer.values())


def test_inputs_too_large_to_be_squared() -> None:
    model = build("g (float[N,6] x) => (float[N,6] y) <float[6,6] v, float[6,6] w>"
                  "{ a = MatMul(x, v)  r = Relu(a)  y = MatMul(r, w) }")  # fmt: skip
    feeds = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32) * np.float32(1e25)
    for of_layer in measured(model, feeds).values():
        assert of_layer[2] == 4.0**-2


def test_constant_layers_cost_nothing() -> None:
    model = build("g (float[N,6] x) => (float[N,6] y) <float[6,6] v, float[6,6] w>"
                  "{ a = MatMul(x, v)  r = Relu(a)  y = MatMul(r, w) }")  # fmt: skip
    for of_layer in measured(model, np.zeros((8, 6), np.float32)).values():
        assert set(of_layer.values()) == {0.0}


@pytest.mark.parametrize("name", CHOOSING)
def test_errors_are_those_on_the_choices_of_the_float_model(name: str) -> None:
    """Other rows or draws would cost as much as there is signal, whatever the bits."""
    model = choosing(name)
    errors = measured(model, noise(model, 40), bit_choices=[4, 6])
    assert all(0 <= cost[6] <= cost[4] < 0.25 for cost in errors.values())


def test_errors_alone_are_those_of_the_model_with_one_weight_rounded_to_nearest() -> None:
    model = build("g (float[N,6] x) => (float[N,5] y) <float[6,6] v, float[6,5] w>"
                  "{ a = MatMul(x, v)  r = Relu(a)  y = MatMul(r, w) }")  # fmt: skip
    x = np.random.default_rng(0).normal(size=(LEAST_SAMPLES, 6)).astype(np.float32)
    plan = plan_model(model, config(), quantise_activations=True)
    samples = open_samples(x, graph.input_specs(model))
    errors = errors_alone(model, plan, samples, Run(config(weight_bits=3)))
    nodes = [layer.node for layer in plan.layers]
    roundings = round_plain(
        model, plan, {}, BitAllocation(bits=dict.fromkeys(nodes, 3), coding_length={}, mean_bits=3)
    )
    exact = {layer.node: graph.tensor_value(model, layer.weight) for layer in plan.layers}
    wanted = np.maximum(x @ exact[nodes[0]], 0) @ exact[nodes[1]]
    assert list(errors) == nodes
    for node in nodes:
        weights = exact | {node: roundings[node].codes * roundings[node].scale[None]}
        got = np.maximum(x @ weights[nodes[0]], 0) @ weights[nodes[1]]
        share = np.square(got - wanted).sum() / np.square(wanted).sum()
        assert errors[node] == {3: pytest.approx(share, rel=1e-3)}
