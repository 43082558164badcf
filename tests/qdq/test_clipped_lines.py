"""A HardSigmoid between integer layers: a Q that clips the line, and a table in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import build

from onnx_attnround import QuantizeResult, quantize
from onnx_attnround.runtime.session import open_session
from onnx_attnround.targets import get_target

NET = """net (float[n, 8, 10, 10] x) => (float[n, 8, 10, 10] y)
<float[16, 8, 1, 1] w, float[8, 16, 1, 1] u>
{
    a = Conv (x, w)
    h = HardSigmoid <alpha = ALPHA, beta = BETA> (a)
    s = Mul (a, h)
    y = Conv (s, u)
}"""
SWISH = NET.replace("h = HardSigmoid <alpha = ALPHA, beta = BETA> (a)\n", "s = HardSwish (a)\n")
SWISH = SWISH.replace("    s = Mul (a, h)\n", "")


def made(text: str, **settings: object) -> QuantizeResult:
    x = np.random.default_rng(0).normal(size=(32, 8, 10, 10)).astype(np.float32)
    return quantize(build(text), x, threads=1, keep_integer=True, **settings)


def line(alpha: float, beta: float) -> str:
    return NET.replace("ALPHA", str(alpha)).replace("BETA", str(beta))


def ops(result: QuantizeResult, folder: Path) -> list[str]:
    path = folder / "optimised.onnx"
    signed = result.plan.target.activation_signed
    open_session(result.model, threads=1, optimised_model=path, signed_activations=signed)
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("target", ["ort", "ort-arm"])
@pytest.mark.parametrize("text", [line(1 / 6, 0.5), line(0.2, 0.5), line(1.0, 0.0), SWISH])
def test_it_runs_in_integer_and_costs_no_accuracy(text: str, target: str, tmp_path: Path) -> None:
    result = made(text, target=target)
    found = ops(result, tmp_path)
    assert found.count("QLinearConv") == 2
    assert found.count("QLinearMul") == 1
    assert found.count("QLinearLeakyRelu") == 1
    assert "HardSigmoid" not in found
    in_float = made(text, target=replace(get_target(target), clipped_lines=frozenset()))
    assert ops(in_float, tmp_path).count("HardSigmoid") == 1
    lost = in_float.verification.outputs[0].sqnr_db - result.verification.outputs[0].sqnr_db
    assert lost < 1


@pytest.mark.parametrize(("alpha", "beta"), [(-0.2, 0.5), (0.2, 1.5), (0.2, -0.5)])
def test_a_line_that_no_q_can_clip_stays_float(alpha: float, beta: float, tmp_path: Path) -> None:
    result = made(line(alpha, beta))
    assert "HardSigmoid" in ops(result, tmp_path)
    assert len(result.checked.fusion.integer) == 2


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_other_runtimes_keep_it(target: str) -> None:
    kept = [node.op_type for node in made(line(0.2, 0.5), target=target).model.graph]
    assert "HardSigmoid" in kept
    assert "LeakyRelu" not in kept
