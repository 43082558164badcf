"""Weights of convolutions in float: integers in the file, floats once it is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from small_models import build, run

from onnx_attnround import QuantizeResult, graph, quantize
from onnx_attnround.check import check
from onnx_attnround.runtime.session import open_session
from onnx_attnround.targets import get_target

CONVS = """
net (float[n, 16, 8, 8] x) => (float[n, 16, 8, 8] y)
<float[32, 16, 3, 3] w, float[32] b, float[32, 1, 3, 3] v, float[32, 16, 1, 1] t>
{
    h = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    r = Relu (h)
    d = Conv <pads = [1, 1, 1, 1], group = 32> (r, v)
    y = ConvTranspose (d, t)
}
"""


def in_float(bits: int, **settings: object) -> QuantizeResult:
    bits_of = {"weight_bits": bits, "first_last_bits": bits, "threads": 1}
    return quantize(build(CONVS), **{"act_bits": 32, **bits_of, **settings})


def optimised(model: ir.Model, folder: Path) -> set[str]:
    """The ops of the graph that ONNX Runtime runs."""
    path = folder / "optimised.onnx"
    open_session(model, threads=1, optimised_model=path)
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_convolutions_are_unpacked_at_loading(bits: int, tmp_path: Path) -> None:
    result = in_float(bits)
    assert {"DequantizeLinear", "Cast", "Mul"}.isdisjoint(optimised(result.model, tmp_path))
    codes = [
        v.dtype for v in result.model.graph.initializers.values() if v.dtype and v.shape.rank() > 1
    ]
    small = [dtype for dtype in codes if dtype.is_integer()]
    assert small == [ir.DataType.INT8 if bits == 8 else ir.DataType.INT4] * 3
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 16, 8, 8)).astype(np.float32)}
    got = run(result.model, feeds)[0]
    proto = ir.to_proto(graph.in_memory(result.model))
    np.testing.assert_allclose(got, ReferenceEvaluator(proto).run(None, feeds)[0], atol=1e-3)
    error = np.square(got - run(build(CONVS), feeds)[0]).mean() / np.square(got).mean()
    assert error < {2: 1.0, 4: 0.1, 8: 1e-3}[bits]


def test_the_check_reads_folded_weights_as_quantised() -> None:
    result = in_float(8)
    checked = check(result.model, get_target("ort"))
    assert checked.findings == ()
    assert dict(checked.fusion.weight_only) == {
        layer.node: layer.op_type for layer in result.plan.layers
    }


def test_runtimes_that_unpack_by_themselves_get_a_dequantizelinear() -> None:
    ops = [node.op_type for node in in_float(8, target="openvino").model.graph]
    assert ops.count("DequantizeLinear") == 3
    assert "Cast" not in ops
