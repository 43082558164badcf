"""A raised opset changes the version, not the numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import version_converter
from small_models import build, build_proto, run

from onnx_attnround import graph
from onnx_attnround.errors import ModelError
from onnx_attnround.graph import opset

SMALL = """g (float[N,4] x) => (float[N,2] y) <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
    m = MatMul(x, w)
    y = Relu(m)
}"""


def large_model() -> ir.Model:
    model = build("g (float[N,40] x, float[40,30] w) => (float[N,30] y) { y = MatMul(x, w) }")
    weight = model.graph.inputs.pop()
    data = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    weight.const_value = ir.tensor(data, name="w")
    model.graph.register_initializer(weight)
    return model


def test_raise_opset_never_lowers_and_keeps_the_input() -> None:
    model = build(SMALL)
    assert graph.raise_opset(model, 17) is model
    assert graph.raise_opset(model, 13) is model
    raised = graph.raise_opset(model, 21)
    assert (model.opset_imports[""], model.ir_version) == (17, 8)
    assert (raised.opset_imports, raised.ir_version) == ({"": 21, "own": 1}, 10)


def test_raise_opset_keeps_a_higher_ir_version() -> None:
    assert graph.raise_opset(build(SMALL, ir_version=11), 21).ir_version == 11


@pytest.mark.parametrize(("version", "least"), [(9, 4), (13, 7), (17, 8), (21, 10), (25, 13)])
def test_the_least_ir_version_follows_from_the_opset(version: int, least: int) -> None:
    model = build(SMALL, opset=version, ir_version=13)
    assert graph.least_ir_version(model) == least


def test_raise_opset_without_changed_operators_needs_no_converter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opset, "version_converter", None)
    raised = graph.raise_opset(build(SMALL), 21)
    assert [node.op_type for node in raised.graph] == ["MatMul", "Relu"]


CONVERTED = {
    "softmax": (11, "g (float[N,3,4] x) => (float[N,3,4] y) { y = Softmax<axis = 1>(x) }"),
    "reduce": (
        13,
        "g (float[N,3,4] x) => (float[N,4] y) { y = ReduceMean<axes = [1], keepdims = 0>(x) }",
    ),
    "clip": (9, "g (float[N,3,4] x) => (float[N,3,4] y) { y = Clip<min = 0.0, max = 1.0>(x) }"),
    "squeeze": (11, "g (float[N,1,4] x) => (float[N,4] y) { y = Squeeze<axes = [1]>(x) }"),
    "split": (13, "g (float[N,4] x) => (float[N,2] y, float[N,2] z) { y, z = Split<axis = 1>(x) }"),
    "pad": (11, "g (float[N,4] x) => (float[N,6] y) <int64[4] p = {0, 1, 0, 1}> { y = Pad(x, p) }"),
    "pool": (
        11,
        "g (float[N,3,4] x) => (float[N,3,2] y) "
        "{ y = AveragePool<kernel_shape = [2], strides = [2]>(x) }",
    ),
    "upsample": (
        9,
        "g (float[N,1,4] x) => (float[N,1,10] y) <float[3] s = {1, 1, 2.5}> "
        '{ y = Upsample<mode = "linear">(x, s) }',
    ),
    "resize": (
        10,
        "g (float[N,1,4] x) => (float[N,1,10] y) <float[3] s = {1, 1, 2.5}> "
        '{ y = Resize<mode = "linear">(x, s) }',
    ),
    "resize nearest": (
        10,
        "g (float[N,1,4] x) => (float[N,1,6] y) <float[3] s = {1, 1, 1.5}> "
        '{ y = Resize<mode = "nearest">(x, s) }',
    ),
    "branch": (
        17,
        "g (float[N,4] x) => (float[N,1] y) <bool c = {1}> { y = If(c) <"
        "then_branch = t () => (float[N,1] p) { p = ReduceMax<axes = [1]>(x) }, "
        "else_branch = f () => (float[N,1] q) { q = ReduceMin<axes = [1]>(x) }> }",
    ),
}


@pytest.mark.parametrize("case", CONVERTED)
@pytest.mark.parametrize("version", [18, 21])
def test_raise_opset_keeps_the_numbers(case: str, version: int) -> None:
    opset, text = CONVERTED[case]
    model = build(text, opset, ir_version=4 if opset < 12 else 8)
    model.metadata_props["by"] = "me"
    before = ir.to_proto(model)
    raised = graph.raise_opset(model, version)
    assert raised.opset_imports[""] == version
    assert raised.metadata_props == {"by": "me"}
    assert ir.to_proto(model) == before
    for old, new in zip(
        (*model.graph.inputs, *model.graph.outputs),
        (*raised.graph.inputs, *raised.graph.outputs),
        strict=True,
    ):
        assert (old.name, old.dtype, str(old.shape)) == (new.name, new.dtype, str(new.shape))
    names = [node.name for node in raised.graph.all_nodes()]
    assert all(names) and len(set(names)) == len(names)
    shape = [dim or 3 for dim in graph.input_specs(model)[0].shape]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for old, new in zip(run(model, {"x": x}), run(raised, {"x": x}), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)


def test_raise_opset_puts_large_weights_back() -> None:
    model = large_model()
    y = model.graph.outputs[0]
    node = ir.node("ReduceSumSquare", [y], {"axes": [1]}, name="last")
    model.graph.append(node)
    node.outputs[0].name, node.outputs[0].type = "z", y.type
    model.graph.outputs[0] = node.outputs[0]
    raised = graph.raise_opset(model, 21)
    assert [value.name for value in raised.graph.inputs] == ["x"]
    np.testing.assert_array_equal(graph.tensor_value(raised, "w"), graph.tensor_value(model, "w"))
    x = np.ones((2, 40), np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})[0], run(raised, {"x": x})[0])


def test_raise_opset_of_an_old_file_with_weights_as_inputs() -> None:
    weight = ", ".join(str(number) for number in range(400))
    model = build(
        f"g (float[N,4] x, float[4,100] w = {{{weight}}}) => (float[N,1] y) "
        "{ m = MatMul(x, w) y = ReduceMax<axes = [1]>(m) }",
        opset=8,
        ir_version=3,
    )
    raised = graph.raise_opset(model, 21)
    assert [spec.name for spec in graph.input_specs(raised)] == ["x"]
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})[0], run(raised, {"x": x})[0])


def test_raise_opset_leaves_other_domains_alone() -> None:
    model = build(
        "g (float[N,4] x) => (float[N,1] y) { "
        "[first] a = own.Foo<k = 3>(x) y = ReduceMax<axes = [1]>(a) }"
    )
    raised = graph.raise_opset(model, 21)
    first = raised.graph.node("first")
    assert (first.domain, first.op_type, first.attributes.get_int("k")) == ("own", "Foo", 3)


def test_raise_opset_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="opset 999 is unknown to onnx"):
        graph.raise_opset(build(SMALL), 999)

    def fail(*_: object) -> None:
        raise RuntimeError("No Adapter To Version $20\nfor Foo")

    monkeypatch.setattr(version_converter, "convert_version", fail)
    with pytest.raises(
        ModelError, match=r"from opset 11 to 21: No Adapter To Version \$20 for Foo; export it"
    ):
        graph.raise_opset(build(CONVERTED["softmax"][1], 11), 21)


def test_raise_opset_refuses_a_result_with_other_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    other = build_proto("g (float[N,3,4] x) => (float[N,3,4] other) { other = Relu(x) }", 21, 10)
    monkeypatch.setattr(version_converter, "convert_version", lambda *_: other)
    with pytest.raises(ModelError, match=r"outputs \['other'\], expected \['y'\]"):
        graph.raise_opset(build(CONVERTED["softmax"][1], 11), 21)


def test_raise_opset_wants_functions_inlined() -> None:
    model = build(
        """g (float[N] x) => (float[N] y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 17]> F (x) => (y) { y = Relu(x) }"""
    )
    with pytest.raises(ModelError, match="functions, got 1; simplify it first"):
        graph.raise_opset(model, 21)


def test_values_keep_their_names_where_an_operator_is_replaced() -> None:
    """Scatter becomes ScatterElements, whose output the converter calls otherwise."""
    text = """g (float[3,3] x, int64[2,3] i, float[2,3] u) => (float[3,2] y) <float[3,2] w> {
        a = Relu(x)  s = Scatter<axis = 0>(a, i, u)  r = Relu(s)  y = MatMul(r, w) }"""
    raised = graph.raise_opset(build(text, 10), 13)
    assert [node.op_type for node in raised.graph] == ["Relu", "ScatterElements", "Relu", "MatMul"]
    assert {"a", "s", "r", "y"} <= {value.name for node in raised.graph for value in node.outputs}
