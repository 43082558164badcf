"""A file is run as the runtime optimises it, on whatever the model is fed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checked_conversion import convert
from onnx import numpy_helper
from small_models import build_proto

from onnx_attnround.check import check, execution, openvino_session
from onnx_attnround.check.view import View
from onnx_attnround.targets import TARGETS

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


MASKED = """net (float[N,16] x, bool[N,16] m) => (float[N,4] y)
<float[16,16] u, float[16,4] w, float[4] b, float least> {
    h = MatMul(x, u)
    s = Where(m, h, least)
    p = Softmax<axis = 1>(s)
    y = Gemm(p, w, b)
}""".replace("float least", "float least = {-3e38}")


def test_samples_that_make_nan_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of minus infinity throughout: a runtime may give NaN another code than nodes do."""
    proto = build_proto(MASKED)
    least = next(each for each in proto.graph.initializer if each.name == "least")
    least.CopyFrom(numpy_helper.from_array(np.float32(-np.inf), "least"))
    rng = np.random.default_rng(0)
    x, m = rng.normal(size=(32, 16)).astype(np.float32), rng.random((32, 16)) < 0.7
    m[:, 0], m[:2] = True, False
    feeds = [{"x": x[i : i + 1], "m": m[i : i + 1]} for i in range(32)]
    model = convert(proto, tmp_path, feeds, method="nearest").model
    run, wrong = execution._run_ort, 0

    def other_codes(
        view: View, model: ir.Model, feed: dict[str, np.ndarray], *, optimise: bool
    ) -> dict[str, np.ndarray]:
        """Optimised, far from what nodes give where all is masked, and in the last ``wrong``."""
        found = run(view, model, feed, optimise=optimise)
        if optimise:
            rows = ~feed["m"].any(1)
            rows[len(rows) - wrong :] = True
            found["y"][rows] = 1e3
        return found

    def rules(rows: slice) -> list[tuple[str, bool]]:
        found = check(model, TARGETS["ort"], {"x": x[rows], "m": m[rows]}).findings
        return [(each.rule, each.refused) for each in found]

    monkeypatch.setattr(execution, "_run_ort", other_codes)
    assert rules(slice(0, 4)) == []
    assert rules(slice(0, 2)) == [("nan-is-rounded", False)]
    wrong = 1
    assert rules(slice(0, 4)) == [("wrong-output", True)]
