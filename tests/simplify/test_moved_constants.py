"""Constants that subgraphs only move about end up where they are read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from simplified import check

from onnx_attnround.graph import name_nodes
from onnx_attnround.simplify.moved_constants import fold_moved_constants

Moves = list[tuple[str, list[str], str, dict[str, int]]]

MOVES: dict[str, Moves] = {
    "split and joined": [
        ("Slice", ["w", "zero", "three"], "a", {}),
        ("Slice", ["w", "three", "six"], "b", {}),
        ("Concat", ["b", "a"], "v", {"axis": 0}),
    ],
    "turned": [("Transpose", ["w"], "t", {}), ("Reshape", ["t", "shape"], "v", {})],
    "wider and back": [
        ("Unsqueeze", ["w", "zero"], "a", {}),
        ("Concat", ["a", "a"], "b", {"axis": 0}),
        ("Slice", ["b", "zero", "one"], "c", {}),
        ("Squeeze", ["c", "zero"], "v", {}),
    ],
}


def inside(moves: Moves, result: str = "y") -> ir.Model:
    """An If, one branch of which multiplies by a constant that is moved first."""
    nodes = [helper.make_node(op, given, [made], **more) for op, given, made, more in moves]
    nodes.append(helper.make_node("MatMul", ["x", "v"], ["y"]))
    numbers = [("zero", [0]), ("one", [1]), ("three", [3]), ("six", [6]), ("shape", [6, 6])]
    read = {name for _, given, _, _ in moves for name in given}
    constants = [
        numpy_helper.from_array(np.array(v, np.int64), n) for n, v in numbers if n in read
    ]
    weight = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    constants.append(numpy_helper.from_array(weight, "w"))
    made = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
    then = helper.make_graph(nodes, "then", [], [made], constants)
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["z"])],
        "other",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["which"], ["out"], then_branch=then, else_branch=other)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6]),
        helper.make_tensor_value_info("which", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 6])]
    graph = helper.make_graph([node], "net", inputs, outputs)
    made_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(made_model)
    model = ir.from_proto(made_model)
    name_nodes(model)
    return model


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_a_moved_weight_becomes_a_constant(moves: Moves) -> None:
    result, lines = check(inside(moves))
    assert [n.op_type for n in result.graph.all_nodes() if n.graph is not result.graph] in (
        ["MatMul", "Neg"], ["Neg", "MatMul"],
    )  # fmt: skip
    assert f"fold-moved-constants: {len(moves)} nodes" in lines
    held = [value.name for graph in result.graphs() for value in graph.initializers.values()]
    assert len(held) == 1  # what was moved is gone


def test_the_output_of_a_branch_stays_its_node() -> None:
    model = inside(MOVES["turned"], result="v")
    assert fold_moved_constants(model) == 1
    inner = [n.op_type for n in model.graph.all_nodes() if n.graph is not model.graph]
    assert "Reshape" in inner
    assert "Transpose" not in inner
