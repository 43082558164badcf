"""What is folded into weights, and what must not be."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from simplified import BATCH_NORM, NORM, check, ops
from small_models import build

from onnx_attnround import graph
from onnx_attnround.simplify import simplify
from onnx_attnround.simplify.batch_norm import fold_batch_norm


def normed(x: str, weight: str, layer: str, bias: str = "") -> ir.Model:
    """Input ``x``, then ``layer`` with ``weight``, then BatchNormalization and Relu."""
    constants = f"float[{weight}] w, {NORM}" + (f", float[{bias}] b" if bias else "")
    op, _, attributes = layer.partition("<")
    call = (
        f"{op} <{attributes} (x, w{', b' if bias else ''})"
        if attributes
        else (f"{op}(x, w{', b' if bias else ''})")
    )
    y = ",".join("abcde"[: len(x.split(","))])
    return build(
        f"""g (float[{x}] x) => (float[{y}] y) <{constants}> {{
            c = {call}
            n = BatchNormalization<epsilon = 0.01>(c, gamma, beta, mean, variance)
            y = Relu(n)
        }}"""
    )


LAYERS = {
    "conv1d": ("N,4,8", "6,4,3", "Conv"),
    "conv2d": ("N,4,8,8", "6,4,3,3", "Conv<pads=[1,1,1,1], strides=[2,2]>"),
    "conv3d": ("N,4,5,5,5", "6,4,3,3,3", "Conv"),
    "grouped": ("N,4,8,8", "6,2,3,3", "Conv<group=2>"),
    "depthwise": ("N,6,8,8", "6,1,3,3", "Conv<group=6>"),
    "transpose1d": ("N,4,8", "4,6,3", "ConvTranspose"),
    "transpose2d": ("N,4,8,8", "4,6,3,3", "ConvTranspose<strides=[2,2]>"),
    "transpose-grouped": ("N,4,8,8", "4,3,3,3", "ConvTranspose<group=2>"),
    "transpose-depthwise": ("N,6,8,8", "6,1,3,3", "ConvTranspose<group=6>"),
    "gemm": ("N,4", "4,6", "Gemm"),
    "gemm-transB": ("N,4", "6,4", "Gemm<transB=1>"),
    "gemm-transA-factors": ("4,N", "6,4", "Gemm<transA=1, transB=1, alpha=0.5, beta=3.0>"),
}


@pytest.mark.parametrize("bias", ["", "6"])
@pytest.mark.parametrize("layer", LAYERS)
def test_batch_norm_folds_into_any_layer(layer: str, bias: str) -> None:
    result, lines = check(normed(*LAYERS[layer], bias))
    assert len(ops(result)) == 2
    assert "fold-batch-norm: 1 nodes" in lines
    node = result.graph[0]
    assert node.inputs[1].name == "w"
    assert node.inputs[2].name == ("b" if bias else "beta")
    assert len(result.graph.initializers) == 2


@pytest.mark.parametrize("bias", ["1,6", "1", "1,1", ""])
def test_gemm_bias_of_any_shape_becomes_one_per_channel(bias: str) -> None:
    shape = bias or " "
    result, _ = check(normed("N,4", "4,6", "Gemm", shape))
    assert ops(result) == ["Gemm", "Relu"]
    assert list(result.graph[0].inputs[2].shape) == [6]


def test_batch_norm_is_folded_in_float64() -> None:
    model = normed(*LAYERS["conv2d"], "6")
    w, b, gamma, beta, mean, variance = (
        graph.tensor_value(model, name).astype(np.float64)
        for name in ("w", "b", "gamma", "beta", "mean", "variance")
    )
    scale = gamma / np.sqrt(variance + np.float64(np.float32(0.01)))
    result, _ = simplify(model)
    folded = graph.tensor_value(result, "w"), graph.tensor_value(result, "b")
    np.testing.assert_array_equal(folded[0], (w * scale[:, None, None, None]).astype(np.float32))
    np.testing.assert_array_equal(folded[1], (scale * (b - mean) + beta).astype(np.float32))


def test_tied_weight_is_not_changed_for_the_other_layer() -> None:
    model = build(
        f"""g (float[N,4,8,8] x, float[N,4,8,8] x2) => (float[N,6,6,6] y, float[N,6,6,6] z)
        <float[6,4,3,3] w, {NORM}> {{
            c = Conv(x, w)
            y = BatchNormalization(c, gamma, beta, mean, variance)
            z = Conv(x2, w)
        }}"""
    )
    result, _ = check(model)
    assert ops(result) == ["Conv", "Conv"]
    assert result.graph[0].inputs[1].name == "w_0"
    assert result.graph[1].inputs[1].name == "w"
    np.testing.assert_array_equal(graph.tensor_value(result, "w"), graph.tensor_value(model, "w"))


def test_shared_batch_norm_parameters_serve_both_layers() -> None:
    model = build(
        f"""g (float[N,4,8] x) => (float[N,6,6] y) <float[6,4,3] w, float[6,6,1] v, {NORM}> {{
            c = Conv(x, w)
            n = BatchNormalization(c, gamma, beta, mean, variance)
            d = Conv(n, v)
            y = BatchNormalization(d, gamma, beta, mean, variance)
        }}"""
    )
    result, lines = check(model)
    assert ops(result) == ["Conv", "Conv"]
    assert "fold-batch-norm: 2 nodes" in lines


def test_gamma_that_is_also_the_bias_is_read_before_it_is_changed() -> None:
    model = build(
        f"""g (float[N,4,8] x) => (float[N,6,6] y) <float[6,4,3] w, {NORM}> {{
            c = Conv(x, w, gamma)
            y = BatchNormalization(c, gamma, gamma, mean, variance)
        }}"""
    )
    assert ops(check(model)[0]) == ["Conv"]


def kept(body: str, outputs: str = "float[N,6,6] y", more: str = "") -> ir.Model:
    return build(f"g (float[N,4,8] x{more}) => ({outputs}) <float[6,4,3] w, {NORM}> {{ {body} }}")


KEPT = {
    "second reader": kept(f"c = Conv(x, w) n = {BATCH_NORM} r = Relu(c) y = Add(n, r)"),
    "graph output": kept(f"c = Conv(x, w) y = {BATCH_NORM}", "float[N,6,6] y, float[N,6,6] c"),
    "no layer before": build(
        f"g (float[N,6,8] x) => (float[N,6,8] y) <{NORM}> {{ c = Relu(x) y = {BATCH_NORM} }}"
    ),
    "directly on the input": build(
        f"g (float[N,6,8] c) => (float[N,6,8] y) <{NORM}> {{ y = {BATCH_NORM} }}"
    ),
    "weight is an input": build(
        f"""g (float[N,4,8] x, float[6,4,3] w) => (float[N,6,6] y) <{NORM}> {{
            c = Conv(x, w) y = {BATCH_NORM} }}"""
    ),
    "bias is an input": kept(f"c = Conv(x, w, b) y = {BATCH_NORM}", more=", float[6] b"),
    "parameter is an input": build(
        f"""g (float[N,4,8] x, float[6] beta) => (float[N,6,6] y)
        <float[6,4,3] w, float[6] gamma, float[6] mean, float[6] variance> {{
            c = Conv(x, w) y = {BATCH_NORM} }}"""
    ),
    "gemm bias per row": build(
        f"""g (float[5,4] x) => (float[5,6] y) <float[4,6] w, float[5,1] b, {NORM}> {{
            c = Gemm(x, w, b) y = {BATCH_NORM} }}"""
    ),
    "scaled gemm bias is an input": build(
        f"""g (float[N,4] x, float[6] b) => (float[N,6] y) <float[4,6] w, {NORM}> {{
            c = Gemm<beta = 2.0>(x, w, b) y = {BATCH_NORM} }}"""
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_batch_norm_that_cannot_be_folded_stays(case: str) -> None:
    result, _ = check(KEPT[case], exact=True)
    assert ops(result) == ops(KEPT[case])


def test_batch_norm_in_training_mode_stays() -> None:
    model = kept(
        "c = Conv(x, w)"
        "y, m, v = BatchNormalization<training_mode = 1>(c, gamma, beta, mean, variance)",
        "float[N,6,6] y, float[6] m, float[6] v",
    )
    result, _ = simplify(model)  # ONNX Runtime cannot run it
    assert ops(result) == ["Conv", "BatchNormalization"]
    assert result.graph[1].attributes.get_int("training_mode") == 1


def test_batch_norm_per_activation_stays() -> None:
    model = kept(f"c = Conv(x, w) y = {BATCH_NORM}")
    model.graph[1].attributes.add(ir.AttrInt64("spatial", 0))
    assert fold_batch_norm(model) == 0


def test_folded_weight_keeps_its_type() -> None:
    dtype = np.float64
    model = normed(*LAYERS["conv1d"], "6")
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().astype(dtype), name=value.name)
        value.dtype = value.const_value.dtype
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.dtype = ir.DataType.DOUBLE
    result, _ = simplify(model)
    assert ops(result) == ["Conv", "Relu"]
    assert graph.tensor_value(result, "w").dtype == dtype
    assert graph.tensor_value(result, "b").dtype == dtype


def test_gemm_factors_fold_where_the_matrix_is_constant() -> None:
    model = build(
        """g (float[N,4] x, float[N,6] c) => (float[N,6] y, float[N,6] z, float[N,6] v)
        <float[6,4] w, float[4,6] u, float[6] b> {
            y = Gemm<transB = 1, alpha = 0.5, beta = -2.0>(x, w, b)
            z = Gemm<alpha = 3.0, beta = 0.25>(x, u, c)
            v = Gemm<beta = 0.5>(x, u)
        }"""
    )
    result, lines = check(model)
    assert "fold-gemm-scale: 3 nodes" in lines
    first, second, third = result.graph
    assert set(first.attributes) == {"transB"}
    assert second.attributes.get_float("alpha", 1.0) == 1.0
    assert second.attributes.get_float("beta") == 0.25
    assert "beta" not in third.attributes
    w, b = graph.tensor_value(model, "w"), graph.tensor_value(model, "b")
    np.testing.assert_array_equal(graph.tensor_value(result, "w"), w * np.float32(0.5))
    np.testing.assert_array_equal(graph.tensor_value(result, "b"), b * np.float32(-2))


def test_gemm_of_two_inputs_keeps_alpha() -> None:
    model = build(
        "g (float[N,4] x, float[4,M] w) => (float[N,M] y) { y = Gemm<alpha = 0.5>(x, w) }"
    )
    assert check(model, exact=True)[0].graph[0].attributes.get_float("alpha") == 0.5


def dense(call: str, x: str = "N,4", bias: str = "6", more: str = "") -> ir.Model:
    """A MatMul, ``call`` with its product and a bias, and Relu."""
    return build(
        f"""g (float[{x}] x) => (float[{x.replace("4", "6")}] y{more})
        <float[4,6] w, float[{bias}] b> {{
            [dense] p = MatMul(x, w)
            a = {call}
            y = Relu(a)
        }}"""
    )


@pytest.mark.parametrize("call", ["Add(p, b)", "Add(b, p)"])
@pytest.mark.parametrize("bias", ["6", "1,6"])
def test_matmul_and_bias_become_a_gemm_under_the_name_of_the_layer(call: str, bias: str) -> None:
    result, lines = check(dense(call, bias=bias))
    assert ops(result) == ["Gemm", "Relu"]
    assert result.graph[0].name == "dense"
    assert "fold-matmul-bias: 1 nodes" in lines


@pytest.mark.parametrize(
    "model",
    [
        dense("Add(p, b)", x="N,3,4"),
        dense("Add(p, b)", bias="1"),
        dense("Sub(p, b)"),
        dense("Add(p, p)"),
        dense("Add(p, b)", more=", float[N,6] p"),
    ],
    ids=["rank 3", "one number", "no Add", "no bias", "product is an output"],
)
def test_other_products_stay_matmul(model: ir.Model) -> None:
    result, _ = check(model)
    assert ops(result)[0] == "MatMul"


@pytest.mark.parametrize("call", ["Add(p, z)", "Add(z, p)"])
def test_matmul_before_a_residual_of_rank_2_becomes_a_gemm(call: str) -> None:
    """ONNX Runtime would make a float Gemm of the two."""
    model = build(
        f"g (float[3,4] x, float[3,6] z) => (float[3,6] y) <float[4,6] w> "
        f"{{ p = MatMul(x, w) a = {call} y = Relu(a) }}"
    )
    result, _ = check(model)
    assert ops(result) == ["Gemm", "Add", "Relu"]
    assert len(result.graph[0].inputs) == 2


def test_batch_norm_folds_into_matmul_and_bias() -> None:
    model = build(
        f"""g (float[N,4] x) => (float[N,6] n) <float[4,6] w, float[6] b, {NORM}> {{
            p = MatMul(x, w)
            c = Add(p, b)
            n = {BATCH_NORM}
        }}"""
    )
    result, _ = check(model)
    assert ops(result) == ["Gemm"]
