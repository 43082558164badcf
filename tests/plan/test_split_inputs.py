"""Layers read tensors of their own where others read the same at 8 bits, or in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from layered_models import layered
from small_models import build

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.pipeline import activations
from onnx_attnround.plan import make_plan
from onnx_attnround.plan.split_inputs import part_floats, part_layers

RESIDUAL = """
    g (float[N,4,6,6] x) => (float[N,4,6,6] y)
    <float[4,4,3,3] w0, float[4] b, float[4,4,3,3] w1, float[4,4,3,3] w2, float[4,4,3,3] w3>
    { c0 = Conv<pads=[1,1,1,1]>(x, w0, b)  r0 = Relu(c0)
      c1 = Conv<pads=[1,1,1,1]>(r0, w1, b)  r1 = Relu(c1)
      c2 = Conv<pads=[1,1,1,1]>(r1, w2, b)  a = Add(c2, r0)  r2 = Relu(a)
      y = Conv<pads=[1,1,1,1]>(r2, w3, b) }"""


def parted(model: ir.Model, **options: Any) -> ir.Model:
    config = QuantConfig(**options)
    return part_layers(model, make_plan(model, config, quantise_activations=True), config)


def test_a_stream_that_is_added_too_is_parted() -> None:
    model = build(RESIDUAL)
    result = parted(model, act_bits=4)
    nodes = {node.name: node for node in result.graph}
    assert nodes["Conv_1"].inputs[0].name == "r0/parted"
    assert [value.name for value in nodes["Add_0"].inputs] == ["c2", "r0"]
    assert sum(node.op_type == "Identity" for node in result.graph) == 1
    assert all(node.op_type != "Identity" for node in model.graph)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_wide_activations_need_no_parting(bits: int) -> None:
    model = build(RESIDUAL)
    assert parted(model, act_bits=bits) is model


def test_nothing_to_part() -> None:
    model = layered("chain")
    assert parted(model, act_bits=4) is model


def test_the_stream_keeps_eight_bits_and_the_layer_reads_four() -> None:
    model = build(RESIDUAL)
    feeds = {"x": np.random.default_rng(0).normal(size=(64, 4, 6, 6)).astype(np.float32)}
    result = quantize(model, feeds, QuantConfig(weight_bits=8, act_bits=4, steps=10))
    bits = {name: spec.bits for name, spec in result.plan.activations.items()}
    assert (bits["r0"], bits["r0/parted"], bits["r1"]) == (8, 4, 4)
    nodes = list(result.model.graph)
    assert all(node.op_type != "Identity" for node in nodes)
    conv = next(node for node in nodes if node.name == "Conv_1")
    clip = conv.inputs[0].producer().inputs[0].producer()
    assert clip.op_type == "Clip"
    added = next(node for node in nodes if node.op_type == "Add").inputs[1].producer()
    assert added.inputs[0].producer().op_type == "QuantizeLinear"
    assert {"Conv_0", "Conv_1", "Conv_2"} <= set(result.checked.fusion.integer)


@pytest.mark.slow
def test_a_parted_stream_is_worth_decibels(
    monkeypatch: pytest.MonkeyPatch, models_dir: Path
) -> None:
    feeds = {"input": np.load(models_dir / "digits_calib.npz")["input"][:256]}
    config = QuantConfig(weight_bits=8, act_bits=3, steps=0, smooth="never")

    def sqnr() -> float:
        result = quantize(
            models_dir / "digits_resnet.onnx",
            feeds,
            config,
            evaluation=models_dir / "digits_eval.npz",
        )
        assert result.verification is not None
        return result.verification.outputs[0].sqnr_db or 0.0

    with_parting = sqnr()
    monkeypatch.setattr(activations, "part_layers", lambda model, plan, config: model)
    assert with_parting > sqnr() + 0.5


CONV = "Conv<pads=[1,1,1,1]>"
ENCODER = """
    g (float[N,4,6] x) => (float[N,4,6] y)
    <float[6,6] m, float[6] b, float[6,9] up, float[9,6] down, float[6] one, float[6] zero>
    { n = LayerNormalization(x, one, zero)  p = MatMul(n, m)  q = Add(p, b)  r = Add(q, n)
      o = LayerNormalization(r, one, zero)  u = MatMul(o, up)  g = Relu(u)  d = MatMul(g, down)
      s = Add(d, o)  y = LayerNormalization(s, one, zero) }"""


def float_reads(model: ir.Model, target: str, **options: Any) -> dict[str, list[str]]:
    """What each node reads that is parted from others: names of nodes by tensor."""
    config = QuantConfig(target=target, **options)
    result = part_floats(model, make_plan(model, config, quantise_activations=True), config)
    parts = [node for node in result.graph if node.op_type == "Identity"]
    return {
        str(node.inputs[0].name): sorted(str(reader.name) for reader in node.outputs[0].consumers())
        for node in parts
        if node.inputs[0] is not None
    }


@pytest.mark.parametrize("target", ["ort", "ort-arm", "openvino"])
def test_float_nodes_read_what_was_computed_in_float(target: str) -> None:
    assert float_reads(build(ENCODER), target) == {"n": ["MatMul_0"], "o": ["MatMul_1"]}


def test_in_tensorrt_the_shortcut_of_a_layer_has_codes() -> None:
    """The Add behind a MatMul is fused with it if its other operand is quantised."""
    assert float_reads(build(ENCODER), "tensorrt") == {"n": ["MatMul_0"]}


def test_where_each_tensor_has_codes_nothing_is_parted() -> None:
    assert float_reads(build(ENCODER), "qnn") == {}


@pytest.mark.parametrize(
    ("body", "ort", "openvino"),
    [
        # What an integer Conv writes are codes; without a Q on its output it is a float.
        (f"a = {CONV}(x, w1) r = Relu(a) e = Exp(r) b = {CONV}(r, w2) y = Add(b, e)",
         {}, {"r": ["Conv_1"]}),
        # So does an Add between integer layers; what only moves codes has no float either.
        (f"a = {CONV}(x, w1) b = {CONV}(a, w2) s = Add(a, b) e = Exp(s) c = {CONV}(s, w2) "
         "y = Mul(c, e)", {}, {"a": ["Conv_1"], "s": ["Conv_2"]}),
        # An input, and what a float node makes.
        (f"e = Exp(x) a = {CONV}(x, w1) h = HardSwish(a) b = {CONV}(h, w2) y = Sum(b, h, e)",
         {"x": ["Conv_0"], "h": ["Conv_1"]}, {"x": ["Conv_0"], "h": ["Conv_1"]}),
        # An output of the model is read in float.
        (f"z = Sqrt(x) y = {CONV}(z, w1)", {"z": ["Conv_0"]}, {"z": ["Conv_0"]}),
    ],
)  # fmt: skip
def test_who_reads_codes(
    body: str, ort: dict[str, list[str]], openvino: dict[str, list[str]]
) -> None:
    shape = "float[N,4,6,6]"
    outputs = ", ".join(f"{shape} {name}" for name in "yz" if f"{name} =" in body)
    text = f"g ({shape} x) => ({outputs}) <float[4,4,3,3] w1, float[4,4,3,3] w2> {{ {body} }}"
    model = build(text)
    assert float_reads(model, "ort") == ort
    assert float_reads(model, "openvino") == openvino


def test_in_the_file_the_residual_reads_before_the_q() -> None:
    model = build(ENCODER)
    feeds = {"x": np.random.default_rng(0).normal(size=(64, 4, 6)).astype(np.float32)}
    result = quantize(model, feeds, QuantConfig(steps=0))
    made = {node.name: node for node in result.model.graph}
    assert made["Add_1"].inputs[1].producer().op_type == "LayerNormalization"
    assert made["MatMul_0"].inputs[0].producer().op_type == "DequantizeLinear"
    assert all(node.op_type != "Identity" for node in result.model.graph)
    assert set(result.checked.fusion.integer) == {"MatMul_0", "MatMul_1", "MatMul_2"}
