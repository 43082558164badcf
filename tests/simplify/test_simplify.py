"""Simplified models compute the same, with fewer nodes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from simplified import BATCH_NORM, NORM, check, ops
from small_models import build, random_feeds, run

from onnx_attnround import graph
from onnx_attnround.errors import ModelError
from onnx_attnround.graph import saving
from onnx_attnround.simplify import onnxsim_pass, simplify

CONV = f"""g (float[N,4,8,8] x) => (float[N,6,6,6] y) <float[6,4,3,3] w, {NORM}> {{
    c = Conv(x, w)
    n = {BATCH_NORM}
    y = Relu(n)
}}"""
GEMM = f"""g (float[N,4] x) => (float[N,6] y) <float[4,6] w, {NORM}> {{
    c = Gemm(x, w)
    n = {BATCH_NORM}
    y = Relu(n)
}}"""


def test_weights_from_constant_nodes_identities_and_default_inputs() -> None:
    numbers = ", ".join(str(round(0.1 * i - 1, 1)) for i in range(24))
    model = build(
        f"""g (float[N,4] x, float[6,4] w = {{{numbers}}}) => (float[N,6] y) <{NORM}> {{
            b = Constant<value = float[6] {{1.0, 2.0, 3.0, 4.0, 5.0, 6.0}}>()
            e = Constant<value_floats = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]>()
            i = Identity(w)
            j = Identity(i)
            k = Identity(b)
            c = Gemm<transB = 1>(x, j, k)
            d = Identity(c)
            n = BatchNormalization(d, gamma, e, mean, variance)
            y = Identity(n)
        }}"""
    )
    result, lines = check(model)
    assert ops(result) == ["Gemm"]
    assert [value.name for value in result.graph.inputs] == ["x"]
    assert {"freeze-inputs: 1 nodes", "lift-constants: 2 nodes"} < set(lines)


def test_constants_of_any_kind_are_lifted() -> None:
    model = build(
        """g (float[N] x) => (string[2] s, int64[N,1] y, int64 i, float f) {
            words = Constant<value = string[2] {"a", "b"}>()
            more = Constant<value_strings = ["c", "d"]>()
            s = StringConcat(words, more)
            one = Constant<value_ints = [1]>()
            two = Constant<value = int64 {2}>()
            i = Constant<value_int = 7>()
            f = Constant<value_float = 0.5>()
            c = Cast<to = 7>(x)
            u = Unsqueeze(c, one)
            y = Mul(u, two)
        }""",
        opset=20,
        ir_version=9,
    )
    result, lines = simplify(model)
    assert "lift-constants: 4 nodes" in lines
    assert {"one", "two"} <= set(result.graph.initializers)
    # Older releases of onnxsim join the words, too.
    assert {"words", "s"} & set(result.graph.initializers)
    feeds = random_feeds(model)
    for old, new in zip(run(model, feeds), run(result, feeds), strict=True):
        np.testing.assert_array_equal(old, new)


def test_weights_as_inputs_of_an_old_file_become_constants() -> None:
    model = build(
        """g (float[N,4] x, float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}) => (float[N,2] y) {
            y = MatMul(x, w)
        }""",
        opset=8,
        ir_version=3,
    )
    result, _ = check(model, exact=True)
    assert [value.name for value in result.graph.inputs] == ["x"]
    assert result.ir_version == 4


def test_constant_branches_fold_and_matmul_with_bias_stays() -> None:
    model = build(
        """g (float[N,5,4] x) => (float[N,5,6] y) <float[6,4] w, float[6] b> {
            t = Transpose<perm = [1, 0]>(w)
            m = MatMul(x, t)
            s = Add(b, b)
            y = Add(m, s)
        }"""
    )
    result, lines = check(model)
    assert ops(result) == ["MatMul", "Add"]
    assert "onnxsim: 4 to 2 nodes" in lines


def test_transposed_input_is_not_drawn_into_gemm_nor_layers_joined() -> None:
    model = build(
        """g (float[4,N] x) => (float[N,6] y) <float[4,6] w, float[4,6] v, float[4,6] u> {
            t = Transpose<perm = [1, 0]>(x)
            a = Gemm(t, w)
            b = MatMul(t, v)
            c = MatMul(t, u)
            d = Add(a, b)
            y = Add(d, c)
        }"""
    )
    result, _ = check(model)
    assert Counter(ops(result)) == {"Transpose": 1, "Gemm": 3, "Add": 2}


def test_shape_arithmetic_folds_and_unnamed_dimensions_stay_unnamed() -> None:
    model = build(
        """g (float[?,4,3] x, float[batch,M] u) => (float[?,12] y, float[batch,M] z) {
            s = Shape(x)
            zero = Constant<value_int = 0>()
            axis = Constant<value_ints = [0]>()
            rest = Constant<value_ints = [-1]>()
            n = Gather<axis = 0>(s, zero)
            m = Unsqueeze(n, axis)
            shape = Concat<axis = 0>(m, rest)
            y = Reshape(x, shape)
            z = Relu(u)
        }"""
    )
    result, _ = check(model, exact=True)
    assert len(ops(result)) < len(ops(model))
    assert [str(value.shape) for value in result.graph.inputs] == ["[None,4,3]", "[batch,M]"]


def test_scale_after_a_folded_batch_norm_folds_too() -> None:
    model = build(
        f"""g (float[N,4,8] x) => (float[N,6,6] y)
        <float[6,4,3] w, {NORM}, float[6,1] scale, float[6,1] shift> {{
            c = Conv(x, w)
            n = {BATCH_NORM}
            m = Mul(n, scale)
            y = Add(m, shift)
        }}"""
    )
    assert ops(check(model)[0]) == ["Conv"]


def test_attention_keeps_its_layers() -> None:
    model = build(
        """g (float[2,5,8] x) => (float[2,5,8] y)
        <float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8] bq, float[8] bk, float[8] bv> {
            heads = Constant<value_ints = [2, 5, 2, 4]>()
            joined = Constant<value_ints = [2, 5, 8]>()
            root = Constant<value_float = 2.0>()
            q0 = MatMul(x, wq)  q1 = Add(q0, bq)  q2 = Reshape(q1, heads)
            k0 = MatMul(x, wk)  k1 = Add(k0, bk)  k2 = Reshape(k1, heads)
            v0 = MatMul(x, wv)  v1 = Add(v0, bv)  v2 = Reshape(v1, heads)
            q = Transpose<perm = [0, 2, 1, 3]>(q2)
            k = Transpose<perm = [0, 2, 3, 1]>(k2)
            v = Transpose<perm = [0, 2, 1, 3]>(v2)
            s0 = MatMul(q, k)
            s1 = Div(s0, root)
            s = Softmax<axis = -1>(s1)
            c0 = MatMul(s, v)
            c1 = Transpose<perm = [0, 2, 1, 3]>(c0)
            y = Reshape(c1, joined)
        }"""
    )
    result, _ = check(model, exact=True)
    assert ops(result) == [op for op in ops(model) if op != "Constant"]


def test_equal_constants_of_different_layers_are_not_tied() -> None:
    model = build(
        """g (float[N,2,8] x) => (float[N,2,8] y)
        <float[2,2,1] w, float[2,2,1] v, float[2] b = {0, 0}, float[2] c = {0, 0}> {
            a = Conv(x, w, b)
            r = Relu(a)
            y = Conv(r, v, c)
        }"""
    )
    result, _ = check(model, exact=True)
    assert [node.inputs[2].name for node in result.graph if node.op_type == "Conv"] == ["b", "c"]


def test_if_with_branches_that_read_the_outer_graph() -> None:
    model = build(
        f"""g (float[N,6,8] x, bool c0) => (float[N,6,8] y) <float[6,6,1] w, {NORM}> {{
            i = Identity(x)
            r = Relu(i)
            p = If(c0) <
                then_branch = yes () => (float[N,6,8] q) {{
                    k = Constant<value = float[1] {{2.0}}>()
                    j = Identity(k)
                    m = Mul(r, j)
                    q = Conv(m, w)
                }},
                else_branch = no () => (float[N,6,8] s) {{ s = Identity(r) }}
            >
            c = Conv(p, w)
            y = {BATCH_NORM}
        }}"""
    )
    result, _ = check(model)
    assert ops(result) == ["Relu", "If", "Conv"]
    assert result.graph[2].inputs[1].name == "w_0"


def test_loop_keeps_its_body() -> None:
    model = build(
        """g (float[N,6] x) => (float[N,6] y) <float[6,6] w> {
            n = Constant<value = int64 {3}>()
            go = Constant<value = bool {1}>()
            v = Identity(w)
            y = Loop(n, go, x) <body = step (int64 i, bool more, float[N,6] a)
                => (bool again, float[N,6] b) {
                    again = Identity(more)
                    m = MatMul(a, v)
                    t = Identity(m)
                    b = Tanh(t)
            }>
        }"""
    )
    result, _ = check(model)
    assert ops(result) == ["Loop"]


def test_identity_between_two_outputs_stays() -> None:
    model = build(
        """g (float[N,6] x) => (float[N,6] r, float[N,6] y, float[N,6] z) {
            r = Relu(x) y = Identity(r) z = Identity(x)
        }"""
    )
    assert ops(check(model, exact=True)[0]) == ["Relu", "Identity", "Identity"]


FUNCTIONS = """g (float[N,4] x) => (float[N,4] y) <float[4,4] w> {
        a = own.Layer(x, w)
        b = own.Layer(a, w)
        y = Relu(b)
    }
    <domain: "own", opset_import: ["" : 17]>
    Layer (x, w) => (y) { m = MatMul(x, w) y = Tanh(m) }"""


def test_functions_are_inlined() -> None:
    result, lines = check(build(FUNCTIONS))
    assert ops(result) == ["MatMul", "Tanh", "MatMul", "Tanh", "Relu"]
    assert not result.functions
    assert "inline-functions: 2 nodes" in lines


def test_function_of_another_opset_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot inline .* 18"):
        simplify(build(FUNCTIONS, opset=18))


def test_custom_operators_pass_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    model = build(
        """g (float[N,4] x) => (float[N,4] y) <float[4] w> {
            a = own.Unknown(w)
            b = Neg(w)
            c = Add(a, b)
            y = Add(x, c)
        }"""
    )
    model.metadata_props["origin"] = "here"
    result, _ = simplify(model)
    assert ops(result) == ["Unknown", "Add", "Add"]
    assert result.metadata_props == {"origin": "here"}
    assert capfd.readouterr() == ("", "")


def test_failure_of_onnxsim_is_told_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(onnxsim_pass, "_simplified", fail)
    result, lines = simplify(build(GEMM))
    assert ops(result) == ["Gemm", "Relu"]
    assert "onnxsim: failed (out of luck and more)" in lines


def test_result_of_onnxsim_with_other_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ir.to_proto(build("g (float[N,4] x) => (float[N,4] other) { other = Relu(x) }"))
    monkeypatch.setattr(onnxsim_pass, "_simplified", lambda _: other)
    result, lines = simplify(build("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"))
    assert result.graph.outputs[0].name == "y"
    assert any(line.startswith("onnxsim: failed") and "['other']" in line for line in lines)


def test_result_of_onnxsim_with_other_opsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    other = ir.to_proto(model)
    other.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    monkeypatch.setattr(onnxsim_pass, "_simplified", lambda _: other)
    result, lines = simplify(model)
    assert "com.microsoft" not in result.opset_imports
    assert any("com.microsoft" in line for line in lines)


@pytest.mark.parametrize(("limit", "folds"), [(10**6, True), (100, False)])
def test_onnxsim_sees_large_constants_only_where_it_could_fold_them(
    limit: int, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where they are too large for a message."""
    monkeypatch.setattr(saving, "INLINE_LIMIT", limit)
    monkeypatch.setattr(onnxsim_pass, "LARGE", 100)
    seen: list[list[str]] = []

    def watched(proto: onnx.ModelProto) -> onnx.ModelProto:
        seen.append([tensor.name for tensor in proto.graph.initializer])
        return simplified(proto)

    simplified = onnxsim_pass._simplified
    monkeypatch.setattr(onnxsim_pass, "_simplified", watched)
    model = build(
        """g (float[N,8] x) => (float[N,8] y) <float[8,8] w, float[8,8] v, float[8] c> {
            t = Transpose(w)
            a = MatMul(x, t)
            b = Add(a, c)
            y = MatMul(b, v)
        }"""
    )
    result, _ = check(model)
    assert seen == [["w", "c"] if folds else ["c"]]
    assert ("Transpose" in ops(result)) != folds


def test_failure_of_shape_inference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise onnx.shape_inference.InferenceError("no way")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    assert "infer-shapes: failed (no way)" in simplify(build(GEMM))[1]


def test_shapes_are_inferred_and_weights_survive_that() -> None:
    model = build(
        """g (float[N,40] x) => (float[N,40] y) <float[40,30] w, float[30,40] v> {
            a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)
        }"""
    )
    result, _ = check(model, exact=True)
    assert [str(node.outputs[0].shape) for node in result.graph] == ["[N,30]", "[N,30]", "[N,40]"]
    assert set(result.graph.initializers) == {"w", "v"}
    assert [value.name for value in result.graph.inputs] == ["x"]


def test_same_model_gives_the_same_bytes() -> None:
    model = build(CONV)
    first, second = (ir.to_proto(simplify(model)[0]).SerializeToString() for _ in range(2))
    assert first == second


def test_pytorch_is_not_imported() -> None:
    code = (
        "import sys, onnx_ir as ir\n"
        "from onnx_attnround.simplify import simplify\n"
        "text = '<ir_version: 8, opset_import: [\"\" : 17]> '\n"
        "text += 'g (float[N] x) => (float[N] y) { a = Identity(x) y = Relu(a) }'\n"
        "lines = simplify(ir.from_onnx_text(text))[1]\n"
        "assert not any('failed' in line for line in lines), lines\n"
        "assert 'onnxsim' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.data
@pytest.mark.parametrize(("name", "nodes"), [("resnet20_cifar", 59), ("mobilenetv2_cifar", 78)])
def test_shared_models(name: str, nodes: int, data_dir: Path) -> None:
    result, _ = check(graph.load(data_dir / f"{name}.onnx"))
    assert len(ops(result)) <= nodes
    assert "Constant" not in ops(result)
