"""A file is run as the runtime optimises it, on whatever the model is fed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checked_conversion import convert
from small_models import build_proto

from onnx_attnround.check import openvino_session

BRANCHES = """net (float[N,16] x, bool flag) => (float[N,4] y)
<float[32,16] u, float[4,32] v, float[4,32] w> {
    h = Gemm<transB = 1>(x, u)
    r = Relu(h)
    y = If(flag) <then_branch = t () => (float[N,4] p) { p = Gemm<transB = 1>(r, v) },
                  else_branch = e () => (float[N,4] q) { q = Gemm<transB = 1>(r, w) }>
}"""
SCALED = """net (float[N,16] x, float s) => (float[N,4] y) <float[16,4] w> {
    h = MatMul(x, w)
    y = Mul(h, s)
}"""
COUNTED = """net (float[N,16] x, int64 k) => (float[N,4] y) <float[16,4] w> {
    h = MatMul(x, w)
    c = Cast<to = 1>(k)
    y = Mul(h, c)
}"""


@pytest.mark.skipif(not openvino_session.available(), reason="OpenVINO is not installed")
@pytest.mark.parametrize(
    ("text", "scalar"),
    [
        (BRANCHES, {"flag": np.array(True)}),
        (SCALED, {"s": np.array(2, np.float32)}),
        (COUNTED, {"k": np.array(3)}),
    ],
)
def test_openvino_is_fed_scalars(
    text: str, scalar: dict[str, np.ndarray], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(4, 16)).astype(np.float32), **scalar} for _ in range(16)]
    assert convert(build_proto(text), tmp_path, feeds, target="openvino").checked.ran
