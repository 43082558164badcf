"""Layers read tensors of their own where others read the same at 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from layered_models import layered
from small_models import build

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.plan import make_plan
from onnx_attnround.plan.split_inputs import part_inputs

RESIDUAL = """
    g (float[N,4,6,6] x) => (float[N,4,6,6] y)
    <float[4,4,3,3] w0, float[4] b, float[4,4,3,3] w1, float[4,4,3,3] w2, float[4,4,3,3] w3>
    { c0 = Conv<pads=[1,1,1,1]>(x, w0, b)  r0 = Relu(c0)
      c1 = Conv<pads=[1,1,1,1]>(r0, w1, b)  r1 = Relu(c1)
      c2 = Conv<pads=[1,1,1,1]>(r1, w2, b)  a = Add(c2, r0)  r2 = Relu(a)
      y = Conv<pads=[1,1,1,1]>(r2, w3, b) }"""


def parted(model: ir.Model, **options: Any) -> ir.Model:
    config = QuantConfig(**options)
    return part_inputs(model, make_plan(model, config, quantise_activations=True), config)


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


def test_a_parted_stream_is_worth_decibels(
    monkeypatch: pytest.MonkeyPatch, models_dir: Path
) -> None:
    feeds = {"input": np.load(models_dir / "digits_calib.npz")["input"][:128]}
    config = QuantConfig(weight_bits=8, act_bits=4, steps=0)  # little is left to chance

    def sqnr() -> float:
        verification = quantize(models_dir / "digits_resnet.onnx", feeds, config).verification
        assert verification is not None
        return verification.outputs[0].sqnr_db or 0.0

    with_parting = sqnr()
    monkeypatch.setattr("onnx_attnround.pipeline.part_inputs", lambda model, plan, config: model)
    assert with_parting > sqnr() + 0.5
