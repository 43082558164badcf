"""Convolutions along one axis between float nodes become matrix products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build, random_feeds, run

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.pipeline.activations import plan_parted
from onnx_attnround.simplify import simplify

DYNAMIC = {"activations": "dynamic"}


def parted(text: str, **settings: object) -> ir.Model:
    config = QuantConfig.of(None, **{**DYNAMIC, **settings})
    model, _ = simplify(build(text))
    return plan_parted(model, config, quantise_activations=True)[0]


def conv(attributes: str, kernel: str = "5", sizes: str = "20", bias: bool = True) -> str:
    """A Conv between two Tanh; ``sizes`` are those of the input's places."""
    axes = sizes.count(",") + 1
    free = ",".join("PQR"[:axes])
    return f"""
        g (float[N,64,{sizes}] x) => (float[N,64,{free}] y)
        <float[64,64,{kernel}] w, float[64] b>
        {{ t = Tanh(x)  c = Conv{attributes}(t, w{", b" * bias})  y = Sin(c) }}"""


@pytest.mark.parametrize(
    "text",
    [
        conv(""),
        conv("<pads=[2,2]>"),
        conv("<pads=[3,0]>", bias=False),
        conv("<strides=[2], pads=[1,1]>", "3"),
        conv("<dilations=[3], pads=[4,4]>", "3"),
        conv("<dilations=[2], strides=[3]>", "4"),
        conv("", "1"),
        conv("<strides=[2]>", "1"),
        conv("<strides=[2,1], pads=[1,0,2,0]>", "5,1", "12,3"),
        conv("<pads=[0,1,0,1], strides=[1,2]>", "1,3", "2,9"),
    ],
)
def test_the_product_is_that_of_the_convolution(text: str) -> None:
    model, product = build(text), parted(text)
    ops = [node.op_type for node in product.graph]
    assert "Conv" not in ops
    assert "MatMul" in ops
    (conv_node,) = (node for node in model.graph if node.op_type == "Conv")
    (matmul,) = (node for node in product.graph if node.op_type == "MatMul")
    assert matmul.name == conv_node.name  # settings that name it still hold
    feeds = random_feeds(model)
    (expected,), (got,) = run(model, feeds), run(product, feeds)
    np.testing.assert_allclose(got, expected, atol=1e-3)


GROUPED = "<group=2>"


@pytest.mark.parametrize(
    "text",
    [
        conv("", "3,3", "8,8"),  # along two axes
        conv('<auto_pad="SAME_UPPER">'),
        conv("").replace("[N,64,20]", "[N,8,20]").replace("[64,64,5]", "[64,8,5]"),
        conv(GROUPED).replace("[64,64,5]", "[64,32,5]"),
        """
        g (float[N,64,20] x) => (float[N,64,P] y) <float[64,64,5] w, float[64,64,3] v>
        { t = Tanh(x)  c = Conv(t, w)  d = Relu(c)  e = Conv(d, v)  y = Sin(e) }""",
    ],
)
def test_others_stay_convolutions(text: str) -> None:
    convs = sum(node.op_type == "Conv" for node in build(text).graph)
    assert sum(node.op_type == "Conv" for node in parted(text).graph) == convs


def test_fixed_ranges_and_other_targets_keep_the_convolution() -> None:
    for settings in ({"activations": "static"}, {"target": "openvino", "activations": "auto"}):
        assert "Conv" in [node.op_type for node in parted(conv(""), **settings).graph]


def test_the_product_runs_in_integer_with_a_range_in_each_run() -> None:
    samples = np.random.default_rng(0).normal(size=(24, 64, 20)).astype(np.float32)
    config = QuantConfig.parse({**DYNAMIC, "threads": 1, "holdout": 0.0})
    model = build(conv("<pads=[2,2]>").replace("Sin", "Elu"))
    result = quantize(model, samples, config)
    assert len(result.checked.fusion.integer) == 1
    assert result.checked.findings == ()
    assert result.verification is not None
    assert result.verification.outputs[0].sqnr_db > 25.0
