"""Weights of nodes that compute in float, stored as integers: recurrent nodes, and in subgraphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import build, run

from onnx_attnround import quantize
from onnx_attnround.config import QuantConfig
from onnx_attnround.graph import name_nodes
from onnx_attnround.plan import make_plan
from onnx_attnround.plan.stored import find_stored
from onnx_attnround.qdq.stored import store_weights
from onnx_attnround.records import Array
from onnx_attnround.simplify import simplify
from onnx_attnround.simplify.constants import constant
from onnx_attnround.targets import get_target

WIDTH = 96


def branches(*, tied: bool = False) -> ir.Model:
    """An If whose branches have weights, one of a name that both have, and one of the main graph.

    ``tied`` has the main graph read that too.
    """
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    def body(nodes: list[onnx.NodeProto], *weights: onnx.TensorProto) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", 192])
        return helper.make_graph(nodes, f"of_{made.name}", [], [made], weights)

    then = body([helper.make_node("MatMul", ["x", "w"], ["a"])], weight("w", 96, 192))
    other = body(
        [
            helper.make_node("Gemm", ["x", "w"], ["t"], transB=1),
            helper.make_node("MatMul", ["x", "shared"], ["s"]),
            helper.make_node("Add", ["s", "t"], ["b"]),
        ],
        weight("w", 192, 96),
    )
    nodes = [helper.make_node("If", ["which"], ["y"], then_branch=then, else_branch=other)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 192])]
    if tied:
        nodes.append(helper.make_node("MatMul", ["x", "shared"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 192]))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 96]),
        helper.make_tensor_value_info("which", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(nodes, "net", inputs, outputs, [weight("shared", 96, 192)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = ir.from_proto(made)
    name_nodes(model)
    return model


def recurrent(op: str, directions: int) -> ir.Model:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    way = "bidirectional" if directions == 2 else "forward"
    width = WIDTH * 4 // gates  # so that all are large enough to be worth it
    rows = gates * width
    model = build(
        f"net (float[7, n, {WIDTH}] x) => (float[7, {directions}, n, {width}] y) "
        f"<float[{directions}, {rows}, {WIDTH}] w, float[{directions}, {rows}, {width}] r> "
        f'{{ y = {op}<hidden_size={width}, direction="{way}">(x, w, r) }}'
    )
    for name in ("w", "r"):  # small enough not to be chaotic
        value = model.graph.initializers[name]
        values = constant(value)
        assert values is not None
        value.const_value = ir.tensor((values / 20).astype(np.float32), name=name)
    return model


def stored(model: ir.Model, **settings: object) -> ir.Model:
    """A copy with weights stored, checked, in which each node still has all its inputs."""
    result = model.clone()
    store_weights(result, find_stored(result, QuantConfig(**settings), get_target("ort")))
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return result


def decibels(expected: Array, got: Array) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(got - expected).sum()))


def size(model: ir.Model) -> int:
    return len(ir.to_proto(model).SerializeToString())


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_recurrent_node_has_its_weights_in_a_quarter(op: str, directions: int) -> None:
    model = recurrent(op, directions)
    small = stored(model)
    feeds = {"x": np.random.default_rng(1).normal(size=(7, 3, WIDTH)).astype(np.float32)}
    (expected,), (got,) = run(model, feeds), run(small, feeds)
    assert decibels(expected, got) > 30
    assert size(small) < 0.3 * size(model)


def test_each_direction_and_row_has_its_own_scale() -> None:
    model = recurrent("LSTM", 2)
    weight = model.graph.initializers["w"]
    loud = np.geomspace(1e-3, 1e3, 2 * 4 * WIDTH, dtype=np.float32).reshape(2, -1, 1)
    values = np.random.default_rng(0).uniform(-1, 1, (2, 4 * WIDTH, WIDTH)) * loud
    weight.const_value = ir.tensor(values.astype(np.float32), name="w")
    small = stored(model)
    codes, scale = (small.graph.initializers[f"w/{end}"].const_value for end in ("codes", "scale"))
    assert codes is not None and scale is not None
    error = np.abs(codes.numpy() * scale.numpy() - values)
    assert (error <= 0.51 * np.abs(values).max(-1, keepdims=True) / 127).all()


def test_layers_in_branches_are_stored_and_those_of_the_same_name_apart() -> None:
    model = branches()
    small = stored(model)
    assert size(small) < 0.4 * size(model)
    x = np.random.default_rng(1).normal(size=(5, 96)).astype(np.float32)
    for which in (True, False):
        feeds = {"x": x, "which": np.array(which)}
        (expected,), (got,) = run(model, feeds), run(small, feeds)
        assert decibels(expected, got) > 30


def test_what_a_layer_of_the_main_graph_reads_too_stays() -> None:
    settings = QuantConfig(), get_target("ort")
    assert len(find_stored(branches(), *settings)) == 3
    assert len(find_stored(branches(tied=True), *settings)) == 2
    assert "shared" in stored(branches(tied=True)).graph.initializers


def test_small_ones_and_those_of_excluded_nodes_stay() -> None:
    model = simplify(recurrent("LSTM", 1))[0]
    name = model.graph[0].name
    for settings in ({"exclude": [name]}, {"stored_bits": 32}):
        assert find_stored(model, QuantConfig(**settings), get_target("ort")) == {}
    assert find_stored(model, QuantConfig(), get_target("qnn")) == {}
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((1, 4, 4), np.float32))
    assert find_stored(model, QuantConfig(), get_target("ort")) == {name: ("r",)}


@pytest.mark.parametrize("model", [recurrent("GRU", 2), branches()], ids=["gru", "if"])
def test_the_runtime_unpacks_once_when_it_loads(model: ir.Model, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    data = ir.to_proto(stored(model)).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    kept = ir.load(tmp_path / "optimised.onnx")
    assert {"Mul", "Cast"}.isdisjoint(node.op_type for node in kept.graph.all_nodes())


@pytest.mark.parametrize("model", [recurrent("LSTM", 2), branches()], ids=["lstm", "if"])
def test_a_model_with_nothing_else_converts(model: ir.Model) -> None:
    result = quantize(model)
    assert size(result.model) < 0.4 * size(model)
    assert result.plan.skipped == {}
    assert any("stored" in note for note in result.notes)


def test_the_plan_tells_of_it() -> None:
    model = simplify(recurrent("LSTM", 1))[0]
    plan = make_plan(model, QuantConfig(), quantise_activations=False)
    assert plan.stored == {model.graph[0].name: ("w", "r")}
