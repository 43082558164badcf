"""A broken file is caught for every rule, with the node named; a sound one is clean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from qdq_builder import Builder
from test_saturation import product
from versions import needs_runtime_1_24

from onnx_attnround import OutputError, QuantConfig, check_model, quantize
from onnx_attnround.__main__ import main
from onnx_attnround.check import RULES, Rule, check, execution, openvino_session
from onnx_attnround.check.fusion import expected_fusion, find_fusion
from onnx_attnround.check.rules import Findings, operators_on_integers
from onnx_attnround.check.view import View
from onnx_attnround.graph import save
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import open_session
from onnx_attnround.targets import TARGETS, Target

SX, SW = np.float32(0.05), np.float32(0.01)


def conv(
    activation: dict[str, Any] | None = None,
    weight: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    bias: str = "float",
    op: str = "Conv",
    **built: Any,
) -> ir.Model:
    """Q/DQ, Conv (or Gemm, MatMul), Q/DQ; ``output`` ``None`` leaves the end float."""
    made = Builder(**built)
    shape, x = ((4, 4, 3, 3), ("N", 4, 6, 6)) if "Conv" in op else ((4, 4), ("N", 4))
    activation = {"scale": SX, **(activation or {})}
    weight = {"scale": np.full(4, SW), "axis": int(op == "MatMul"), **(weight or {})}
    inputs = [made.qdq("x", "in", **activation), made.weight("w", shape, **weight)]
    if op == "Gemm":
        weight["axis"] = 0
    if op != "MatMul" and bias == "float":
        inputs.append(made.constant("b", np.ones(4)))
    elif op != "MatMul" and bias != "none":
        scale = np.full(4, SX * SW * np.float32(1.5 if bias == "off" else 1.0), np.float32)
        inputs.append(made.bias("b", scale))
    attributes = {"transB": 1} if op == "Gemm" else {}
    made.node(op, inputs, "y", **attributes)
    last = "y" if output is None else made.qdq("y", "out", **output)
    return made.build(last, x)


SIGNED = {"dtype": "INT8"}


def sound(target: str) -> ir.Model:
    """What no rule speaks against."""
    if target == "tensorrt":
        return conv(SIGNED)
    if target == "qnn":
        return conv(bias="int32", output={})
    return conv(bias="int32", output={"dtype": TYPES[target]}, activation={"dtype": TYPES[target]})


TYPES = {"ort": "UINT8", "ort-arm": "INT8", "openvino": "UINT8"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_file_is_clean_and_runs_in_integer(target: str) -> None:
    checked = check(sound(target), TARGETS[target])
    assert checked.findings == ()
    assert (checked.fusion.integer, dict(checked.fusion.fallen)) == (("y",), {})
    assert checked.fusion.integer_share == 1.0
    assert checked.ran == (target in ("ort", "ort-arm", "openvino"))
    assert checked.fusion.measured == checked.ran


# --- one broken file for each rule --------------------------------------------------------


@dataclass(frozen=True)
class Case:
    target: str
    rule: str
    node: str
    model: Callable[[], ir.Model]
    others: frozenset[str] = field(default_factory=frozenset)
    """Rules that the fault breaks as well."""


def residual(*quantised: str) -> ir.Model:
    """A Conv and its input, added; Q/DQ on the branches named."""
    made = Builder()
    x = made.qdq("x", "in", "INT8")
    first = made.node("Conv", [x, made.weight("w1", (4, 4, 3, 3))], "c", pads=[1, 1, 1, 1])
    relu = made.node("Relu", [first], "r")
    r = made.qdq(relu, "r", "INT8") if "shortcut" in quantised else relu
    read = r if "shortcut" in quantised else made.qdq(relu, "q", "INT8")
    second = made.node("Conv", [read, made.weight("w2", (4, 4, 1, 1))], "d")
    main = made.qdq(second, "d", "INT8") if "main" in quantised else second
    made.node("Add", [main, r], "y")
    return made.build("y")


def padded(point: int) -> ir.Model:
    made = Builder()
    pads = made.constant("pads", [0, 2, 0, 0, 0, 2, 0, 0], "INT64")
    p = made.node("Pad", [made.qdq("x", "in", point=point), pads], "p")
    read = made.qdq(p, "pq", point=point)
    made.node("Conv", [read, made.weight("w", (4, 8, 3, 3))], "y")
    return made.build("y")


def squashed(scale: float) -> ir.Model:
    made = Builder()
    made.node("Sigmoid", [made.qdq("x", "in")], "s")
    return made.build(made.qdq("s", "out", scale=scale))


def added(quantised: bool) -> ir.Model:
    made = Builder()
    operand = made.constant("b", np.ones((4, 1, 1)))
    if quantised:
        operand = made.qdq(operand, "bq")
    made.node("Add", [made.qdq("x", "in"), operand], "s")
    return made.build(made.qdq("s", "out"))


def between() -> ir.Model:
    """Something happens to the codes between Q and DQ."""
    made = Builder()
    params = [made.constant("s", 0.05), made.constant("z", 0, "INT8")]
    codes = made.node("QuantizeLinear", ["x", *params], "q")
    bounds = [made.constant("lo", -7, "INT8"), made.constant("hi", 7, "INT8")]
    clipped = made.node("Clip", [codes, *bounds], "clip")
    made.node("DequantizeLinear", [clipped, *params], "dq")
    made.node("Conv", ["dq", made.weight("w", (4, 4, 3, 3))], "y")
    return made.build("y")


def upsampled() -> ir.Model:
    """A ConvTranspose that reads the floats of a Conv."""
    made = Builder()
    made.node("Conv", [made.qdq("x", "in"), made.weight("w", (4, 4, 3, 3))], "c")
    made.node("ConvTranspose", ["c", made.weight("v", (4, 4, 3, 3))], "y")
    return made.build("y")


def float_input(output: str | None = None) -> ir.Model:
    """A Conv of which the weight alone is quantised, and the output where a type is given."""
    made = Builder()
    made.node("Conv", ["x", made.weight("w", (4, 4, 3, 3))], "y")
    return made.build("y" if output is None else made.qdq("y", "out", output))


def float_weight(dtype: str, output: str | None = None) -> ir.Model:
    """A Conv of which the input alone is quantised, and the output where a type is given."""
    made = Builder()
    weight = made.constant("w", np.ones((4, 4, 3, 3)))
    made.node("Conv", [made.qdq("x", "in", dtype), weight], "y")
    return made.build("y" if output is None else made.qdq("y", "out", output))


def integer_operator() -> ir.Model:
    made = Builder()
    made.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["c", "s", "z"], "dynamic"))
    made.node("DequantizeLinear", ["c", "s", "z"], "d")
    made.node("Add", ["d", "s"], "y")  # no DequantizeLinear: arithmetic with what was found
    return made.build("y")


BLOCKS = {"scale": np.full((2, 4), SW), "axis": 0, "block_size": 16}


def blocks(
    dtype: str,
    *,
    size: int = 16,
    rows: int = 32,
    columns: int = 4,
    activation: bool = True,
    **built: Any,
) -> ir.Model:
    made = Builder(**built)
    x = made.qdq("x", "in", "INT8") if activation else "x"
    scale = np.full((-(-rows // size), columns), SW)
    weight = made.weight("w", (rows, columns), dtype, scale, axis=0, block_size=size)
    made.node("MatMul", [x, weight], "y")
    return made.build("y", ("N", rows))


def clipped(op: str) -> ir.Model:
    """Low-bit weights and a float input, then a Relu or Clip that one node reads."""
    made = Builder()
    made.node("MatMul", ["x", made.weight("w", (8, 4), "INT4", axis=1)], "p")
    bounds = [made.constant("low", 0.0), made.constant("high", 6.0)] if op == "Clip" else []
    made.node("Abs", [made.node(op, ["p", *bounds], "r")], "y")
    return made.build("y", ("N", 8))


PER_CHANNEL = {"scale": np.full(4, SX), "axis": 1}
TRT, QNN, OV, ORT = "tensorrt", "qnn", "openvino", "ort"

CASES = [
    Case(TRT, "scale-not-positive", "in/q", lambda: conv({**SIGNED, "scale": -0.1})),
    Case(QNN, "scale-not-positive", "in/q", lambda: conv({"scale": 0.0}, None, {}, "none"),
         frozenset({"range-too-narrow"})),
    Case(ORT, "scale-not-positive", "in/q", lambda: conv({"scale": np.nan}, None, {}, "none"),
         frozenset({"wrong-output"})),
    Case(OV, "scale-not-positive", "in/q", lambda: conv({"scale": -0.1}, None, {}, "none"),
         frozenset({"wrong-output"})),
    Case(TRT, "opset-too-new", "(model)",
         lambda: conv(SIGNED, opset=26, ir_version=13)),
    Case(QNN, "opset-too-new", "(model)",
         lambda: conv(bias="int32", output={}, opset=22)),
    Case(TRT, "zero-point-of-other-shape", "w/dq",
         lambda: conv(SIGNED, {"point": np.zeros(1, np.int64)})),
    # TensorRT
    Case(TRT, "zero-point-not-zero", "in/q", lambda: conv({**SIGNED, "point": 3})),
    Case(TRT, "zero-point-not-zero", "w/dq", lambda: conv(SIGNED, {"point": 3})),
    Case(TRT, "type-not-taken", "in/q", conv),
    Case(TRT, "type-not-taken", "in/q", lambda: conv({"dtype": "INT16"})),
    Case(TRT, "type-not-taken", "w/dq", lambda: conv(SIGNED, {"dtype": "UINT8"})),
    Case(TRT, "quantised-bias", "y", lambda: conv(SIGNED, bias="int32")),
    Case(TRT, "activation-per-channel", "in/q", lambda: conv({**SIGNED, **PER_CHANNEL})),
    Case(TRT, "weight-axis", "y", lambda: conv(SIGNED, {"axis": 1})),
    Case(TRT, "weight-axis", "y", lambda: conv(SIGNED, op="ConvTranspose")),
    Case(TRT, "integer-operator", "dynamic", integer_operator,
         frozenset({"type-not-taken", "quantised-output", "codes-changed-on-the-way"})),
    Case(TRT, "four-bits-of-an-activation", "in/q", lambda: conv({"dtype": "INT4"})),
    Case(TRT, "four-bits-not-blocked", "y", lambda: conv(SIGNED, {"dtype": "INT4"})),
    Case(TRT, "four-bits-not-blocked", "y", lambda: blocks("INT4")),
    Case(TRT, "four-bits-not-blocked", "y", lambda: blocks("INT4", activation=False)),
    Case(TRT, "four-bits-not-blocked", "y",
         lambda: blocks("INT4", size=64, rows=128, columns=5, activation=False)),
    Case(TRT, "codes-changed-on-the-way", "dq", between),
    Case(TRT, "codes-changed-on-the-way", "w/dq",
         lambda: conv(SIGNED, {"dtype": "INT4", "cast": True})),
    Case(TRT, "zero-point-missing", "in/q",
         lambda: conv({"point": None}), frozenset({"type-not-taken"})),
    Case(TRT, "quantised-output", "out/dq", lambda: conv(SIGNED, output=SIGNED)),
    Case(TRT, "residual-not-fused", "y", residual),
    Case(TRT, "residual-not-fused", "y", lambda: residual("shortcut", "main")),
    Case(TRT, "half-quantised", "y", float_input),
    Case(TRT, "half-quantised", "y", lambda: float_weight("INT8")),
    # QNN
    Case(QNN, "tensor-without-range", "y", lambda: conv(bias="int32")),
    Case(QNN, "tensor-without-range", "(input x)", lambda: float_input("UINT8"),
         frozenset({"half-quantised"})),
    Case(QNN, "tensor-without-range", "s", lambda: added(False)),
    Case(QNN, "activation-type", "in/q",
         lambda: conv({"dtype": "INT4"}, {}, {}, "int32", opset=21, ir_version=10)),
    Case(QNN, "signed-activation", "in/q", lambda: conv(SIGNED, bias="int32", output={})),
    Case(QNN, "activation-per-channel", "in/q",
         lambda: conv(PER_CHANNEL, bias="int32", output={})),
    Case(QNN, "weight-type", "y", lambda: conv({}, {"dtype": "UINT8"}, {}, "int32")),
    Case(QNN, "weight-zero-point", "y", lambda: conv({}, {"point": 1}, {}, "int32")),
    Case(QNN, "weight-axis", "y", lambda: conv({}, {"axis": 1}, {}, "int32")),
    Case(QNN, "matrix-per-channel", "y", lambda: conv({}, {}, {}, op="MatMul")),
    Case(QNN, "bias-scale", "y", lambda: conv({}, {}, {}, "float")),
    Case(QNN, "bias-scale", "y", lambda: conv({}, {}, {}, "off")),
    Case(QNN, "range-too-narrow", "in/q", lambda: conv({"scale": 1e-7}, output={}, bias="none")),
    Case(QNN, "partial-range", "out/q", lambda: squashed(0.003)),
    Case(QNN, "codes-changed-on-the-way", "w/dq",
         lambda: conv({}, {"dtype": "INT4", "cast": True}, {}, "int32")),
    Case(QNN, "half-quantised", "y", lambda: float_weight("UINT8", "UINT8")),
    # OpenVINO
    Case(OV, "type-not-taken", "w/dq",
         lambda: conv({}, {"dtype": "INT2", "cast": True}, {}, opset=25, ir_version=13),
         frozenset({"does-not-load"})),
    Case(OV, "zero-point-missing", "in/q", lambda: conv({"point": None})),
    Case(OV, "pad-of-offset-codes", "p", lambda: padded(100), frozenset({"wrong-output"})),
    Case(OV, "scale-of-rank-2", "y", lambda: blocks("INT8")),
    Case(OV, "short-block", "w/dq", lambda: blocks("INT4", rows=40, activation=False),
         frozenset({"does-not-load"})),
    Case(OV, "sixteen-bits", "in/dq", lambda: conv({"dtype": "UINT16"}),
         frozenset({"wrong-output"})),
    Case(OV, "pairs-beyond-int16", "y", lambda: conv({}, {"highest": 127}, bias="int32")),
    # ONNX Runtime
    Case(ORT, "two-bits-under-integer-activations", "y",
         lambda: conv({}, {"dtype": "INT2"}, {}, opset=25, ir_version=13),
         frozenset({"does-not-load"})),
    Case(ORT, "two-bits-under-integer-activations", "y",
         lambda: conv({}, {"dtype": "INT2"}, op="MatMul", opset=25, ir_version=13),
         frozenset({"does-not-load"})),
    Case(ORT, "two-bits-that-fill-no-bytes", "y",
         lambda: blocks("INT2", columns=6, activation=False, opset=25, ir_version=13),
         frozenset({"wrong-output", "does-not-load"})),
    Case(ORT, "clipped-low-bit-weights", "p", lambda: clipped("Relu")),
    Case(ORT, "clipped-low-bit-weights", "p", lambda: clipped("Clip")),
    Case(ORT, "blocks-of-eight-bits-under-integer-activations", "y", lambda: blocks("INT8"),
         frozenset({"wrong-output", "does-not-run"})),
    Case(ORT, "zero-point-missing", "y",
         lambda: conv({}, {"point": None}, op="Gemm", bias="int32"), frozenset({"does-not-run"})),
    Case(ORT, "pairs-beyond-int16", "y", lambda: conv({}, {"highest": 127}, {}, "int32")),
    Case(ORT, "half-full-tiles", "(model)", lambda: product(np.ones((8, 24)))),
    Case(ORT, "operators-on-integers", "(model)", integer_operator),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.target}-{case.rule}-{case.node}")
def test_a_broken_file_is_caught_and_the_node_named(case: Case) -> None:
    checked = check(case.model(), TARGETS[case.target])
    found = {(finding.rule, finding.node) for finding in checked.findings}
    assert (case.rule, case.node) in found
    assert {name for name, _ in found} <= {case.rule} | case.others
    rule = next(rule for rule in RULES[TARGETS[case.target].runtime] if rule.name == case.rule)
    assert bool(checked.refused) >= rule.refused
    assert all(finding.why for finding in checked.findings)


def test_there_is_a_broken_file_for_every_rule() -> None:
    for target in (TRT, QNN, OV, ORT):
        names = {rule.name for rule in RULES[TARGETS[target].runtime]}
        caught = {case.rule for case in CASES if case.target == target}
        shared = {"opset-too-new", "zero-point-of-other-shape", "operators-on-integers"}
        assert names - caught <= (shared if target != TRT else set())


def test_operators_on_integers_are_told_apart_and_counted() -> None:
    made = Builder()
    scale, point = made.constant("s", 0.1), made.constant("z", 0, "UINT8")
    x = made.node("QuantizeLinear", ["x", scale, point], "q")
    weight = made.constant("w", np.ones((4, 4, 1, 1)), "UINT8")
    for name in "ab":
        x = made.node("QLinearConv", [x, *(scale, point, weight), *(scale, point) * 2], name)
    made.node("DequantizeLinear", [x, scale, point], "y")
    checked = check(made.build("y"), TARGETS["ort"])
    (finding,) = checked.findings
    assert finding.why.endswith("operators on integers, 2 QLinearConv") and checked.ran


def with_last(model: ir.Model, domain: str, op: str) -> ir.Model:
    """``op`` put behind the output, in place."""
    node = ir.node(op, [model.graph.outputs[0]], domain=domain, name="last")
    node.outputs[0].name = "last"
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    model.opset_imports[domain] = 1
    return model


@pytest.mark.parametrize("op", ["QKVAttention", "QGemm", "ConvInteger", "DynamicQuantizeKV"])
def test_a_plugin_is_no_operator_on_integers_by_its_name(op: str) -> None:
    assert check(with_last(conv(SIGNED), "my.plugins", op), TARGETS["tensorrt"]).findings == ()


@pytest.mark.parametrize(
    ("op", "told"),
    [
        ("QLinearAdd", True),
        ("QGemm", True),
        ("QAttention", True),
        ("MatMulIntegerToFloat", True),
        ("DynamicQuantizeMatMul", True),
        ("QuickGelu", False),
        ("QuantizeLinear", False),
    ],
)
def test_operators_of_onnx_runtime_on_integers_are_told(op: str, told: bool) -> None:
    view = View(with_last(conv(), "com.microsoft", op), TARGETS["ort"])
    assert [why.rpartition(", ")[2] for _, why in operators_on_integers(view)] == [
        f"1 {op}"
    ] * told


def test_every_rule_says_what_it_is() -> None:
    for rules in RULES.values():
        assert all(rule.find.__doc__ for rule in rules)
        assert len({rule.name for rule in rules}) == len(rules)


# --- what the runtime makes of a file -----------------------------------------------------


def fallen(model: ir.Model, target: Target) -> dict[str, str]:
    return dict(find_fusion(View(model, target)).fallen)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: float_input("UINT8"), "its input is not quantised"),
        (lambda: float_weight("UINT8"), "its weight is not quantised"),
        (lambda: conv({}, {}, {}, op="ConvTranspose", bias="none"), "no integer ConvTranspose"),
        (upsampled, "no integer ConvTranspose"),
        (lambda: conv({"dtype": "UINT16"}, {}, {"dtype": "UINT16"}, "none"), "16-bit activations"),
        (lambda: conv({}, {"dtype": "INT4"}, {}, "none"), "no integer kernel for INT4 weights"),
        (lambda: conv({}, {"dtype": "INT16"}, {}, "none"), "no integer kernel for INT16 weights"),
        pytest.param(
            lambda: conv({}, {}, {}, "off"), "its bias is not INT32 with the scale",
            marks=needs_runtime_1_24,
        ),
        (lambda: conv({}, {}, None, "int32"), "its output is not quantised: it is an output"),
        (lambda: conv(op="Gemm"), "its bias and its output are float"),
        pytest.param(
            lambda: conv({}, {"point": None}, op="Gemm", bias="int32"), "weight has no zero point",
            marks=needs_runtime_1_24,
        ),
        (lambda: blocks("INT4"), "no integer kernel for INT4"),
        (lambda: activated("Relu", 100), "the Relu behind it is not absorbed"),
        (lambda: activated("Sigmoid", 0), "its output is not quantised: it is read by Sigmoid"),
    ],
)
def test_the_reason_is_told_where_onnx_runtime_falls_back(
    model: Callable[[], ir.Model], why: str
) -> None:
    assert why in fallen(model(), TARGETS["ort"])["y"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: conv(SIGNED, {"dtype": "UINT8"}, SIGNED, "none"), "need INT8 weights"),
        (lambda: conv(SIGNED, {}, {}, "int32"), "its output is UINT8, its input INT8"),
    ],
)
def test_signed_and_unsigned_do_not_mix_on_arm(model: Callable[[], ir.Model], why: str) -> None:
    assert why in fallen(model(), TARGETS["ort-arm"])["y"]


def test_signed_activations_are_told_where_x86_does_not_fuse_them() -> None:
    model = residual("shortcut", "main")
    assert "its input is INT8, which fuses on ARM" in fallen(model, TARGETS["ort"])["d"]
    assert "d" not in fallen(model, TARGETS["ort-arm"])


def test_a_node_that_the_runtime_renames_is_found() -> None:
    made = Builder()
    made.node("MatMul", [made.qdq("x", "in"), made.weight("w", (4, 4), axis=1)], "p")
    made.node("Add", ["p", made.constant("b", np.ones(4))], "s")
    fusion = find_fusion(View(made.build(made.qdq("s", "out"), ("N", 4)), TARGETS["ort"]))
    assert (fusion.integer, dict(fusion.fallen)) == (("p",), {})


def weight_only(model: ir.Model, target: str) -> tuple[dict[str, str], dict[str, str]]:
    fusion = find_fusion(View(model, TARGETS[target]))
    assert fusion.integer == ()
    return dict(fusion.weight_only), dict(fusion.fallen)


@pytest.mark.parametrize(
    ("model", "target", "kernel"),
    [
        (lambda: blocks("INT4", activation=False), "ort", "MatMulNBits"),
        pytest.param(
            lambda: blocks("INT8", activation=False), "ort", "MatMulNBits",
            marks=needs_runtime_1_24,
        ),
        (lambda: blocks("INT4", rows=64, activation=False), "openvino", "FullyConnected"),
        (float_input, "ort", "Conv"),
        (lambda: blocks("INT4", activation=False), "tensorrt", "MatMul"),
    ],
)
def test_weights_alone_are_no_fall_back(
    model: Callable[[], ir.Model], target: str, kernel: str
) -> None:
    """The kernel that reads such weights is named, or the op that they are unpacked for."""
    assert weight_only(model(), target) == ({"y": kernel}, {})


@needs_runtime_1_24
def test_beside_integer_layers_a_float_input_is_a_fall_back_but_for_matmulnbits() -> None:
    made = Builder()
    first = made.node("Conv", [made.qdq("x", "in"), made.weight("w1", (4, 4, 3, 3))], "c1")
    made.node("Conv", [made.node("Relu", [made.qdq(first, "mid")], "r"),
                       made.weight("w2", (4, 4, 1, 1))], "c2")  # fmt: skip
    made.node("MatMul", ["c2", made.weight("w3", (4, 5), axis=1)], "y")
    fusion = find_fusion(View(made.build("y"), TARGETS["ort"]))
    assert fusion.integer == ("c1",)
    assert dict(fusion.fallen) == {"c2": "its input is not quantised"}
    assert dict(fusion.weight_only) == {"y": "MatMulNBits"}


def activated(op: str, point: int) -> ir.Model:
    """A Conv, an activation and its Q."""
    made = Builder()
    made.node("Conv", [made.qdq("x", "in"), made.weight("w", (4, 4, 3, 3))], "y")
    return made.build(made.qdq(made.node(op, ["y"], "a"), "out", point=point))


def product_and(shape: tuple[Any, ...], bias: tuple[int, ...]) -> ir.Model:
    """A MatMul of an input of ``shape`` with 4 channels, an Add of ``bias`` and a Tanh."""
    made = Builder()
    made.node("MatMul", [made.qdq("x", "in"), made.weight("w", (4, 5), axis=1)], "y")
    made.node("Add", [made.constant("b", np.ones(bias)), "y"], "s")
    return made.build(made.node("Tanh", ["s"], "t"), shape)


@pytest.mark.parametrize(
    ("shape", "bias"),
    [((1, 3, 4), (5,)), ((2, 3, 3, 4), (5,)), (("N", 4), (5,)), (("N", 4), (1, 5)),
     ((3, 4), (3, 5)), ((3, 4), (3, 1))],
)  # fmt: skip
def test_a_product_that_is_joined_with_what_is_added_is_told(
    shape: tuple[Any, ...], bias: tuple[int, ...]
) -> None:
    why = fallen(product_and(shape, bias), TARGETS["ort"])["y"]
    assert "joins it with the Add behind it" in why


@pytest.mark.parametrize(
    ("shape", "bias"),
    [(("N", 3, 4), (5,)), ((1, 3, 4), (1, 1, 5)), ((1, 3, 4), (1, 5)), ((1, 3, 4), (1,)),
     ((1, 3, 4), (3, 5)), ((3, 4), (1, 1, 5)), (("N", 4), (3, 5)), ((3, 4), ())],
)  # fmt: skip
def test_other_products_before_an_add_run_in_integer(
    shape: tuple[Any, ...], bias: tuple[int, ...]
) -> None:
    view = View(product_and(shape, bias), TARGETS["ort"])
    assert find_fusion(view).integer == expected_fusion(view).integer == ("y",)


@pytest.mark.parametrize("op", ["Conv", "MatMul", "Gemm"])
@pytest.mark.parametrize("bias", ["float", "int32", "none"])
def test_what_no_reason_speaks_against_does_run_in_integer(op: str, bias: str) -> None:
    """Here the reasons and ONNX Runtime itself agree."""
    for output in (None, {}):
        view = View(conv({}, {}, output, bias, op), TARGETS["ort"])
        expected = set(find_fusion(view).integer)
        assert expected == set(expected_fusion(view).integer)


@pytest.mark.parametrize(
    ("weight", "integer"),
    [({}, True), ({"dtype": "INT4", "cast": True}, True), ({"dtype": "INT4"}, False)],
)
def test_openvino_tells_its_kernels(weight: dict[str, Any], integer: bool) -> None:
    fusion = find_fusion(View(conv({}, weight), TARGETS["openvino"]))
    assert fusion.measured
    assert fusion.runtime == f"OpenVINO {openvino_session.version()}"
    assert fusion.integer == (("y",) if integer else ())


def test_openvino_reads_files_with_several_domains(tmp_path: Path) -> None:
    """It knows them by their first fields, of which none may come twice before the graph."""
    model = conv()
    model.opset_imports["com.microsoft"] = 1
    save(model, tmp_path / "file.onnx")
    openvino = pytest.importorskip("openvino")
    assert openvino.Core().read_model(tmp_path / "file.onnx").outputs


def test_dense_layers_are_known_by_their_scale_as_well() -> None:
    made = Builder()
    read = made.qdq("x", "in")
    for name in "abc":
        scale = np.linspace(0.01, 0.02, 16)
        weight = made.weight(f"{name}/w", (16, 16), axis=1, scale=scale)
        made.node("Gemm", [read, weight, made.constant(f"{name}/b", np.arange(16))], name)
        read = made.qdq(made.node("Relu", [name], f"{name}/relu"), f"{name}/out")
    fusion = find_fusion(View(made.build("c", ("N", 16)), TARGETS["openvino"]))
    assert (fusion.integer, dict(fusion.fallen)) == (("a", "b", "c"), {})


def test_without_openvino_its_rules_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_session, "available", lambda: False)
    checked = check(conv({}, {"dtype": "INT4"}), TARGETS["openvino"])
    assert not checked.fusion.measured and not checked.ran
    assert "no integer kernel for INT4" in checked.fusion.fallen["y"]


def test_the_share_in_integer_counts_multiply_accumulates() -> None:
    made = Builder()
    first = made.node("Conv", [made.qdq("x", "in"), made.weight("w1", (4, 4, 3, 3))], "c1")
    second = made.qdq(first, "mid")
    made.node("Conv", [second, made.constant("w2", np.ones((2, 4, 1, 1)))], "c2")
    fusion = find_fusion(View(made.build("c2"), TARGETS["ort"]))
    assert dict(fusion.macs) == {"c1": 4 * 4 * 9 * 16, "c2": 2 * 4 * 16}
    assert fusion.integer == ("c1",)
    assert fusion.integer_share == (4 * 4 * 9) / (4 * 4 * 9 + 2 * 4)


def test_unknown_shapes_give_no_share() -> None:
    made = Builder()
    made.node("Conv", [made.qdq("x", "in"), made.weight("w", (4, 4, 3, 3))], "y")
    model = made.build("y", ("N", 4, "h", "w"))
    checked = check(model, TARGETS["ort"])
    assert checked.fusion.integer_share is None
    assert not checked.ran
    feed = {"x": np.ones((1, 4, 5, 5), np.float32)}
    assert check(model, TARGETS["ort"], feed).ran


# --- releases -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "release"),
    [
        (lambda: conv(opset=17, ir_version=8), "1.17"),
        (lambda: conv(opset=17, ir_version=10), "1.18"),
        (lambda: conv(opset=17, ir_version=12), "1.24"),
        (conv, "1.18"),
        (lambda: conv({}, {"dtype": "INT4"}), "1.20"),
        (lambda: conv({}, {"dtype": "INT4", "cast": True}), "1.23.2"),
        (lambda: conv(opset=22), "1.21"),
        (lambda: conv({}, {"dtype": "INT2", "cast": True}, opset=25, ir_version=13), "1.24.4"),
        (lambda: conv(opset=26, ir_version=13), "1.25"),
        pytest.param(
            lambda: conv(opset=27, ir_version=14), None,
            marks=pytest.mark.skipif(onnx.IR_VERSION < 14, reason="onnx knows no IR version 14"),
        ),
    ],
)
def test_the_oldest_release_that_loads_a_file(
    model: Callable[[], ir.Model], release: str | None
) -> None:
    assert check(model(), TARGETS["tensorrt"]).oldest_onnxruntime == release


# --- foreign files ------------------------------------------------------------------------


def test_constants_may_be_nodes_and_nodes_nameless() -> None:
    model = with_constant_nodes(sound("tensorrt"))
    for node in model.graph:
        node.name = None
    checked = check(model, TARGETS["tensorrt"])
    assert checked.findings == ()
    assert len(checked.fusion.integer) == 1
    assert all(node.name is None for node in model.graph)


def test_a_float_model_breaks_no_rule_of_onnx_runtime() -> None:
    made = Builder()
    made.node("Conv", ["x", made.constant("w", np.ones((4, 4, 3, 3)))], "y")
    checked = check(made.build("y"), TARGETS["ort"])
    assert checked.findings == ()
    assert dict(checked.fusion.fallen) == {"y": "its weight is not quantised"}


def test_a_file_that_fails_to_load_is_a_finding() -> None:
    model = conv({}, {"dtype": "INT2"}, {}, opset=25, ir_version=13)
    checked = check(model, TARGETS["ort"])
    (finding,) = [found for found in checked.findings if found.rule == "does-not-load"]
    assert finding.refused and "ONNX Runtime cannot load the model" in finding.why
    assert not checked.ran and not checked.fusion.measured


def equal_sums(size: float) -> ir.Model:
    """A Softmax of equal sums: of large ones, the last bits decide which is the largest."""
    made = Builder()
    codes = made.rng.permuted(np.tile(made.rng.integers(-60, 60, 64), (32, 1)), axis=1)
    made.node("MatMul", [made.qdq("x", "in"), made.weight("w", (64, 32), axis=1)], "p")
    made.constant("w/codes", codes.T, "INT8")
    made.constant("w/scale", np.full(32, size, np.float32))
    made.node("Softmax", ["p"], "y")
    return made.build("y", (1, 64))


ONES = {"x": np.ones((1, 64), np.float32)}


def with_constant_nodes(model: ir.Model) -> ir.Model:
    """Constants made nodes, in place."""
    for value in list(model.graph.initializers.values()):
        node = ir.node("Constant", [], {"value": value.const_value})
        model.graph.insert_before(model.graph[0], node)
        value.replace_all_uses_with(node.outputs[0])
        del model.graph.initializers[value.name]
    return model


@pytest.mark.parametrize("change", [lambda model: model, with_constant_nodes])
@pytest.mark.parametrize(("size", "findings"), [(0.01, 0), (1e9, 1)])
def test_an_output_that_hangs_on_the_order_of_sums_is_not_called_wrong(
    size: float, findings: int, change: Callable[[ir.Model], ir.Model]
) -> None:
    checked = check(change(equal_sums(size)), TARGETS["ort"], ONES)
    assert [(found.rule, found.node) for found in checked.findings] == [
        ("chaotic-output", "(output y)")
    ] * findings
    assert checked.refused == ()


def one_hot(at: int) -> Array:
    return np.eye(1, 32, at, dtype=np.float32)


def checked_as_if(
    monkeypatch: pytest.MonkeyPatch, size: float, made_up: Array
) -> list[tuple[str, bool]]:
    """The findings for ``equal_sums``, if ``made_up`` were what the optimised model computes."""
    run = execution._run_ort

    def made_up_run(*args: Any, optimise: bool) -> dict[str, Array]:
        return {"y": made_up} if optimise else run(*args, optimise=optimise)

    monkeypatch.setattr(execution, "_run_ort", made_up_run)
    found = check(equal_sums(size), TARGETS["ort"], ONES).findings
    return [(finding.rule, finding.refused) for finding in found]


MADE_UP = {
    "NaN": np.full((1, 32), np.nan, np.float32),
    "one NaN": np.where(np.arange(32) == 5, np.nan, one_hot(3)),
    "infinite": np.full((1, 32), np.inf, np.float32),
    "zeros": np.zeros((1, 32), np.float32),
    "huge": np.full((1, 32), 1e20, np.float32),
    "huge in 64 bits": np.full((1, 32), 1e200),
    "of opposite sign": np.full((1, 32), -1, np.float32),
    "constant": np.full((1, 32), 0.1, np.float32),
    "of another size": 3 * one_hot(3),
    "of another shape": np.zeros(7, np.float32),
    "without the first axis": one_hot(3)[0],
}


@pytest.mark.parametrize("size", [0.01, 1e9])
@pytest.mark.parametrize("made_up", MADE_UP.values(), ids=MADE_UP)
def test_chaos_excuses_no_output_that_the_nodes_would_not_give(
    monkeypatch: pytest.MonkeyPatch, size: float, made_up: Array
) -> None:
    assert checked_as_if(monkeypatch, size, made_up) == [("wrong-output", True)]


@pytest.mark.parametrize("at", range(0, 32, 5))
def test_chaos_excuses_another_largest_of_equal_sums(
    monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    assert checked_as_if(monkeypatch, 1e9, one_hot(at)) in ([], [("chaotic-output", False)])
    assert checked_as_if(monkeypatch, 0.01, one_hot(at)) == [("wrong-output", True)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("change", [lambda model: model, with_constant_nodes])
def test_no_scale_of_a_weight_stays_where_roundings_are_tried(
    dtype: type[np.floating[Any]], change: Callable[[ir.Model], ir.Model]
) -> None:
    model = equal_sums(1.0)
    scale = model.graph.initializers["w/scale"]
    scale.const_value = ir.tensor(np.linspace(0.01, 9, 32, dtype=dtype))
    scale.dtype = scale.const_value.dtype
    view = View(change(model), TARGETS["ort"])
    (before,) = (link.scale for link in view.links if link.stored)
    tried = []
    for rounded in execution._rounded(view):
        links = View(rounded, view.target).links
        assert [link.scale for link in links if not link.stored] == [SX, SX]
        (after,) = (link.scale for link in links if link.stored)
        assert after.dtype == dtype and (after != before).all()
        np.testing.assert_allclose(after, before, rtol=3e-3 if dtype == np.float16 else 3e-6)
        tried.append(after)
    assert len(np.unique(tried, axis=0)) == len(tried) == execution.RUNS


def test_a_file_with_a_type_that_is_not_its_own_is_checked_all_the_same() -> None:
    proto = ir.to_proto(conv(SIGNED))
    proto.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.DOUBLE, [4]))
    checked = check(ir.from_proto(proto), TARGETS["tensorrt"])
    assert len(checked.fusion.integer) == 1


# --- where users meet it ------------------------------------------------------------------


def saved(model: ir.Model, folder: Path) -> str:
    path = folder / "model.onnx"
    save(model, path)
    return str(path)


def test_the_command_line_lists_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(conv(SIGNED, {"point": 3}, bias="int32"), tmp_path)
    report = tmp_path / "check.json"
    assert main(["--check", path, "--target", "tensorrt", "--report", str(report)]) == 1
    printed = capsys.readouterr()
    assert "w/dq  refused  zero-point-not-zero" in printed.out
    assert "y     refused  quantised-bias" in printed.out
    words = "breaks 2 rules of target 'tensorrt' in 2 places, first zero-point-not-zero at w/dq: "
    assert printed.err.startswith(f"error: '{path}' {words}")
    found = json.loads(report.read_text())["check"]
    assert {finding["rule"] for finding in found["findings"]} == {
        "zero-point-not-zero", "quantised-bias",
    }  # fmt: skip


def test_a_tensor_is_told_once_and_no_layer_of_a_refused_file_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = check(sound("ort"), TARGETS["tensorrt"])
    types = [found.node for found in checked.refused if found.rule == "type-not-taken"]
    assert "in/q" in types and "in/dq" not in types
    assert (checked.fusion.integer, checked.fusion.integer_share, checked.ran) == ((), 0.0, False)
    path = saved(sound("ort"), tmp_path)
    assert main(["--check", path, "--target", "tensorrt"]) == 1
    printed = capsys.readouterr()
    assert f"in {len(checked.refused)} places" in printed.err
    assert printed.out.count(" refused  ") == len(checked.refused)
    assert "run in integer" not in printed.out
    assert "no layer runs: target 'tensorrt' refuses the file" in printed.out


def test_the_command_line_passes_a_sound_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(sound("ort"), tmp_path)
    assert main(["--check", path]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 layers run in integer in ONNX Runtime" in printed
    assert "100.0% of their MACs" in printed
    assert "loads in ONNX Runtime 1.18 or newer" in printed
    assert "no rule of target 'ort' is broken" in printed


def test_what_is_slow_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(residual("shortcut", "main"), tmp_path)
    assert main(["--check", path, "--target", "tensorrt"]) == 0
    assert "y     note  residual-not-fused" in capsys.readouterr().out


def test_a_check_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second name is another model to check."""
    path, other = saved(residual("shortcut", "main"), tmp_path), tmp_path / "out.onnx"
    assert main([path, str(other), "--check"]) == 1
    assert f"'{other}' does not exist" in capsys.readouterr().err
    assert not other.exists()
    assert main([path, "--check", "--dry-run"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_check_refuses_what_it_would_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--min-sqnr", "--max-drop", "--eval"):
        assert main(["in.onnx", "--check", option, "20"]) == 2
        told = capsys.readouterr().err
        assert "No such option" in told and option in told


def test_samples_are_used_where_shapes_are_unknown(tmp_path: Path) -> None:
    made = Builder()
    made.node("Conv", [made.qdq("x", "in"), made.weight("w", (4, 4, 3, 3))], "y")
    model = made.build("y", ("N", 4, "h", "w"))
    assert not check_model(model).ran
    assert check_model(model, calibration=np.ones((8, 4, 5, 5), np.float32)).ran


@pytest.mark.parametrize(
    ("node", "advice"), [("node", "`exclude` that node"), ("(model)", "`exclude` layers")]
)
def test_an_output_that_is_refused_is_not_written(
    node: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(view: View) -> Findings:
        """A rule that every model breaks."""
        yield node, "it just is"

    monkeypatch.setitem(RULES, "onnxruntime", (Rule(always),))
    made = Builder()
    made.node("Conv", ["x", made.constant("w", np.ones((4, 4, 3, 3)))], "y")
    samples = {"x": np.ones((8, 4, 6, 6), np.float32)}
    words = f"target 'ort' in 1 place, first always at {node}: it just is; {advice}"
    with pytest.raises(OutputError, match=re.escape(words)):
        config = QuantConfig(method="nearest")
        quantize(made.build("y"), samples, config, output=tmp_path / "o.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["digits_resnet", pytest.param("digits_mobilenet", marks=pytest.mark.slow)]
)
def test_the_sample_models_deploy_on_every_target(
    name: str, target: str, models_dir: Path
) -> None:
    """What is written is clean; where its runtime is, all runs in integer and agrees."""
    config = QuantConfig(target=target, method="nearest")
    result = quantize(models_dir / f"{name}.onnx", models_dir / "digits_calib.npz", config)
    assert {finding.rule for finding in result.checked.findings} <= {"half-full-tiles"}
    assert dict(result.checked.fusion.fallen) == {}
    assert result.checked.fusion.integer_share == 1.0
    samples = np.load(models_dir / "digits_eval.npz")["input"]
    one = open_session(result.model, optimise=False).run(None, {"input": samples})[0]
    compiled = openvino_session.compile_model(result.model)
    other = next(iter(openvino_session.run(compiled, {"input": samples}).values()))
    assert (one.argmax(1) == other.argmax(1)).mean() >= 0.995
