"""Stages part the graph: each node that a layer needs is in exactly one of them."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import onnx_ir as ir
import pytest
from layered_models import LAYERED, layered
from small_models import build

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ModelError
from onnx_attnround.plan import make_plan
from onnx_attnround.reconstruct.cuts import Piece, cut, cut_blocks, extract, raw_names
from onnx_attnround.runtime.session import open_session


@pytest.fixture(params=LAYERED)
def model(request: pytest.FixtureRequest) -> ir.Model:
    return layered(request.param)


def layers_of(model: ir.Model) -> list[str]:
    plan = make_plan(model, QuantConfig(), quantise_activations=False)
    return [layer.node for layer in plan.layers]


def variable(model: ir.Model) -> set[str]:
    """The names of the nodes that depend on an input."""
    known = {value.name for value in model.graph.inputs}
    found = set()
    for node in model.graph:
        inner = [n for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH
                 for n in a.as_graph().all_nodes()]  # fmt: skip
        if any(v is not None and v.name in known for n in (node, *inner) for v in n.inputs):
            found.add(node.name)
            known.update(v.name for v in node.outputs)
    return found


def upstream(model: ir.Model, layers: list[str]) -> set[str]:
    """The names of the nodes that lead to the input of a layer."""
    nodes = {node.name: node for node in model.graph}
    inputs = [nodes[name].inputs[0].name for name in layers]
    graph_inputs = [v.name for v in model.graph.inputs]
    computed = [name for name in inputs if name not in graph_inputs]
    if not computed:
        return set()
    return {node.name for node in ir.convenience.extract(model.graph, graph_inputs, computed)}


def test_every_node_that_a_layer_needs_is_in_one_piece(model: ir.Model) -> None:
    layers = layers_of(model)
    pieces = cut(model, layers)
    runs = Counter(
        node.name for piece in pieces if piece.outputs for node in extract(model, piece).graph
    )
    varying = variable(model)
    assert {name: n for name, n in runs.items() if name in varying and n > 1} == {}
    assert set(runs) & varying == upstream(model, layers) & varying


def test_pieces_fit_together(model: ir.Model) -> None:
    """What a piece reads is there, what is released was there, and nothing is read after that."""
    pieces = cut(model, layers_of(model))
    live = {value.name for value in model.graph.inputs}
    gone: set[str] = set()
    for piece in pieces:
        assert set(piece.inputs) <= live - gone
        assert set(piece.released) <= set(piece.inputs)
        live |= set(piece.outputs)
        gone |= set(piece.released)
        assert set(piece.reads) <= live - gone


def test_extracted_pieces_are_valid_models(model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    for piece in cut(model, layers_of(model)):
        if piece.outputs:
            session = open_session(extract(model, piece), threads=1)
            assert tuple(value.name for value in session.get_inputs()) == piece.inputs
            assert tuple(value.name for value in session.get_outputs()) == piece.outputs
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_cuts_of_a_residual_unit() -> None:
    pieces = cut(layered("residual"), ["Conv_0", "Conv_1", "Conv_2", "Conv_3"])
    assert pieces == (
        Piece(inputs=(), outputs=(), released=(), reads=("x",)),
        Piece(inputs=("x",), outputs=("r0",), released=("x",), reads=("r0",)),
        Piece(inputs=("r0",), outputs=("r1",), released=(), reads=("r1",)),
        Piece(inputs=("r0", "r1"), outputs=("r2",), released=("r0", "r1"), reads=("r2",)),
    )


def test_a_tensor_that_only_the_tail_reads_crosses_no_cut() -> None:
    """``x`` and ``r0`` are read behind the last layer too: nobody runs that."""
    pieces = cut(layered("residual"), ["Conv_0", "Conv_1"])
    assert pieces[1] == Piece(inputs=("x",), outputs=("r0",), released=("x",), reads=("r0",))


def test_outputs_that_lead_to_no_layer_are_in_no_piece() -> None:
    model = layered("side branch")
    pieces = cut(model, layers_of(model))
    assert [piece.outputs for piece in pieces] == [(), ("r",), ("t",)]


QDQ = """g (float[N,4] x) => (float[N,3] y)
    <float[4,4] w0, float[4,3] w1, float s = {0.05}, uint8 z = {3}>
    { xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)  a = MatMul(xd, w0)
      aq = QuantizeLinear(a, s, z)  ad = DequantizeLinear(aq, s, z)  m = Mul(ad, ad)
      n = Add(m, xd)  b = MatMul(n, w1)  c = MatMul(ad, w1)  y = Add(b, c) }"""


def test_codes_cross_in_place_of_what_they_are_unpacked_to() -> None:
    model = build(QDQ)
    pieces = cut(model, ["MatMul_0", "MatMul_1", "MatMul_2"], codes=("xq", "aq"))
    assert pieces == (
        Piece(inputs=("x",), outputs=("xq",), released=("x",), reads=("xq",)),
        Piece(inputs=("xq",), outputs=("aq", "n"), released=("xq",), reads=("n",)),
        Piece(inputs=("n",), outputs=(), released=("n",), reads=("aq",)),
    )
    unpacked = [node.name for node in extract(model, pieces[1]).graph]
    assert unpacked.count("DequantizeLinear_0") == unpacked.count("DequantizeLinear_1") == 1


def test_a_quantised_tensor_of_the_model_itself_crosses_as_float() -> None:
    pieces = cut(build(QDQ), ["MatMul_0", "MatMul_1", "MatMul_2"], codes=("aq",))
    assert (pieces[0].outputs, pieces[0].reads) == (("xd",), ("xd",))
    assert (pieces[1].outputs, pieces[2].reads) == (("aq", "n"), ("aq",))


def test_an_input_of_unknown_type_is_taken_to_be_float() -> None:
    model = build(LAYERED["chain"])
    pieces = cut(model, layers_of(model))
    assert model.graph.node("Relu_0").outputs[0].type is None
    sub = extract(model, pieces[2])
    assert [value.type for value in sub.graph.inputs] == [ir.TensorType(ir.DataType.FLOAT)]


def test_a_layer_that_reads_no_input_is_named() -> None:
    model = build("""g (float[N,4] x) => (float[N,4] y) <float[4,4] w, int64[2] s = {1,4}>
        { r = ConstantOfShape(s)  a = MatMul(r, w)  y = Add(x, a) }""")
    with pytest.raises(ModelError, match="node 'MatMul_0': .* exclude"):
        cut(model, ["MatMul_0"])


def test_deep_models_are_cut_in_time_that_grows_with_their_size() -> None:
    depth = 3000
    body = "\n".join(f"a{i + 1} = Relu(a{i})" for i in range(depth))
    model = build(f"""g (float[N,4] x) => (float[N,4] y) <float[4,4] v, float[4,4] w>
        {{ a0 = MatMul(x, v)
        {body}
        y = MatMul(a{depth}, w) }}""")
    start = time.perf_counter()
    pieces = cut(model, ["MatMul_0", "MatMul_1"])
    assert pieces[1].outputs == (f"a{depth}",)
    assert time.perf_counter() - start < 2


def in_pairs(model: ir.Model) -> list[list[str]]:
    layers = layers_of(model)
    return [layers[i : i + 2] for i in range(0, len(layers), 2)]


def test_blocks_fit_together(model: ir.Model) -> None:
    blocks = in_pairs(model)
    pieces = cut_blocks(model, blocks)
    assert len(pieces) == len(blocks) + 1
    live = {value.name for value in model.graph.inputs}
    gone: set[str] = set()
    for piece, behind in pairwise((*pieces, None)):
        assert set(piece.inputs) <= live - gone
        live |= set(piece.outputs)
        gone |= set(piece.released)
        assert piece.reads == (() if behind is None else behind.inputs)
    assert {value.name for value in model.graph.outputs} <= live - gone


def test_each_layer_is_in_the_piece_of_its_block(model: ir.Model) -> None:
    blocks = in_pairs(model)
    for block, piece in zip(blocks, cut_blocks(model, blocks)[1:], strict=True):
        names = {node.name for node in extract(model, piece).graph}
        assert set(block) <= names
        assert names.isdisjoint({name for other in blocks if other is not block for name in other})


def test_tensors_cross_blocks_before_their_quantisation() -> None:
    text = QDQ.replace("xq =", '["x/quantize"] xq =').replace("aq =", '["ad/quantize"] aq =')
    model = build(text)
    pieces = cut_blocks(model, [["MatMul_0"], ["MatMul_1"], ["MatMul_2"]])
    assert [piece.inputs for piece in pieces] == [(), ("x",), ("n",), ("a", "b")]
    assert [piece.reads for piece in pieces] == [("x",), ("n",), ("a", "b"), ()]
    assert raw_names(model) == {"x": "x", "ad": "a"}
