"""Every form that a valid model comes in: versions, types, and where its weights are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checked_conversion import convert, ends, layers, random_samples
from onnx import TensorProto
from small_models import build, build_proto

from onnx_attnround import QuantConfig, graph, quantize
from onnx_attnround.errors import ModelError
from onnx_attnround.simplify import simplify

pytestmark = pytest.mark.slow

NET = """net (float[N, 2, 6, 6] x) => (float[N, 3] y)
<float[4, 2, 3, 3] w1, float[4] b1, float[4, 3] w2> {
    c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = MatMul(f, w2)
}"""
TWO = """net (float[N,4] x) => (float[N,3] y) <float[4,4] v, float[4,3] w> {
    h = MatMul(x, v)  r = Relu(h)  y = MatMul(r, w) }"""

OPSETS = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26]


@pytest.mark.parametrize("opset", OPSETS)
def test_opsets(opset: int, tmp_path: Path) -> None:
    result = convert(build_proto(NET, opset), tmp_path, steps=5)
    assert layers(result) == ["Conv", "MatMul"]
    assert result.model.opset_imports[""] == max(opset, 13)


@pytest.mark.parametrize("version", range(3, 14))
def test_ir_versions(version: int, tmp_path: Path) -> None:
    proto = build_proto(NET, 11, max(version, 4))
    proto.ir_version = version
    if version < 4:  # constants had to be inputs
        for tensor in proto.graph.initializer:
            info = onnx.helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims)
            proto.graph.input.append(info)
    assert layers(convert(proto, tmp_path, steps=5)) == ["Conv", "MatMul"]


def test_dynamic_dimensions_stay_and_work(tmp_path: Path) -> None:
    net = """net (float[N,2,H,W] x) => (float[N,4,H,W] y) <float[4,2,3,3] w, float[4,4,3,3] v> {
        c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  y = Conv<pads=[1,1,1,1]>(r, v) }"""
    sizes = [(1, 5, 7), (3, 8, 6), (2, 5, 7)]
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(n, 2, h, w)).astype(np.float32)} for n, h, w in sizes]
    result = convert(build_proto(net), tmp_path, samples)
    shapes = [shape for _, _, shape in ends(result.model)]
    assert shapes == ["[N,2,H,W]", "[N,4,H,W]"]


# --- where weights and inputs are -------------------------------------------------------


def as_input(proto: onnx.ModelProto) -> None:
    """Every constant is an input with a default value, too."""
    for tensor in proto.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(info)


@dataclass(frozen=True)
class Form:
    """A model, how many layers are quantised, and why others are not."""

    text: str
    layers: int = 1
    skipped: dict[str, str] = field(default_factory=dict)
    change: Callable[[onnx.ModelProto], None] = lambda proto: None


INSIDE = "inside a subgraph"
FORMS = {
    "weight of a Constant": Form(
        "net (float[N,2] x) => (float[N,2] y) {"
        "w = Constant<value = float[2,2] {1, 2, -3, 4}>()  y = MatMul(x, w) }"
    ),
    "weight of an input": Form(TWO, 2, change=as_input),
    "weight behind Identity": Form(
        "net (float[N,4] x) => (float[N,3] y) <float[4,3] w> { v = Identity(w) y = MatMul(x, v) }"
    ),
    "weight behind Transpose": Form(
        "net (float[N,4] x) => (float[N,3] y) <float[3,4] w> { v = Transpose(w) y = MatMul(x, v) }"
    ),
    "weight behind Reshape": Form(
        "net (float[N,4] x) => (float[N,3] y) <float[12] w, int64[2] s = {4, 3}> {"
        "v = Reshape(w, s)  y = MatMul(x, v) }"
    ),
    "weight behind Cast": Form(
        "net (float[N,2] x) => (float[N,2] y) <int8[2,2] w = {1, 2, -3, 4}> {"
        "v = Cast<to = 1>(w)  y = MatMul(x, v) }"
    ),
    "weight of two layers": Form(
        "net (float[N,4] x) => (float[N,4] y) <float[4,4] w> {"
        "a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }",
        2,
    ),
    "bias of two layers": Form(
        "net (float[N,4] x) => (float[N,4] y) <float[4,4] w, float[4,4] v, float[4] b> {"
        "a = Gemm(x, w, b)  c = Relu(a)  y = Gemm(c, v, b) }",
        2,
    ),
    "weight that is looked up, too": Form(
        "net (int64[N,2] i) => (float[N,2,6] y) <float[6,4] w> {"
        "e = Gather(w, i)  t = Transpose(w)  r = Relu(e)  y = MatMul(r, t) }",
        1,
        {"Gather_0": "its table is small: it stays float"},
    ),
    "weight that is an output, too": Form(
        "net (float[N,4] x) => (float[N,3] y, float[4,3] v) <float[4,3] w> {"
        "v = Identity(w)  y = MatMul(x, w) }"
    ),
    "several ends": Form(
        "net (float[N,4] a, float[N,4] b) => (float[N,3] y, float[N,4] z) <float[4,3] w> {"
        "z = Add(a, b)  y = MatMul(z, w) }"
    ),
    "scalar input": Form(
        "net (float[N,4] x, float k) => (float[N,3] y) <float[4,3] w> {"
        "z = Mul(x, k)  y = MatMul(z, w) }"
    ),
    "input of integers": Form(
        "net (int32[N,4] x) => (float[N,3] y) <float[4,3] w> {"
        "z = Cast<to = 1>(x)  y = MatMul(z, w) }"
    ),
    "branches": Form(
        "net (float[N,4] x, bool f) => (float[N,3] y)"
        "<float[4,4] v, float[4,3] w, float[4,3] u> { h = MatMul(x, v)  r = Relu(h)  y = If(f)<"
        "then_branch = t () => (float[N,3] p) { p = MatMul(r, w) },"
        "else_branch = e () => (float[N,3] q) { q = MatMul(r, u) }> }",
        1,
        {"MatMul_1": INSIDE, "MatMul_2": INSIDE},
    ),
    "loop": Form(
        "net (float[N,4] x) => (float[N,3] y)"
        "<float[4,4] v, float[4,3] w, int64 n = {3}, bool t = {1}> { h = Loop(n, t, x)<"
        "body = b (int64 i, bool g, float[N,4] o) => (bool m, float[N,4] k) {"
        "m = Identity(g)  j = MatMul(o, v)  k = Tanh(j) }>  y = MatMul(h, w) }",
        1,
        {"MatMul_0": INSIDE},
    ),
    "scan": Form(
        "net (float[5,N,4] x, float[N,4] s) => (float[N,3] y) <float[4,4] v, float[4,3] w> {"
        "h, z = Scan<num_scan_inputs = 1, body = b (float[N,4] o, float[N,4] i)"
        "=> (float[N,4] k, float[N,4] l) { j = MatMul(o, v)  a = Add(j, i)  k = Tanh(a)"
        "l = Relu(k) }>(s, x)  y = MatMul(h, w) }",
        1,
        {"MatMul_0": INSIDE},
    ),
    "recurrent": Form(
        "net (float[5,2,4] x) => (float[5,2,3] y)"
        "<float[1,12,4] w, float[1,12,3] r, float[3,3] v, int64[1] o = {1}> {"
        "h, a, b = LSTM<hidden_size = 3>(x, w, r)  q = Squeeze(h, o)  y = MatMul(q, v) }",
        1,
        {"LSTM_0": "LSTM is not handled: its weights stay float"},
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms(form: Form, tmp_path: Path) -> None:
    proto = build_proto(form.text)
    form.change(proto)
    result = convert(proto, tmp_path)
    assert len(layers(result)) == form.layers
    assert dict(result.plan.skipped) == form.skipped


def test_local_functions(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        net (float[N,2] x) => (float[N,2] y)
        <float[2,2] v = {1, -2, 3, 4}, float[2,2] w = {0.5, 6, -7, 8}>
        { h = own.layer(x, v)  y = own.layer(h, w) }
        <domain: "own", opset_import: ["" : 17]> layer (a, b) => (c) {
            d = MatMul(a, b)  c = Relu(d) }
    """)
    result = convert(proto, tmp_path)
    assert layers(result) == ["MatMul", "MatMul"]
    assert not result.model.functions


# --- shapes that are wrong or missing ---------------------------------------------------


@pytest.mark.parametrize("name", ["h", "r"])
@pytest.mark.parametrize("shape", [["N", 7], [1, 4], [1, 9], ["N", 4, 1]], ids=str)
def test_stale_shapes_of_computed_values(name: str, shape: list[object], tmp_path: Path) -> None:
    proto = build_proto(TWO)
    proto.graph.value_info.append(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    )
    assert layers(convert(proto, tmp_path)) == ["MatMul", "MatMul"]


def test_an_output_without_a_shape(tmp_path: Path) -> None:
    proto = build_proto(TWO)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "in.onnx")
    model = graph.load(tmp_path / "in.onnx")
    assert model.graph.outputs[0].shape is None
    simplified, lines = simplify(model)
    assert not [line for line in lines if "failed" in line]
    assert str(simplified.graph.outputs[0].shape) == "[N,3]"
    feeds = random_samples(graph.input_specs(model))
    assert quantize(model, feeds, QuantConfig(threads=1)).plan.layers


def test_an_input_without_a_shape_is_refused(tmp_path: Path) -> None:
    proto = build_proto(TWO)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="input 'x' .* known number of dimensions"):
        convert(proto, tmp_path)


def test_ends_without_elements_beside_a_layer(tmp_path: Path) -> None:
    proto = build_proto(
        """net (float[0,3,4] none, float[N,4] x) => (float[M,3,4] moved, float[N,3] y)
        <float[4,3] w> { moved = Relu(none)  h = Relu(x)  y = MatMul(h, w) }"""
    )
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    feeds = [{"none": np.zeros((0, 3, 4), np.float32), "x": x * k} for k in (1, 2, 3)]
    assert layers(convert(proto, tmp_path, feeds)) == ["MatMul"]


# --- 16-bit floats ----------------------------------------------------------------------

HALF = {
    "float16": (np.dtype(np.float16), TensorProto.FLOAT16),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), TensorProto.BFLOAT16),
}


def halved(text: str, kind: str, *, only: tuple[str, ...] = ()) -> onnx.ModelProto:
    """The model in half precision: its constants and ends, or ``only`` those constants."""
    dtype, code = HALF[kind]
    proto = build_proto(text.replace("HALF", str(code)))
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name in (only or (tensor.name,)):
            values = onnx.numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for end in () if only else (*proto.graph.input, *proto.graph.output):
        end.type.tensor_type.elem_type = code
    onnx.checker.check_model(proto)
    return proto


def half_values(model: ir.Model) -> set[str | None]:
    """Inner values of 16-bit floats."""
    values = ir.convenience.create_value_mapping(model.graph).values()
    given = {*model.graph.inputs, *model.graph.outputs}
    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    return {value.name for value in values if value.dtype in half and value not in given}


def test_float16_throughout(tmp_path: Path) -> None:
    result = convert(halved(NET, "float16"), tmp_path)
    assert layers(result) == ["Conv", "MatMul"]
    assert half_values(result.model) == set()
    assert len(result.checked.fusion.integer) == 2


@pytest.mark.parametrize("target", ["ort", "openvino", "qnn"])
def test_ends_of_half_precision_that_no_node_makes(target: str, tmp_path: Path) -> None:
    """An input that is handed on as an output, and a constant."""
    proto = halved(
        """net (float[N,4] x) => (float[N,3] y, float[N,4] x, float[3] anchors)
           <float[4,4] v, float[4,3] w, float[3] anchors = {1, 2, 3}> {
           h = MatMul(x, v)  r = Relu(h)  y = MatMul(r, w) }""",
        "float16",
    )
    result = convert(proto, tmp_path, target=target)
    assert layers(result) == ["MatMul", "MatMul"]
    assert half_values(result.model) == set()


MIXED = """net (float[N,4] x) => (float[N,3] y) <float[4,4] v, float[4,3] w> {
    h = MatMul(x, v)  r = Relu(h)  c = Cast<to = HALF>(r)  z = MatMul(c, w)
    y = Cast<to = 1>(z) }"""
CAST = """net (float[N,4] x) => (float[N,3] y) <float[4,3] w> {
    v = Cast<to = 1>(w)  y = MatMul(x, v) }"""


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize(("text", "count"), [(MIXED, 2), (CAST, 1)], ids=["mixed", "cast"])
def test_half_precision_inside(text: str, count: int, kind: str, tmp_path: Path) -> None:
    result = convert(halved(text, kind, only=("w",)), tmp_path)
    assert len(layers(result)) == count
    assert half_values(result.model) == set()
    compared = [note for note in result.notes if "compared with the simplified model" in note]
    assert len(compared) == (kind == "bfloat16" and text == MIXED)


def test_half_precision_in_branches_and_attributes(tmp_path: Path) -> None:
    text = """net (float[N,4] x, bool f) => (float[N,3] y)
        <float[4,4] v, float[4,3] w, int64[1] four = {4}> {
        h = MatMul(x, v)  c = Cast<to = 10>(h)  ones = ConstantOfShape(four)
        k = If(f)<then_branch = t () => (float16[N,4] p) { p = Add(c, ones) },
                  else_branch = e () => (float16[N,4] q) { q = Mul(c, ones) }>
        z = MatMul(k, w)  y = Cast<to = 1>(z) }"""
    proto = halved(text, "float16", only=("w",))
    half = onnx.numpy_helper.from_array(np.array([0.5], np.float16))
    filled = next(node for node in proto.graph.node if node.op_type == "ConstantOfShape")
    filled.attribute.append(onnx.helper.make_attribute("value", half))
    result = convert(proto, tmp_path)
    assert layers(result) == ["MatMul", "MatMul"]
    assert half_values(result.model) == set()


def test_operators_of_other_domains_keep_half_precision() -> None:
    text = """net (float[N,4] x) => (float[N,4] y) <float[4,4] v> {
        h = MatMul(x, v)  c = Cast<to = 10>(h)  d = own.Op(c)  y = Cast<to = 1>(d) }"""
    _, lines = simplify(build(text))
    assert not [line for line in lines if "widen" in line]


def test_a_bfloat16_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="input 'x' is BFLOAT16"):
        convert(halved(NET, "bfloat16"), tmp_path)


# --- models quantised in part -----------------------------------------------------------

THREE = """net (float[N,2,6,6] x) => (float[N,3] y)
<float[4,2,3,3] w1, float[4] b1, float[4,4,3,3] w3, float[4,3] w2> {
    c = Conv<pads = [1,1,1,1]>(x, w1, b1)  r = Relu(c)  d = Conv(r, w3)
    p = GlobalAveragePool(d)  f = Flatten(p)  y = MatMul(f, w2) }"""


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_quantised_already_is_left_alone(bits: int, tmp_path: Path) -> None:
    first = convert(build_proto(THREE), tmp_path, exclude=("Conv_1",))
    proto = ir.to_proto(first.model)
    second = convert(proto, tmp_path, weight_bits=bits, first_last_bits=bits, sqnr=12)
    assert [layer.node for layer in second.plan.layers] == ["Conv_1"]
    assert second.plan.skipped == dict.fromkeys(("Conv_0", "MatMul_0"), "already quantised")
    assert set(second.checked.fusion.integer) == {"Conv_0", "Conv_1", "MatMul_0"}
    with pytest.raises(ModelError, match="nothing to quantise.*already quantised"):
        convert(ir.to_proto(second.model), tmp_path)


def test_integer_operators_are_left_alone(tmp_path: Path) -> None:
    text = """net (float[N,4] x) => (float[N,3] y)
        <int8[4,4] v = {1,2,3,4,5,6,7,8,9,-1,-2,-3,-4,5,6,7}, float[4,3] w, float s = {0.01}> {
        q, xs, xz = DynamicQuantizeLinear(x)  i = MatMulInteger(q, v, xz)  f = Cast<to = 1>(i)
        k = Mul(xs, s)  h = Mul(f, k)  y = MatMul(h, w) }"""
    result = convert(build_proto(text), tmp_path)
    assert layers(result) == ["MatMul"]
    assert result.plan.skipped == {"MatMulInteger_0": "already quantised"}


# --- custom operators -------------------------------------------------------------------

CUSTOM = """<ir_version: 8, opset_import: ["" : 13, "ai.onnx.contrib" : 1]>
    net (float[N,2] x) => (float[N,2] y) <float[2,2] v = {1,-2,3,4}, float[2,2] w = {5,6,-7,8}> {
    h = MatMul(x, v)  a, b = ai.onnx.contrib.NegPos(h)  c = Sub(a, b)  y = MatMul(c, w) }"""


def test_operators_of_a_library(tmp_path: Path) -> None:
    library = pytest.importorskip("onnxruntime_extensions").get_library_path()
    proto = onnx.parser.parse_model(CUSTOM)
    for bits in (8, 4):
        result = convert(
            proto, tmp_path, sqnr=10, weight_bits=bits, first_last_bits=bits,
            custom_op_library=(library,),
        )  # fmt: skip
        assert layers(result) == ["MatMul", "MatMul"]
        assert library not in str(result.model.metadata_props)


def test_operators_without_their_library(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="NegPos.* `custom_op_library`"):
        convert(onnx.parser.parse_model(CUSTOM), tmp_path)
