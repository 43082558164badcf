"""Tables that are looked up, as integers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_attnround.config import QuantConfig
from onnx_attnround.plan.tables import find_tables
from onnx_attnround.qdq.tables import quantize_tables, round_rows
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import open_session
from onnx_attnround.targets import get_target

ROWS, WIDTH = 700, 64
IDS = np.arange(24, dtype=np.int64).reshape(2, 12) * 29


def lookup(*, axis: int = 0, tied: bool = False, rows: int = ROWS) -> ir.Model:
    """Two lookups of one table, added; ``tied`` multiplies by it too."""
    table = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)
    table *= np.geomspace(0.1, 10, rows, dtype=np.float32)[:, None]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], name="first", axis=axis),
        helper.make_node("Gather", ["table", "others"], ["b"], name="second", axis=axis),
        helper.make_node("Add", ["a", "b"], ["sum"], name="add"),
        helper.make_node("MatMul", ["sum", "weight"], ["y"], name="layer"),
    ]
    constants = [numpy_helper.from_array(table, "table")]
    constants.append(numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "weight"))
    if tied:
        nodes.append(helper.make_node("Transpose", ["table"], ["turned"], name="turn"))
        nodes.append(helper.make_node("MatMul", ["sum", "turned"], ["scores"], name="head"))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 12, WIDTH])]
    outputs.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [2, 12, WIDTH]))
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, [2, 12]) for n in ("ids", "others")
    ]
    graph = helper.make_graph(nodes, "lookup", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def quantized(model: ir.Model, bits: int) -> ir.Model:
    """A copy with its tables at that many bits."""
    config = QuantConfig(embedding_bits=bits)
    result = model.clone()
    quantize_tables(result, find_tables(result, config, get_target("ort"))[0])
    onnx.checker.check_model(ir.to_proto(result))
    return result


def outputs(model: ir.Model) -> list[Array]:
    """What a model makes of the identifiers."""
    found: list[Array] = open_session(model).run(None, {"ids": IDS, "others": 699 - IDS})
    return found


@pytest.mark.parametrize(("bits", "least", "share"), [(8, 40, 0.27), (4, 17, 0.17)])
def test_a_table_is_integers_with_scales(bits: int, least: float, share: float) -> None:
    model = lookup()
    small = quantized(model, bits)
    for expected, got in zip(outputs(model), outputs(small), strict=True):
        noise = np.square(got - expected).sum()
        assert 10 * np.log10(np.square(expected).sum() / noise) > least
    kept = sum(v.const_value.nbytes for v in small.graph.initializers.values())
    whole = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert kept - WIDTH * WIDTH * 4 < share * (whole - WIDTH * WIDTH * 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_small_rows_keep_their_own_precision(bits: int) -> None:
    table = np.array([[100.0, -50.0], [0.0, 0.0], [1e-3, 5e-4]], np.float32)
    codes, scales = round_rows(table, bits)
    assert np.abs(codes * scales - table).max(1) == pytest.approx(0, abs=100 / 2 ** (bits - 1))
    np.testing.assert_allclose((codes * scales)[2], table[2], atol=1e-3 / 2 ** (bits - 1))
    assert np.isfinite(scales).all()


def test_lookups_of_one_table_share_it() -> None:
    small = quantized(lookup(), 8)
    gathers = [node for node in small.graph if node.op_type == "Gather"]
    assert len({node.inputs[0] for node in gathers}) == 2  # codes and scales
    assert not any(
        v.dtype == ir.DataType.FLOAT and v.shape == (ROWS, WIDTH)
        for v in small.graph.initializers.values()
    )


@pytest.mark.parametrize(
    ("model", "bits", "target", "reason"),
    [
        (lookup(), 32, "ort", "it stays float"),
        (lookup(), 8, "tensorrt", "it stays float"),
        (lookup(tied=True), 8, "ort", "read by other nodes too"),
        (lookup(axis=1), 8, "ort", "read by other nodes too"),
        (lookup(rows=8), 8, "ort", "its table is small"),
    ],
)
def test_a_table_stays_float_for_a_reason(
    model: ir.Model, bits: int, target: str, reason: str
) -> None:
    bits_of, kept = find_tables(model, QuantConfig(embedding_bits=bits), get_target(target))
    assert not bits_of
    assert all(reason in why for why in kept.values())
    assert kept.keys() == {"first", "second"}


def test_a_table_that_an_excluded_node_reads_stays() -> None:
    config = QuantConfig(exclude=("first",))
    bits, kept = find_tables(lookup(), config, get_target("ort"))
    assert not bits
    assert kept["first"] == "matched by exclude"
    assert "read by an excluded node too" in kept["second"]
