"""Targets are data: files of one's own, what each refuses, and the Q/DQ that each gets."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_models import build, random_feeds, run
from versions import needs_runtime_1_24

from onnx_attnround import graph, quantize
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError, ModelError
from onnx_attnround.plan import make_plan
from onnx_attnround.qdq.arithmetic import params_from_range
from onnx_attnround.records import QuantSpec
from onnx_attnround.runtime.session import open_session
from onnx_attnround.targets import TARGETS, Target, get_target

CONV = "Conv<pads=[1,1,1,1]>"
CONSTANTS = "float[4,4,3,3] w1, float[4,4,3,3] w2, float[4] b1, float[4,5] m, float[5] mb"
RESIDUAL = (
    f"c1 = {CONV}(x, w1, b1) r1 = Relu(c1) c2 = {CONV}(r1, w2) s = Add(c2, r1) t = Relu(s) "
    "p = GlobalAveragePool(t) f = Flatten(p) y = Gemm(f, m, mb)"
)


def net(body: str, constants: str = CONSTANTS, y: str = "float[N,5] y") -> ir.Model:
    return build(f"g (float[N,4,8,8] x) => ({y}) <{constants}> {{ {body} }}")


def made(model: ir.Model, target: str | Target, **options: Any) -> ir.Model:
    """The file for a target, from 16 random samples; checked by onnx."""
    x = np.random.default_rng(0).normal(size=(16, 4, 8, 8)).astype(np.float32)
    config = QuantConfig(target=target, method="nearest", **options)
    result = quantize(model, {"x": x}, config).model
    onnx.checker.check_model(ir.to_proto(graph.in_memory(result)), full_check=True)
    return result


def nodes(model: ir.Model, op_type: str) -> dict[str, ir.Node]:
    return {node.name or "": node for node in model.graph if node.op_type == op_type}


def constant(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def quantised_tensors(model: ir.Model) -> set[str]:
    """Names of the tensors behind whose values there is a Q."""
    return {name.removesuffix("/quantize") for name in nodes(model, "QuantizeLinear")}


# --- files --------------------------------------------------------------------------------


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_file_starts_from_a_base_and_overrides(tmp_path: Path) -> None:
    text = 'base = "ort"\nweighted = ["Conv"]\nfloat_output = []\nint32_bias = false\n'
    target = get_target(written(tmp_path, text))
    wanted = replace(
        TARGETS["ort"], name="mine", weighted=frozenset({"Conv"}), float_output=frozenset(),
        int32_bias=False,
    )  # fmt: skip
    assert target == wanted
    result = made(net(RESIDUAL), written(tmp_path, text))
    (gemm,) = nodes(result, "Gemm").values()
    assert constant(gemm.inputs[2]).dtype == np.float32
    assert not any(name.startswith("f/") for name in nodes(result, "QuantizeLinear"))


def test_a_file_may_say_everything_itself(tmp_path: Path) -> None:
    def line(key: str, value: object) -> str:
        listed = value if isinstance(value, str | bool | int | float) else list(value)  # type: ignore[call-overload]
        return f"{key} = {str(listed).lower() if isinstance(listed, bool) else repr(listed)}"

    plain = TARGETS["qnn"].plain()
    path = written(tmp_path, "\n".join(line(key, value) for key, value in plain.items()))
    assert get_target(path) == TARGETS["qnn"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('base = "tpu"\n', ["unknown base 'tpu'", "ort, ort-arm, tensorrt, openvino, qnn"]),
        ('base = "ort"\nbais = true\n', ["unknown key 'bais'", "int32_bias"]),
        ('base = "ort"\nint32_bias = "perhaps"\n', ["'int32_bias'", "got 'perhaps'"]),
        ('base = "ort"\nweighted = ["Convolution"]\n', ["no op Convolution"]),
        ('base = "ort"\nactivation_bits = [12]\n', ["'activation_bits'", "got 12"]),
        ('base = "ort"\nweight_storages = []\n', ["'weight_storages'", "at least 1 item"]),
        ('base = "ort"\nweight_storages = ["int3"]\n', ["'weight_storages', item 1", "got 'int3'"]),
        ('base = "ort"\nruntime = "tpu"\n', ["'runtime'", "got 'tpu'"]),
        ("int32_bias = true\n", ["'runtime' is missing", "a `base` among ort"]),
        ("base = \n", ["cannot read target"]),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        QuantConfig.parse({"target": path})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("option `target`: ")
    assert all(word in message for word in [*words, path])


def test_the_example_in_the_documents_is_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "targets.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert get_target(written(tmp_path, example)).weight_storages == ("int8",)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read target '.*none\.toml'"):
        get_target(str(tmp_path / "none.toml"))


def test_the_config_keeps_the_content_of_a_file(tmp_path: Path) -> None:
    config = QuantConfig(target=written(tmp_path, 'base = "ort"\nint32_bias = false\n'))
    (tmp_path / "mine.toml").unlink()
    text = config.model_dump_json()
    assert QuantConfig.model_validate_json(text) == config
    assert QuantConfig.parse(config.model_dump()) == config
    assert QuantConfig.model_validate_json(text).model_dump_json() == text
    assert get_target(config.target).int32_bias is False


# --- what a target refuses, before any work -----------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt", "act_bits": 4}, "`act_bits`: target 'tensorrt' takes 8 or 32"),
        ({"target": "openvino", "act_bits": 16}, "`act_bits`: target 'openvino' takes 8 or 32"),
        ({"target": "qnn", "act_bits": 6}, "`act_bits`: target 'qnn' takes 8, 16, got 6"),
        ({"target": "qnn", "act_bits": 32}, "target 'qnn' takes no float activations"),
        ({"target": "tensorrt", "weight_storage": "packed"}, "`weight_storage`: .* takes int8"),
        ({"target": "openvino", "weight_storage": "packed2"}, "takes packed, int8, int4"),
    ],
)
def test_settings_that_a_target_does_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(net(RESIDUAL), QuantConfig(**options), quantise_activations=True)


def test_an_opset_beyond_the_target_is_refused() -> None:
    model = build(f"g (float[N,4,8,8] x) => (float[N,4,h,w] y) <{CONSTANTS}> {{ y = Conv(x, w1) }}",
                  22, 10)  # fmt: skip
    with pytest.raises(ModelError, match="opset 22, target 'qnn' reads opsets up to 21"):
        make_plan(model, QuantConfig(target="qnn"), quantise_activations=True)


def test_weighted_ops_must_be_known(tmp_path: Path) -> None:
    path = written(tmp_path, 'base = "ort"\nweighted = ["Conv", "LSTM"]\n')
    with pytest.raises(ConfigError, match="weighted ops: got LSTM, expected some of Conv"):
        make_plan(net(RESIDUAL), QuantConfig(target=path), quantise_activations=True)


# --- what each target gets ----------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_target_gets_a_model_that_computes_the_same(target: str, bits: int) -> None:
    model = net(RESIDUAL)
    result = made(model, target, weight_bits=bits, first_last_bits=8)
    assert [v.name for v in result.graph.outputs] == ["y"]
    feeds = random_feeds(model)
    wanted, got = run(model, feeds)[0], run(result, feeds)[0]
    noise = np.square(got - wanted).sum() / np.square(wanted - wanted.mean()).sum()
    assert noise < (0.003 if bits == 8 else 0.1)


def test_tensorrt_is_symmetric_signed_and_leaves_bias_and_outputs_alone() -> None:
    result = made(net(f"c1 = {CONV}(x, w1, b1) y = {CONV}(c1, w2, b1)", y="float[N,4,h,w] y"),
                  "tensorrt")  # fmt: skip
    assert quantised_tensors(result) == {"x", "c1"}
    for node in (*nodes(result, "QuantizeLinear").values(),
                 *nodes(result, "DequantizeLinear").values()):  # fmt: skip
        point = constant(node.inputs[2])
        assert point.dtype == np.int8
        assert not point.any()
        assert point.shape == constant(node.inputs[1]).shape
    for conv in nodes(result, "Conv").values():
        assert constant(conv.inputs[2]).dtype == np.float32
    (y,) = result.graph.outputs
    assert y.producer() is not None and y.producer().op_type == "Conv"


def test_tensorrt_quantises_the_shortcut_and_not_the_branch_to_be_fused() -> None:
    result = made(net(RESIDUAL), "tensorrt")
    assert quantised_tensors(result) == {"x", "r1", "f"}
    (add,) = nodes(result, "Add").values()
    assert [v.producer().op_type for v in add.inputs] == ["Conv", "DequantizeLinear"]


def test_tensorrt_quantises_one_of_two_branches_that_both_end_in_a_layer() -> None:
    body = f"c1 = {CONV}(x, w1) c2 = {CONV}(x, w2) s = Add(c1, c2) y = {CONV}(s, w1)"
    result = made(net(body, y="float[N,4,h,w] y"), "tensorrt")
    assert quantised_tensors(result) == {"x", "c2", "s"}


def test_a_graph_output_that_a_layer_reads_stays_float_for_tensorrt() -> None:
    model = net(f"c1 = {CONV}(x, w1) y = {CONV}(c1, w2)", y="float[N,4,h,w] c1, float[N,4,h,w] y")
    result = made(model, "tensorrt")
    assert [v.name for v in result.graph.outputs] == ["c1", "y"]
    assert [v.producer().op_type for v in result.graph.outputs] == ["Conv", "Conv"]
    assert quantised_tensors(result) == {"x", "c1/parted"}
    made(model, "ort")


def test_openvino_leaves_what_a_layer_adds_to_in_float() -> None:
    result = made(net(RESIDUAL), "openvino")
    assert quantised_tensors(result) == {"x", "r1/parted", "f"}
    points = [constant(n.inputs[2]) for n in nodes(result, "QuantizeLinear").values()]
    assert {point.dtype for point in points} == {np.dtype(np.uint8)}
    assert all(constant(n.inputs[2]).dtype == np.float32 for n in nodes(result, "Conv").values())


def test_ort_arm_is_signed_and_fuses_where_signed_activations_are_allowed(tmp_path: Path) -> None:
    result = made(net(RESIDUAL), "ort-arm")
    points = [constant(n.inputs[2]) for n in nodes(result, "QuantizeLinear").values()]
    assert {point.dtype for point in points} == {np.dtype(np.int8)}
    path = tmp_path / "optimised.onnx"
    open_session(result, signed_activations=True, optimised_model=path)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert (ops.count("QLinearConv"), ops.count("QGemm"), ops.count("QLinearAdd")) == (2, 1, 1)
    assert not {"Conv", "FusedConv", "Relu"} & set(ops)


QNN = (
    f"c1 = {CONV}(x, w1, b1) r1 = Relu(c1) t1 = Tanh(r1) g1 = Sigmoid(t1) k = Mul(g1, gain) "
    "p = GlobalAveragePool(k) f = Flatten(p) d = MatMul(f, m) y = Sub(d, mb)"
)


def test_qnn_leaves_no_float_tensor_alone() -> None:
    result = made(net(QNN, f"{CONSTANTS}, float[4,1,1] gain"), "qnn", first_last_bits=8)
    assert "Relu" not in {node.op_type for node in result.graph}
    for node in result.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            for value in node.inputs:
                kind = value.producer().op_type if value.producer() else value.dtype
                assert kind in ("DequantizeLinear", ir.DataType.INT64), value.name
            readers = [user.op_type for value in node.outputs for user in value.consumers()]
            assert readers == ["QuantizeLinear"]
    activations = [constant(n.inputs[2]) for n in nodes(result, "QuantizeLinear").values()]
    assert {point.dtype for point in activations} == {np.dtype(np.uint8)}
    (matmul,), (conv,) = nodes(result, "MatMul").values(), nodes(result, "Conv").values()
    scales = {n.name: constant(n.inputs[1]) for n in nodes(result, "DequantizeLinear").values()}
    assert scales[matmul.inputs[1].producer().name].shape == ()
    assert scales[conv.inputs[1].producer().name].shape == (4,)
    bias = conv.inputs[2].producer()
    assert constant(bias.inputs[0]).dtype == np.int32
    sx, sw = (scales[conv.inputs[i].producer().name] for i in (0, 1))
    np.testing.assert_array_equal(constant(bias.inputs[1]), sx * sw)


@pytest.mark.parametrize(("bits", "sigmoid", "tanh"), [(8, 2**-8, 2**-7), (16, 2**-16, 2**-15)])
def test_qnn_gives_squashing_functions_their_full_range(
    bits: int, sigmoid: float, tanh: float
) -> None:
    result = made(net(QNN, f"{CONSTANTS}, float[4,1,1] gain"), "qnn", act_bits=bits)
    quantise = nodes(result, "QuantizeLinear")
    assert constant(quantise["g1/quantize"].inputs[1]) == sigmoid
    assert constant(quantise["g1/quantize"].inputs[2]) == 0
    assert constant(quantise["t1/quantize"].inputs[1]) == tanh
    assert constant(quantise["t1/quantize"].inputs[2]) == 2 ** (bits - 1)


def test_moved_codes_keep_their_scale_everywhere() -> None:
    result = made(net(RESIDUAL), "qnn")
    quantise = nodes(result, "QuantizeLinear")
    one, other = (quantise[f"{name}/quantize"] for name in ("p", "f"))
    assert [constant(v) for v in one.inputs[1:]] == [constant(v) for v in other.inputs[1:]]


# --- ranges -------------------------------------------------------------------------------


def test_a_range_is_never_narrower_than_the_least() -> None:
    spec = QuantSpec(bits=8, signed=False, symmetric=False, least_range=1e-4)
    for lo, hi in [(0.0, 1e-7), (-1e-6, 0.0), (-1e-6, 1e-6)]:
        width = float(params_from_range(spec, lo, hi).scale) * 255
        assert width == pytest.approx(1e-4)
    assert float(params_from_range(spec, -1.0, 1.0).scale) == pytest.approx(2 / 255)


def test_a_fixed_range_takes_the_place_of_the_observed() -> None:
    spec = QuantSpec(bits=8, signed=False, symmetric=False, fixed_range=(-1.0, 1.0))
    assert params_from_range(spec, 0.0, 0.1) == params_from_range(spec, -9.0, 9.0)


# --- two bits -----------------------------------------------------------------------------


@needs_runtime_1_24
def test_two_bits_are_stored_in_two_and_run_in_integer(tmp_path: Path) -> None:
    model = net(f"c1 = {CONV}(x, w1, b1) c2 = {CONV}(c1, w2) c3 = {CONV}(c2, w1) y = Relu(c3)",
                y="float[N,4,h,w] y")  # fmt: skip
    options: dict[str, Any] = {"layer_bits": {"Conv_0": 4, "Conv_1": 2, "Conv_2": 8}}
    result, wide = (made(model, "ort", weight_storage=s, **options) for s in ("packed2", "int8"))
    kinds = {name: tensor.dtype for name, tensor in result.graph.initializers.items()}
    assert [kinds[f"Conv_{i}/weight_codes"].name for i in range(3)] == ["INT4", "INT2", "INT8"]
    assert (result.opset_imports[""], result.ir_version) == (25, 13)
    assert wide.opset_imports[""] == 17
    path = tmp_path / "optimised.onnx"
    session = open_session(result, optimised_model=path)
    assert [n.op_type for n in onnx.load(path).graph.node].count("QLinearConv") == 3
    feeds = random_feeds(model)
    np.testing.assert_array_equal(
        session.run(None, feeds)[0], open_session(wide).run(None, feeds)[0]
    )
