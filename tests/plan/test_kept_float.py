"""Nodes and tensors that the user, or a missing kernel, keeps in float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from checked_conversion import convert
from small_models import build, build_proto

from onnx_attnround import QuantConfig, make_plan, quantize
from onnx_attnround.errors import ConfigError, ModelError, OutputError
from onnx_attnround.plan import activations

RESIDUAL = """net (float[N,4,8,8] x) => (float[N,4,8,8] y)
<float[4,4,3,3] a, float[4,4,3,3] b, float[4,4,3,3] c> {
    [conv1] h = Conv<pads = [1, 1, 1, 1]>(x, a)
    [relu1] r = Relu(h)
    [conv2] s = Conv<pads = [1, 1, 1, 1]>(r, b)
    [add] t = Add(r, s)
    [relu2] u = Relu(t)
    [pool] p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(u)
    [grow] g = Resize<mode = "nearest">(p, , scales)
    [conv3] y = Conv<pads = [1, 1, 1, 1]>(g, c)
}""".replace("c> {", "c, float[4] scales = {1, 1, 2, 2}> {")


def samples(text: str, count: int = 32) -> list[dict[str, np.ndarray]]:
    shape = build_proto(text, opset=19).graph.input[0].type.tensor_type.shape.dim
    sizes = [dim.dim_value for dim in shape][1:]
    x = np.random.default_rng(0).normal(size=(count, *sizes)).astype(np.float32)
    return [{"x": x}]


def optimised(path: Path) -> Counter[str]:
    """How often each op stands in the graph that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return Counter(node.op_type for node in graph.node)


def dequantised(path: Path) -> set[str]:
    """The names of the nodes that read what a DequantizeLinear makes of computed codes."""
    graph = onnx.load(str(path)).graph
    made = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    links = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in made
    }
    return {node.name for node in graph.node if links.intersection(node.input)}


# --- exclude, of any node ----------------------------------------------------------------


@pytest.mark.parametrize("node", ["relu1", "add", "relu2", "pool", "grow"])
def test_an_excluded_node_computes_in_float_from_floats(node: str, tmp_path: Path) -> None:
    convert(build_proto(RESIDUAL), tmp_path, samples(RESIDUAL), exclude=(node,))
    target = tmp_path / "target.onnx"
    assert node not in dequantised(target)
    counts = optimised(target)
    if node == "add":
        assert counts["QLinearAdd"] == 0
    assert counts["QLinearConv"] >= 1


def test_a_region_is_excluded_as_a_whole(tmp_path: Path) -> None:
    names = ("conv2", "add", "relu2", "pool", "grow")
    convert(build_proto(RESIDUAL), tmp_path, samples(RESIDUAL), exclude=names)
    assert dequantised(tmp_path / "target.onnx") <= {"conv1", "conv3"}


def test_other_nodes_stay_as_they_are(tmp_path: Path) -> None:
    convert(build_proto(RESIDUAL), tmp_path, samples(RESIDUAL))
    assert dequantised(tmp_path / "target.onnx") >= {"conv1", "conv2", "add", "conv3"}


def test_a_target_without_floats_says_what_helps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'add' matches no node with weights.*activation_bits"):
        convert(build_proto(RESIDUAL), tmp_path, samples(RESIDUAL), target="qnn", exclude=("add",))
    wide = {"t": 16, "u": 16, "p": 16, "g": 16}
    convert(build_proto(RESIDUAL), tmp_path, samples(RESIDUAL), target="qnn", activation_bits=wide)


# --- activation_bits ---------------------------------------------------------------------


def bits_of(text: str, **options: object) -> dict[str, int]:
    model = ir.from_proto(build_proto(text))
    plan, _ = make_plan(model, QuantConfig.parse(options))
    return {name: spec.bits for name, spec in plan.activations.items()}


def test_tensors_have_the_bits_asked_for() -> None:
    usual = bits_of(RESIDUAL)
    assert set(usual.values()) == {8}
    asked = bits_of(RESIDUAL, activation_bits={"r": 16})
    assert asked == {**usual, "r": 16}


def test_a_tensor_that_stays_float_has_no_codes(tmp_path: Path) -> None:
    assert "r" not in bits_of(RESIDUAL, activation_bits={"r": 32})
    convert(build_proto(RESIDUAL), tmp_path, samples(RESIDUAL), activation_bits={"r": 32})
    assert dequantised(tmp_path / "target.onnx").isdisjoint({"conv2", "add"})


def test_codes_that_are_moved_keep_their_bits() -> None:
    asked = bits_of(RESIDUAL, activation_bits={"u": 16})
    assert (asked["u"], asked["p"], asked["g"]) == (16, 16, 16)
    asked = bits_of(RESIDUAL, activation_bits={"u": 16, "g": 8}, target="qnn")
    assert (asked["u"], asked["p"], asked["g"]) == (16, 16, 8)
    assert bits_of(RESIDUAL, activation_bits={"g": 8}) == bits_of(RESIDUAL)


@pytest.mark.parametrize("target", ["ort", "ort-arm", "qnn"])
@pytest.mark.parametrize("bits", [{"r": 16}, {"u": 16, "g": 8}, {"*": 16}, {"t": 16}])
def test_files_with_several_widths(
    bits: dict[str, int], target: str, tmp_path: Path
) -> None:
    convert(
        build_proto(RESIDUAL), tmp_path, samples(RESIDUAL), target=target, activation_bits=bits
    )


@pytest.mark.parametrize("target", ["ort", "tensorrt", "openvino"])
def test_files_with_some_floats(target: str, tmp_path: Path) -> None:
    bits = {"r": 32, "u": 32}
    convert(
        build_proto(RESIDUAL), tmp_path, samples(RESIDUAL), target=target, activation_bits=bits
    )


@pytest.mark.parametrize(("target", "bits"), [("qnn", 32), ("qnn", 4), ("tensorrt", 16)])
def test_widths_that_a_target_does_not_take(target: str, bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"`activation_bits`, 'r': target '{target}' takes 8"):
        bits_of(RESIDUAL, target=target, activation_bits={"r": bits})


# --- kernels that are missing ------------------------------------------------------------

POOLS = """net (float[N,3,12,12] x) => (float[N,4,{size},{size}] y)
<float[4,3,3,3] a, float[4,{channels},1,1] b> {{
    [conv] h = Conv<pads = [1, 1, 1, 1]>(x, a)
    [relu] r = Relu(h)
    [pool] p = AveragePool<kernel_shape = [2, 2], dilations = [{step}, {step}]>({read})
    [head] y = Conv(p, b)
}}"""
BOTH = """net (float[N,4,12,12] x) => (float[N,4,10,10] y, float[N,4,12,12] z)
<float[4,4,3,3] a, float[4,4,1,1] b, float[4,4,1,1] c> {
    h = Conv<pads = [1, 1, 1, 1]>(x, a)
    r = Relu(h)
    [pool] p = AveragePool<kernel_shape = [2, 2], dilations = [2, 2]>(r)
    y = Conv(p, b)
    z = Conv(r, c)
}"""


@pytest.mark.parametrize("target", ["ort", "ort-arm", "openvino", "tensorrt", "qnn"])
@pytest.mark.parametrize("read", ["r", "x"])
@pytest.mark.parametrize("step", [1, 2])
def test_dilated_average_pools(step: int, read: str, target: str, tmp_path: Path) -> None:
    text = POOLS.format(step=step, read=read, size=12 - step, channels=4 if read == "r" else 3)
    if (step, target) == (2, "qnn"):
        with pytest.raises(ModelError, match="node 'pool': .* choose another `target`"):
            convert(build_proto(text, opset=19), tmp_path, samples(text), target=target)
        return
    result = convert(build_proto(text, opset=19), tmp_path, samples(text), target=target)
    if target == "ort" and read == "r":
        assert optimised(tmp_path / "target.onnx")["QLinearAveragePool"] == (step == 1)
        assert result.checked.ran


@pytest.mark.parametrize("options", [{}, {"exclude": ("pool",)}, {"act_bits": 4}])
def test_a_dilated_average_pool_beside_a_layer(
    options: dict[str, object], tmp_path: Path
) -> None:
    least = 8 if options.get("act_bits") == 4 else 25
    convert(build_proto(BOTH, opset=19), tmp_path, samples(BOTH), sqnr=least, **options)


def test_a_pool_whose_windows_hang_over_the_padding(tmp_path: Path) -> None:
    text = """net (float[N,4,12,12] x) => (float[N,4,7,7] y) <float[4,4,1,1] a, float[4,4,1,1] b> {
        h = Conv(x, a)
        r = Relu(h)
        p = AveragePool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1],
                        ceil_mode = 1, count_include_pad = 1>(r)
        y = Conv(p, b)
    }"""
    convert(build_proto(text), tmp_path, samples(text), sqnr=30)


VECTORS = """net (float[16] v) => (float[8] y) <float[16,16] a, float[16,8] b> {
    h = MatMul(v, a)
    r = Relu(h)
    y = MatMul(r, b)
}"""


@pytest.mark.parametrize("target", ["ort", "ort-arm", "openvino", "tensorrt", "qnn"])
def test_products_of_a_vector(target: str, tmp_path: Path) -> None:
    """OpenVINO's integer kernel gives them an axis more; the check runs what is written."""
    calibration = [{"v": row} for row in np.random.default_rng(0).normal(size=(64, 16))]
    config = QuantConfig(target=target, method="nearest")
    plan = quantize(build(VECTORS), calibration, config, output=tmp_path / "y.onnx").plan
    assert bool(plan.activations) == (target != "openvino")


# --- inputs that are outputs -------------------------------------------------------------

HANDED_ON = """net (float[N,4,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] x)
<float[4,4,3,3] a> { h = Conv<pads = [1, 1, 1, 1]>(x, a)  y = Relu(h) }"""


@pytest.mark.parametrize("target", ["ort", "ort-arm", "openvino", "tensorrt", "qnn"])
def test_an_input_that_is_an_output(target: str, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{HANDED_ON}')
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "a"))
    del model.graph.value_info[:]
    convert(model, tmp_path, samples(RESIDUAL), target=target)
    written = onnx.load(str(tmp_path / "target.onnx"))
    x = samples(RESIDUAL)[0]["x"]
    session = ort.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["x"], {"x": x})[0], x)


# --- advice ------------------------------------------------------------------------------


def test_what_is_refused_is_named_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The advice is followed, and helps."""
    monkeypatch.setattr(activations, "_lacks_kernel", lambda node: False)
    text = POOLS.format(step=2, read="r", size=10, channels=4)
    with pytest.raises((ModelError, OutputError), match=r"\(\"pool\".*; `exclude` that node"):
        convert(build_proto(text, opset=19), tmp_path, samples(text))
    convert(build_proto(text, opset=19), tmp_path, samples(text), exclude=("pool",))
