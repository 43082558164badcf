"""Every weighted op, as patches times a matrix, gives what ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, shape_inference
from small_models import build, build_proto, random_feeds, run

from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import name_nodes
from onnx_attnround.ops import (
    WEIGHTED_OPS,
    clip_bounds,
    conv_pads,
    input_grid,
    matrix_shape,
    weight_matrix,
    weight_tensor,
)
from onnx_attnround.plan import make_plan
from onnx_attnround.records import LayerPlan, QuantSpec

EXAMPLES = settings(max_examples=120, deadline=None)


def make_layer(
    op_type: str, x: np.ndarray, weight: np.ndarray, attributes: dict[str, Any]
) -> tuple[LayerPlan, np.ndarray]:
    """The plan of a model of one node, and what ONNX Runtime computes from ``x``."""
    node = helper.make_node(op_type, ["x", "w"], ["y"], name="layer", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = ir.from_proto(proto)
    (layer,) = make_plan(model, QuantConfig(), quantise_activations=False).layers
    return layer, run(model, {"x": x})[0]


def all_rows(layer: LayerPlan, x: np.ndarray, zero: float = 0.0) -> torch.Tensor:
    grid = input_grid(layer, torch.from_numpy(x))
    index = torch.arange(grid.count).expand(len(grid.x), grid.count)
    return grid.rows(grid.sources(index), zero)


def product(layer: LayerPlan, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``W x`` at every output position, ``[samples * positions, channels]``."""
    matrix = torch.from_numpy(np.ascontiguousarray(weight_matrix(layer, weight)))
    out = torch.einsum("gpd,god->pgo", all_rows(layer, x), matrix)
    return out.reshape(len(out), -1).numpy()


def channels_last(y: np.ndarray) -> np.ndarray:
    return np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Small integers as floats, whose sums of products are exact in any order."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def check(op_type: str, x: np.ndarray, weight: np.ndarray, attributes: dict[str, Any]) -> None:
    layer, y = make_layer(op_type, x, weight, attributes)
    wide = channels_last(y) if op_type.startswith("Conv") else y.reshape(-1, y.shape[-1])
    np.testing.assert_array_equal(product(layer, x, weight), wide)
    assert matrix_shape(layer) == weight_matrix(layer, weight).shape
    back = weight_tensor(layer, weight_matrix(layer, weight))
    np.testing.assert_array_equal(back, weight)
    assert back.flags.c_contiguous
    axis = WEIGHTED_OPS[op_type].channel_axis(layer.attributes)
    assert layer.weight_spec.axis == axis
    groups = layer.attributes.get("group", 1) if op_type == "ConvTranspose" else 1
    assert weight.shape[axis] * groups == wide.shape[1]


# --- Conv ---------------------------------------------------------------------------------


@st.composite
def conv_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Input, weight and attributes; depthwise is what one channel per group gives."""
    rank = draw(st.integers(1, 3))

    def per_axis(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    group, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    sizes, kernel = per_axis(1, 7), per_axis(1, 3)
    attributes: dict[str, Any] = {"group": group, "kernel_shape": kernel}
    if draw(st.booleans()):
        attributes["strides"] = per_axis(1, 3)
    modes = ["pads", "NOTSET", "VALID"]
    if draw(st.booleans()):
        attributes["dilations"] = per_axis(1, 3)
    else:
        modes += ["SAME_UPPER", "SAME_LOWER"]  # which ONNX Runtime refuses with dilations
    mode = draw(st.sampled_from(modes))
    if mode == "pads":
        attributes["pads"] = per_axis(0, 3, 2 * rank)
    else:
        attributes["auto_pad"] = mode
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    x = integers(rng, (draw(st.integers(1, 2)), group * inner, *sizes))
    return x, integers(rng, (group * outer, inner, *kernel)), attributes


@EXAMPLES
@given(conv_cases())
def test_conv(case: tuple[np.ndarray, np.ndarray, dict[str, Any]]) -> None:
    x, weight, attributes = case
    kernel = weight.shape[2:]
    pads = conv_pads(attributes, x.shape[2:], kernel)
    dilations = attributes.get("dilations") or [1] * len(kernel)
    for axis, size in enumerate(x.shape[2:]):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        assume(size + pads[axis] + pads[axis + len(kernel)] >= reach)
    check("Conv", x, weight, attributes)


def test_depthwise_conv_has_one_group_per_channel() -> None:
    rng = np.random.default_rng(0)
    x, weight = integers(rng, (2, 6, 5, 5)), integers(rng, (6, 1, 3, 3))
    check("Conv", x, weight, {"group": 6, "pads": [1, 1, 1, 1]})
    layer, _ = make_layer("Conv", x, weight, {"group": 6})
    assert weight_matrix(layer, weight).shape == (6, 1, 9)


# --- ConvTranspose ------------------------------------------------------------------------


@st.composite
def transpose_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    rank = draw(st.integers(1, 3))

    def per_axis(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    group, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    sizes, kernel, strides = per_axis(1, 4), per_axis(1, 3), per_axis(1, 3)
    attributes: dict[str, Any] = {"group": group, "strides": strides}
    dilations = [1] * rank
    if draw(st.booleans()):
        dilations = attributes["dilations"] = per_axis(1, 2)
    if draw(st.booleans()):
        attributes["output_padding"] = [draw(st.integers(0, stride - 1)) for stride in strides]
    full = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    mode = draw(st.sampled_from(["pads", "", "VALID", "SAME_UPPER", "SAME_LOWER", "output_shape"]))
    if mode == "pads":
        room = [min(2, (f - 1) // 2) for f in full]
        attributes["pads"] = [draw(st.integers(0, r)) for r in room + room]
    elif mode == "output_shape":
        attributes["output_shape"] = [
            draw(st.integers(max(1, f - 3), f + s - 1)) for f, s in zip(full, strides, strict=True)
        ]
        attributes["auto_pad"] = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER"]))
    elif mode:
        attributes["auto_pad"] = mode
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    x = integers(rng, (draw(st.integers(1, 2)), group * inner, *sizes))
    return x, integers(rng, (group * inner, outer, *kernel)), attributes


@EXAMPLES
@given(transpose_cases())
def test_conv_transpose(case: tuple[np.ndarray, np.ndarray, dict[str, Any]]) -> None:
    check("ConvTranspose", *case)


# --- Gemm and MatMul ----------------------------------------------------------------------


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("rows", [1, 4])
def test_gemm(trans_a: int, trans_b: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    x = integers(rng, (5, rows) if trans_a else (rows, 5))
    weight = integers(rng, (3, 5) if trans_b else (5, 3))
    check("Gemm", x, weight, {"transA": trans_a, "transB": trans_b})


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 3, 4, 5), (1, 5), (1, 1, 5)])
def test_matmul(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    check("MatMul", integers(rng, shape), integers(rng, (5, 3)), {})


# --- patches ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(conv_cases() | transpose_cases(), st.sampled_from([np.uint8, np.int8, np.float32]))
def test_padding_with_the_zero_code_is_padding_with_zero(
    case: tuple[np.ndarray, np.ndarray, dict[str, Any]], dtype: Any
) -> None:
    x, weight, attributes = case
    layer = _layer("Conv" if "kernel_shape" in attributes else "ConvTranspose", weight, attributes)
    point = 8  # x holds integers from -8
    codes = (x + point).astype(dtype)
    assume(min(input_grid(layer, torch.from_numpy(codes)).positions) > 0)
    rows = all_rows(layer, codes, point)
    assert rows.dtype == torch.from_numpy(codes).dtype
    np.testing.assert_array_equal(rows.numpy().astype(np.float32) - point, all_rows(layer, x))


def _layer(op_type: str, weight: np.ndarray, attributes: dict[str, Any]) -> LayerPlan:
    axis = WEIGHTED_OPS[op_type].channel_axis(attributes)
    return LayerPlan(
        node="layer", op_type=op_type, x="x", y="y", weight="w", bias=None,
        weight_shape=weight.shape, attributes=attributes,
        weight_spec=QuantSpec(bits=8, signed=True, symmetric=True, axis=axis),
    )  # fmt: skip


def test_rows_are_built_only_where_asked() -> None:
    rng = np.random.default_rng(0)
    x, weight = integers(rng, (3, 4, 6, 5)), integers(rng, (4, 2, 3, 3))
    layer, _ = make_layer("Conv", x, weight, {"group": 2, "pads": [1, 0, 2, 1]})
    grid = input_grid(layer, torch.from_numpy(x))
    every = all_rows(layer, x).reshape(2, 3, grid.count, -1)
    index = torch.from_numpy(rng.integers(0, grid.count, (3, 7)))
    some = grid.rows(grid.sources(index)).reshape(2, 3, 7, -1)
    for sample in range(3):
        assert torch.equal(some[:, sample], every[:, sample, index[sample]])


# --- refusals and costs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_type", "shape", "word"),
    [
        ("Conv", (4, 4), "0 spatial"),
        ("Conv", (4, 4, 1, 1, 1, 1), "4 spatial"),
        ("ConvTranspose", (4, 4, 1, 1, 1, 1), "4 spatial"),
        ("Gemm", (4,), "rank 1"),
        ("MatMul", (2, 4, 4), "rank 3"),
    ],
)
def test_weights_of_other_ranks_are_refused(
    op_type: str, shape: tuple[int, ...], word: str
) -> None:
    op = WEIGHTED_OPS[op_type]
    assert word in (op.rank_error({}, shape) or "")
    assert op.rank_error({}, (4, 4) if op_type in ("Gemm", "MatMul") else (4, 4, 3)) is None


@pytest.mark.parametrize(
    ("x", "weight", "node", "macs"),
    [
        # outputs * inputs * kernel * positions
        ("[N,4,8,8]", "[6,4,3,3]", "Conv", 6 * 4 * 9 * 36),
        ("[N,4,8,8]", "[6,4,3,3]", "Conv<strides=[2,2],pads=[1,1,1,1]>", 6 * 4 * 9 * 16),
        ("[N,4,8,8]", "[4,1,3,3]", "Conv<group=4>", 4 * 9 * 36),
        ("[N,4,9]", "[6,2,3]", "Conv<group=2>", 6 * 2 * 3 * 7),
        ("[N,4,5,5,5]", "[6,4,2,2,2]", "Conv", 6 * 4 * 8 * 64),
        # each input element meets each tap of each output channel of its group
        ("[N,4,8,8]", "[4,6,2,2]", "ConvTranspose<strides=[2,2]>", 64 * 4 * 6 * 4),
        ("[N,4,8,8]", "[4,3,2,2]", "ConvTranspose<group=2>", 64 * 4 * 3 * 4),
        ("[N,5]", "[5,3]", "Gemm", 15),
        ("[5,N]", "[3,5]", "Gemm<transA=1,transB=1>", 15),
        ("[N,5]", "[5,3]", "MatMul", 15),
        ("[N,7,5]", "[5,3]", "MatMul", 7 * 15),
        ("[N,2,7,5]", "[5,3]", "MatMul", 14 * 15),
        ("[N,4,H,8]", "[6,4,3,3]", "Conv", None),
        ("[N,T,5]", "[5,3]", "MatMul", None),
    ],
)
def test_macs_for_one_sample(x: str, weight: str, node: str, macs: int | None) -> None:
    text = f"""g (float{x} x) => (int64[r] size) <float{weight} w>
               {{ y = {node}(x, w) size = Shape(y) }}"""
    proto = shape_inference.infer_shapes(build_proto(text))
    model = ir.from_proto(proto)
    name_nodes(model)
    (layer,) = make_plan(model, QuantConfig(), quantise_activations=False).layers
    assert layer.macs == macs
    if macs is not None and layer.op_type != "ConvTranspose":
        size = run(model, random_feeds(model))[0]  # a dynamic dimension is 2
        depth = weight_matrix(layer, np.zeros(layer.weight_shape)).shape[-1]
        assert 2 * macs == size.prod() * depth


@pytest.mark.parametrize(
    ("node", "opset", "bounds"),
    [
        ("Relu(x)", 17, (0, np.inf)),
        ("Clip(x)", 17, (-np.inf, np.inf)),
        ("Clip(x, lo, hi)", 17, (0, 6)),
        ("Clip(x, lo)", 17, (0, np.inf)),
        ("Clip(x, , hi)", 17, (-np.inf, 6)),
        ("Clip(x, lo, x)", 17, (0, np.nan)),
        ("Clip<min=-1.0, max=1.0>(x)", 6, (-1, 1)),
        ("Clip<max=1.0>(x)", 6, (-np.inf, 1)),
    ],
)
def test_bounds_of_a_clip(node: str, opset: int, bounds: tuple[float, float]) -> None:
    text = f"g (float x) => (float y) <float lo = {{0}}, float hi = {{6}}> {{ y = {node} }}"
    np.testing.assert_equal(clip_bounds(build(text, opset).graph[0]), bounds)
