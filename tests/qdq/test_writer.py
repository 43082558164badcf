"""What is written is valid, runs, means what was planned, and fuses in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_models import build, random_feeds, run
from versions import RUNTIME

from onnx_attnround import graph, qdq
from onnx_attnround.calibrate import calibrate
from onnx_attnround.config import QuantConfig
from onnx_attnround.ops import weight_matrix
from onnx_attnround.plan import make_plan
from onnx_attnround.plan.bits import allocate
from onnx_attnround.qdq.arithmetic import channel_view, dequantize, params_from_range, quantize
from onnx_attnround.reconstruct.layerwise import round_plain
from onnx_attnround.records import LayerRounding, QuantParams, QuantPlan, QuantSpec
from onnx_attnround.runtime.session import open_session
from onnx_attnround.samples import open_samples
from onnx_attnround.simplify import simplify
from onnx_attnround.targets import WeightStorage

CONV = "Conv<pads=[1,1,1,1]>"
CONSTANTS = (
    "float[4,4,3,3] w1, float[4,4,3,3] w2, float[4,4,1,1] w3, float[6,8,1,1] w8, "
    "float[4] b1, float[4] b2, float[4,5] m, float[5] mb"
)


def net(
    body: str, constants: str = CONSTANTS, x: str = "float[N,4,8,8] x", y: str = "float[N,c,h,w] y"
) -> ir.Model:
    return build(f"g ({x}) => ({y}) <{constants}> {{ {body} }}")


@dataclass(frozen=True)
class Case:
    """A float model, and all that ``insert`` is given."""

    model: ir.Model
    plan: QuantPlan
    params: dict[str, QuantParams]
    roundings: dict[str, LayerRounding]

    def insert(self, storage: WeightStorage = "int8") -> ir.Model:
        return qdq.insert(self.model, self.plan, self.params, self.roundings, storage)


def prepare(
    model: ir.Model,
    samples: Any = None,
    *,
    activations: bool = True,
    observer: str = "minmax",
    **options: Any,
) -> Case:
    """Plan, ranges and nearest rounding; random samples unless given."""
    config = QuantConfig(**options)
    plan = make_plan(model, config, quantise_activations=activations)
    given = random_feeds(model) if samples is None else samples
    ranges = calibrate(
        model,
        plan.activations,
        open_samples(given, graph.input_specs(model), limit=64),
        config.model_copy(update={"observer": observer, "threads": 1}),
        same_range=plan.same_range,
        on_event=lambda event: None,
    )
    matrices = {
        layer.node: weight_matrix(layer, graph.tensor_value(model, layer.weight))
        for layer in plan.layers
    }
    allocation = allocate(plan.layers, matrices.__getitem__, config)
    params = dict(ranges.params)
    return Case(model, plan, params, round_plain(model, plan, params, allocation))


def quantised(model: ir.Model, storage: WeightStorage = "int8", **options: Any) -> ir.Model:
    return prepare(model, **options).insert(storage)


def proto_of(model: ir.Model) -> onnx.ModelProto:
    return ir.to_proto(graph.in_memory(model))


def check(model: ir.Model) -> onnx.ModelProto:
    proto = proto_of(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def optimised(model: ir.Model, folder: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime really runs."""
    path = folder / "optimised.onnx"
    open_session(model, threads=1, optimised_model=path)
    return onnx.load(path)


LAYOUT = {"Transpose"}  # ONNX Runtime moves channels last around its integer kernels


def inner_ops(proto: onnx.ModelProto) -> Counter[str]:
    """Its ops, without the Q behind graph inputs and the DQ before graph outputs."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    inputs = {value.name for value in proto.graph.input}
    outputs = {value.name for value in proto.graph.output}
    counts: Counter[str] = Counter()
    for node in proto.graph.node:
        source = node.input[0] if node.input else ""
        while source in producers and producers[source].op_type in LAYOUT:
            source = producers[source].input[0]
        starts = node.op_type == "QuantizeLinear" and source in inputs
        ends = node.op_type == "DequantizeLinear" and node.output[0] in outputs
        if not starts and not ends and node.op_type not in LAYOUT:
            counts[node.op_type] += 1
    return counts


def runs_as(model: ir.Model, folder: Path, **options: Any) -> dict[str, int]:
    simplified, _ = simplify(model)
    return dict(inner_ops(optimised(quantised(simplified, **options), folder)))


def close(got: np.ndarray, wanted: np.ndarray, sqnr: float) -> None:
    noise = np.square(got.astype(np.float64) - wanted).sum()
    assert 10 * np.log10(np.square(wanted.astype(np.float64)).sum() / max(noise, 1e-30)) > sqnr


SMALL = (
    f"a = {CONV}(x, w1, b1) r = Relu(a) b = {CONV}(r, w2) s = Add(b, r) t = Relu(s) "
    "g = GlobalAveragePool(t) f = Flatten(g) y = Gemm(f, m, mb)"
)


def small() -> ir.Model:
    return net(SMALL, y="float[N,5] y")


# --- the file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "storage", "opset", "sqnr"),
    [
        ({"weight_bits": 8}, "int8", 17, 30),
        ({"weight_bits": 4}, "int8", 17, 15),
        ({"weight_bits": 8}, "packed", 17, 30),
        ({"weight_bits": 5}, "int4", 17, 20),
        ({"weight_bits": 4}, "packed", 21, 15),
        ({"weight_bits": 2}, "int4", 21, 2),
        ({"act_bits": 16}, "int8", 21, 35),
        ({"act_bits": 4}, "int8", 17, 15),
        ({"weight_bits": 4, "activations": False}, "int8", 17, 15),
        ({"weight_bits": 4, "activations": False}, "packed", 21, 15),
    ],
)
def test_opset_is_raised_as_far_as_the_content_needs(
    options: dict[str, Any], storage: WeightStorage, opset: int, sqnr: float
) -> None:
    model = net(f"a = {CONV}(x, w1, b1) r = Relu(a) b = {CONV}(r, w2) y = {CONV}(b, w1)")
    case = prepare(model, **options)
    proto = check(case.insert(storage))
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    assert proto.ir_version == {17: 8, 21: 10}[opset]
    feeds = random_feeds(model)
    close(run(case.insert(storage), feeds)[0], run(model, feeds)[0], sqnr)


@pytest.mark.parametrize("opset", [20, 21, 22, 23])
@pytest.mark.parametrize("storage", ["int8", "packed", "int4"])
def test_opset_is_never_lowered(opset: int, storage: WeightStorage) -> None:
    model = build(f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) <{CONSTANTS}> "
                  f"{{ y = {CONV}(x, w1) }}", opset, 10)  # fmt: skip
    proto = check(quantised(model, storage, weight_bits=4, first_last_bits=4))
    expected = opset if storage == "int8" else max(opset, 21)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == expected
    assert proto.ir_version == (9 if expected == 20 else 10)  # never newer than the opset demands


@pytest.mark.parametrize("opset", range(7, 18))
def test_models_of_any_opset_are_written_and_fuse(opset: int, tmp_path: Path) -> None:
    clip = "Clip<min=0.0, max=6.0>(b)" if opset < 11 else "Clip(b, lo, hi)"
    pad = "Pad<pads=[0,0,1,1,0,0,1,1]>(p)" if opset < 11 else "Pad(p, pads)"
    squeeze = "Squeeze<axes=[2,3]>(g)" if opset < 13 else "Squeeze(g, axes)"
    text = f"""g (float[N,4,8,8] x) => (float[N,5] y)
        <{CONSTANTS}, float lo = {{0}}, float hi = {{6}}, int64[2] axes = {{2, 3}},
         int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}> {{
        a = {CONV}(x, w1, b1) r = Relu(a) b = {CONV}(r, w2) t = {clip} s = Add(t, r)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s) q = {pad} c = Conv(q, w2)
        g = GlobalAveragePool(c) f = {squeeze} z = Gemm(f, m, mb) y = Softmax<axis=1>(z) }}"""
    model, _ = simplify(build(text, opset))
    out = prepare(model).insert()
    proto = check(out)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == max(opset, 13)
    feeds = random_feeds(model)
    np.testing.assert_allclose(run(out, feeds)[0], run(model, feeds)[0], atol=0.1)
    ops = inner_ops(optimised(out, tmp_path))
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["QGemm"]) == (3, 1, 1)
    assert not ops.keys() & {"Conv", "Gemm", "Relu", "Clip", "Add"}


def test_float_model_stays_as_it_is_and_the_result_is_always_the_same() -> None:
    case = prepare(small(), weight_bits=4)
    before = case.model.clone()
    first, second = (check(case.insert("packed")).SerializeToString() for _ in range(2))
    assert first == second
    assert proto_of(case.model) == proto_of(before)


def test_signature_and_metadata_survive() -> None:
    text = """g (float[N,4,H,W] image, float[N,4,H,W] other) => (float[N,4,H,W] raw, float[N,4] z)
              <float[4,4,3,3] w1, float[4,4] m> {
        a = Conv<pads=[1,1,1,1]>(image, w1) raw = Relu(a) s = Add(raw, other)
        g = GlobalAveragePool(s) f = Flatten(g) z = MatMul(f, m) }"""
    model = build(text)
    model.metadata_props["author"] = "somebody"
    feeds = {name: np.ones((2, 4, 8, 8), np.float32) for name in ("image", "other")}
    out = quantised(model, samples=feeds)
    old, new = proto_of(model).graph, check(out).graph
    assert old.input == new.input
    assert old.output == new.output
    assert out.metadata_props["author"] == "somebody"
    session = open_session(out)
    for batch, size in ((1, 5), (3, 9)):
        shape = (batch, 4, size, size)
        results = session.run(None, {name: np.ones(shape, np.float32) for name in feeds})
        assert [result.shape for result in results] == [shape, (batch, 4)]


@pytest.mark.parametrize("storage", ["int8", "packed", "int4"])
def test_all_but_biases_have_a_zero_point_of_the_shape_of_the_scale(storage: WeightStorage) -> None:
    proto = check(quantised(small(), storage, weight_bits=4))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = Counter(node.op_type for node in proto.graph.node)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (6, 12)
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            codes = tensors.get(node.input[0])
            scale, *points = (tensors[name] for name in node.input[1:])
            assert scale.data_type == onnx.TensorProto.FLOAT
            if codes is not None and codes.data_type == onnx.TensorProto.INT32:
                assert not points  # a bias has none: ONNX knows no other than 0, WebGPU takes none
                continue
            [point] = points
            assert scale.dims == point.dims
            if codes is not None and storage != "packed":
                assert codes.data_type == point.data_type


def test_packed_weights_take_half_a_byte_and_float_ones_are_gone() -> None:
    proto = check(quantised(small(), "packed", weight_bits=4))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    assert not tensors.keys() & {"w1", "w2", "b1", "b2", "m", "mb"}
    packed = tensors["Conv_1/weight_codes"]
    assert packed.data_type == onnx.TensorProto.INT4
    assert len(packed.raw_data) == 4 * 4 * 3 * 3 // 2
    assert tensors["Conv_0/weight_codes"].data_type == onnx.TensorProto.INT8  # the first layer
    read = {name for node in proto.graph.node for name in node.input}
    assert read >= tensors.keys()


# --- weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "weight", "axis", "x"),
    [
        ("Conv", (6, 4, 3), 0, "float[N,4,9] x"),
        ("Conv<group=2>", (6, 2, 3, 3), 0, "float[N,4,8,8] x"),
        ("Conv", (6, 4, 2, 2, 2), 0, "float[N,4,4,4,4] x"),
        ("ConvTranspose<strides=[2]>", (4, 6, 3), 1, "float[N,4,9] x"),
        ("ConvTranspose<strides=[2,2]>", (4, 6, 2, 2), 1, "float[N,4,8,8] x"),
        ("ConvTranspose<group=2>", (4, 3, 2, 2), 1, "float[N,4,8,8] x"),
        ("ConvTranspose", (4, 6, 2, 2, 2), 1, "float[N,4,4,4,4] x"),
        ("Gemm", (4, 6), 1, "float[N,4] x"),
        ("Gemm<transB=1>", (6, 4), 0, "float[N,4] x"),
        ("MatMul", (4, 6), 1, "float[N,3,4] x"),
    ],
)
@pytest.mark.parametrize("activations", [False, True])
def test_each_output_channel_has_its_own_scale(
    node: str, weight: tuple[int, ...], axis: int, x: str, activations: bool
) -> None:
    """Channels from 1e-3 to 1e3 times the usual all keep their precision."""
    dims = ",".join(map(str, weight))
    rank = x.count(",") + 1
    y = f"float[{','.join('nchwd'[:rank])}] y"
    model = net(f"y = {node}(x, w)", f"float[{dims}] w", x, y)
    values = graph.tensor_value(model, "w")
    factors = np.geomspace(1e-3, 1e3, weight[axis], dtype=np.float32)
    scaled = values * channel_view(factors, values.ndim, axis)
    model.graph.initializers["w"].const_value = ir.tensor(scaled, name="w")
    case = prepare(model, activations=activations and not node.startswith("Conv"))
    out = case.insert()
    check(out)
    (rounding,) = case.roundings.values()
    assert rounding.scale.shape == (weight[axis],)
    restored = dequantize(rounding.codes.astype(np.float32),
                          channel_view(rounding.scale, values.ndim, axis), 0)  # fmt: skip
    error = np.abs(restored - scaled) / channel_view(rounding.scale, values.ndim, axis)
    assert error.max() < 3  # steps; the largest weights may be clipped
    got, wanted = (run(each, random_feeds(model))[0] for each in (out, model))
    channel = 1 if "Conv" in node else -1
    groups = 2 if node == "ConvTranspose<group=2>" else 1
    for index in range(weight[axis] * groups):
        close(np.take(got, index, channel), np.take(wanted, index, channel), 28)


def test_grouped_conv_transpose_between_integer_layers(tmp_path: Path) -> None:
    """Its bias has more entries than its weight has scales, and stays float."""
    model = net(f"a = {CONV}(x, w1, b1) r = Relu(a) t = ConvTranspose<group=2>(r, wt, b2) "
                f"y = {CONV}(t, w2)", f"{CONSTANTS}, float[4,2,2,2] wt")  # fmt: skip
    case = prepare(model)
    out = case.insert()
    check(out)
    feeds = random_feeds(model)
    close(run(out, feeds)[0], run(model, feeds)[0], 25)
    assert inner_ops(optimised(out, tmp_path))["QLinearConv"] == 2
    (reads,) = [node for node in out.graph if node.op_type == "ConvTranspose"]
    bias = reads.inputs[2]
    assert bias is not None and bias.dtype == ir.DataType.FLOAT and bias.is_initializer()


def test_tied_weights_get_codes_of_their_own() -> None:
    case = prepare(net(f"a = {CONV}(x, w1, b1) y = {CONV}(a, w1, b1)"))
    proto = check(case.insert())
    names = {tensor.name for tensor in proto.graph.initializer}
    assert {"Conv_0/weight_codes", "Conv_1/weight_codes"} <= names
    assert not names & {"w1", "b1"}


def test_weight_that_others_read_stays_for_them() -> None:
    model = net("k = Transpose<perm=[1,0]>(m) e = MatMul(x, m) s = MatMul(e, k) y = Add(s, x)",
                "float[4,4] m", "float[N,4] x", "float[N,4] y")  # fmt: skip
    out = quantised(model)
    names = {tensor.name for tensor in check(out).graph.initializer}
    assert {"m", "MatMul_0/weight_codes"} <= names
    feeds = random_feeds(model)
    close(run(out, feeds)[0], run(model, feeds)[0], 30)


# --- bias ---------------------------------------------------------------------------------


def initializers(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def test_bias_is_int32_at_exactly_the_product_of_the_scales() -> None:
    case = prepare(small(), weight_bits=4)
    tensors = initializers(case.insert("packed"))
    for layer in case.plan.layers:
        weight_scale = tensors[f"{layer.node}/weight_scale"]
        scale = tensors[f"{layer.node}/bias_scale"]
        sx = np.float32(case.params[layer.x].scale)
        assert scale.dtype == np.float32
        np.testing.assert_array_equal(scale, sx * weight_scale)
        codes = tensors[f"{layer.node}/bias_codes"]
        assert codes.dtype == np.int32
        bias = case.roundings[layer.node].bias
        assert bias is not None
        assert np.abs(codes * scale.astype(np.float64) - bias).max() <= scale.max() / 2


def test_layer_without_bias_gains_one_but_a_matmul_does_not() -> None:
    model = net(f"a = {CONV}(x, w1) g = GlobalAveragePool(a) f = Flatten(g) "
                "y = MatMul(f, m)", y="float[N,5] y")  # fmt: skip
    out = quantised(model)
    inputs = {node.op_type: len(node.inputs) for node in out.graph}
    assert (inputs["Conv"], inputs["MatMul"]) == (3, 2)
    np.testing.assert_array_equal(initializers(out)["Conv_0/bias_codes"], np.zeros(4))
    gemm = net("y = Gemm(x, m)", "float[4,4] m", "float[N,4] x", "float[N,4] y")
    np.testing.assert_array_equal(initializers(quantised(gemm))["Gemm_0/bias_codes"], np.zeros(4))


@pytest.mark.parametrize("bias", [3e12, -3e12])
def test_bias_that_overflows_int32_stays_float(bias: float) -> None:
    case = prepare(small())
    node = case.plan.layers[0].node
    values = np.array([0.5, bias, 0, 0], np.float32)
    case.roundings[node] = replace(case.roundings[node], bias=values)
    out = case.insert()
    check(out)
    tensors = initializers(out)
    np.testing.assert_array_equal(tensors[f"{node}/bias"], values)
    assert f"{node}/bias_codes" not in tensors
    assert np.isfinite(run(out, random_feeds(case.model))[0]).all()
    open_session(out)


def test_bias_at_the_edge_of_int32_does_not_wrap() -> None:
    case = prepare(small())
    layer = case.plan.layers[0]
    rounding = case.roundings[layer.node]
    scale = (rounding.scale * case.params[layer.x].scale).astype(np.float64)
    bias = (scale * 2.0**31 * np.array([0.999, -0.999, 0.5, 0])).astype(np.float32)
    case.roundings[layer.node] = replace(rounding, bias=bias)
    codes = initializers(case.insert())[f"{layer.node}/bias_codes"]
    np.testing.assert_array_equal(np.sign(codes), [1, -1, 1, 0])
    case.roundings[layer.node] = replace(rounding, bias=bias * np.float32(1.01))
    assert f"{layer.node}/bias" in initializers(case.insert())


def test_bias_stays_float_where_the_scale_underflows() -> None:
    case = prepare(small())
    layer = case.plan.layers[0]
    rounding = case.roundings[layer.node]
    tiny = replace(rounding, scale=np.full(4, 1e-38, np.float32), bias=np.zeros(4, np.float32))
    case.roundings[layer.node] = tiny
    tensors = initializers(case.insert())
    np.testing.assert_array_equal(tensors[f"{layer.node}/bias"], np.zeros(4))


@pytest.mark.parametrize("shape", ["[5]", "[1,5]", "[1]", "[1,1]"])
def test_gemm_bias_of_any_row_shape(shape: str) -> None:
    constants = f"float[4,5] m, float{shape} c"
    model = net("y = Gemm(x, m, c)", constants, "float[N,4] x", "float[N,5] y")
    out = quantised(model)
    check(out)
    feeds = random_feeds(model)
    close(run(out, feeds)[0], run(model, feeds)[0], 30)


# --- activations --------------------------------------------------------------------------


def test_quantised_tensor_keeps_its_name_and_an_input_its_own() -> None:
    out = quantised(net(f"a = {CONV}(x, w1) y = Relu(a)"))
    nodes = {node.name: node for node in out.graph}
    assert [v.name for v in nodes["x/quantize"].inputs] == ["x", "x/scale", "x/zero_point"]
    assert nodes["x/dequantize"].outputs[0].name == "x_dequantized"
    assert nodes["Relu_0"].outputs[0].name == "y_raw"
    assert nodes["y/quantize"].outputs[0].name == "y_codes"
    assert nodes["y/dequantize"].outputs[0].name == "y"
    assert out.graph.outputs[0] is nodes["y/dequantize"].outputs[0]


def test_names_that_the_model_has_already_are_not_taken() -> None:
    """As in a model that has been quantised before, or one whose bias is called fc/bias."""
    text = """g (float[N,4] x_dequantized, float[N,4] x) => (float[N,4] y_raw, float[N,4] y)
        <float[4,4] m, float[4] b> {
        x_codes = Relu(x)
        [fc] y_raw = Gemm(x_codes, m, b)
        x_codes_raw = Add(y_raw, x_dequantized)
        y = Gemm(x_codes_raw, m, b) }"""
    text = text.replace("float[4,4] m", "float[4,4] m, float[4,4] fc_m")
    model = build(text)
    for old, new in (("b", "fc/bias"), ("m", "fc/weight_codes")):
        value = model.graph.initializers.pop(old)
        value.name = new
        assert value.const_value is not None
        value.const_value.name = new
        model.graph.initializers[new] = value
    feeds = random_feeds(model)
    for activations in (True, False):
        case = prepare(model, activations=activations)
        out = case.insert()
        check(out)
        assert [v.name for v in out.graph.inputs] == ["x_dequantized", "x"]
        assert [v.name for v in out.graph.outputs] == ["y_raw", "y"]
        for got, wanted in zip(run(out, feeds), run(model, feeds), strict=True):
            close(got, wanted, 25)
        _check_update(case)


def test_tensor_that_a_subgraph_reads() -> None:
    text = f"""g (float[N,4,8,8] x, bool go) => (float[N,4,8,8] y) <{CONSTANTS}> {{
        a = {CONV}(x, w1, b1)
        y = If (go) <
            then_branch = t () => (float[N,4,8,8] p) {{ p = Relu(a) }},
            else_branch = e () => (float[N,4,8,8] q) {{ q = {CONV}(a, w2, b2) }}> }}"""
    model = build(text)
    samples = {"x": random_feeds(model)["x"], "go": np.array(True)}
    plan = make_plan(model, QuantConfig(), quantise_activations=True)
    assert set(plan.activations) == {"x", "a"}
    params = {name: params_from_range(spec, -20, 20) for name, spec in plan.activations.items()}
    config = QuantConfig()
    (layer,) = plan.layers
    matrices = {layer.node: weight_matrix(layer, graph.tensor_value(model, "w1"))}
    allocation = allocate(plan.layers, matrices.__getitem__, config)
    roundings = round_plain(model, plan, params, allocation)
    out = qdq.insert(model, plan, params, roundings, "int8")
    check(out)
    for go in (True, False):
        feeds = {**samples, "go": np.array(go)}
        close(run(out, feeds)[0], run(model, feeds)[0], 20)


def _check_update(case: Case) -> None:
    """To update layers one by one gives what ``insert`` writes at once."""
    changed = {
        node: replace(
            rounding,
            codes=-rounding.codes,
            scale=rounding.scale * np.float32(1.5),
            bias=None if rounding.bias is None else rounding.bias + np.float32(0.25),
        )
        for node, rounding in case.roundings.items()
    }
    out = case.insert()
    for layer in case.plan.layers:
        qdq.update_layer(out, layer, changed[layer.node], case.params, case.plan)
    wanted = replace(case, roundings=changed).insert()
    assert proto_of(out) == proto_of(wanted)


@pytest.mark.parametrize("options", [{}, {"weight_bits": 3}, {"activations": False}])
def test_updated_layers_are_as_if_inserted(options: dict[str, Any]) -> None:
    _check_update(prepare(small(), **options))
    _check_update(prepare(net("a = MatMul(x, m) r = Relu(a) y = Gemm(r, n, b)",
                              "float[4,4] m, float[4,4] n, float[4] b", "float[N,4] x",
                              "float[N,4] y"), **options))  # fmt: skip


def test_weights_only_has_no_quantize_node() -> None:
    case = prepare(small(), activations=False, weight_bits=4, first_last_bits=4)
    proto = check(case.insert("packed"))
    found = Counter(node.op_type for node in proto.graph.node)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (0, len(case.plan.layers))
    tensors = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert tensors["Conv_0/bias"] == tensors["Gemm_0/bias"] == onnx.TensorProto.FLOAT
    feeds = random_feeds(case.model)
    close(run(case.insert("packed"), feeds)[0], run(case.model, feeds)[0], 8)


# --- numbers ------------------------------------------------------------------------------


def emulate(case: Case, x: np.ndarray) -> np.ndarray:
    """Conv, Relu, Gemm from codes and scales, in float64."""
    conv, gemm = case.plan.layers

    def fake(values: np.ndarray, name: str) -> np.ndarray:
        params = case.params[name]
        point = params.zero_point.astype(np.float32)
        codes = quantize(values.astype(np.float32), params.scale, point, params.spec.qmin,
                         params.spec.qmax)  # fmt: skip
        return dequantize(codes, params.scale, point).astype(np.float64)

    def weight(node: str) -> tuple[np.ndarray, np.ndarray]:
        rounding = case.roundings[node]
        assert rounding.bias is not None
        scale = channel_view(rounding.scale, rounding.codes.ndim, rounding.spec.axis)
        layer = next(layer for layer in case.plan.layers if layer.node == node)
        step = (rounding.scale * case.params[layer.x].scale).astype(np.float64)
        return rounding.codes * scale.astype(np.float64), np.rint(rounding.bias / step) * step

    x, (kernel, bias) = fake(x, "x"), weight(conv.node)
    height, width = x.shape[2] - 2, x.shape[3] - 2
    hidden = np.zeros((len(x), len(kernel), height, width))
    for i in range(height):
        for j in range(width):
            patch = x[:, :, i : i + 3, j : j + 3]
            hidden[:, :, i, j] = np.einsum("nchw,ochw->no", patch, kernel) + bias
    flat = fake(np.maximum(hidden, 0), "r").reshape(len(x), -1)
    matrix, row = weight(gemm.node)
    return flat @ matrix + row


@pytest.mark.parametrize(
    ("options", "storage"),
    [({}, "int8"), ({"weight_bits": 4, "first_last_bits": 4}, "packed"),
     ({"weight_bits": 3, "first_last_bits": 3}, "int4"), ({"act_bits": 16}, "int8"),
     ({"act_bits": 3, "first_last_bits": 3}, "int8")],
)  # fmt: skip
def test_numbers_are_those_of_the_codes(options: dict[str, Any], storage: WeightStorage) -> None:
    model = net("a = Conv(x, w1, b1) r = Relu(a) f = Flatten(r) y = Gemm(f, m, mb)",
                "float[4,3,3,3] w1, float[4] b1, float[36,5] m, float[5] mb",
                "float[N,3,5,5] x", "float[N,5] y")  # fmt: skip
    case = prepare(model, **options)
    x = 2 * np.random.default_rng(7).normal(size=(8, 3, 5, 5)).astype(np.float32)
    got = run(case.insert(storage), {"x": x})[0]
    np.testing.assert_allclose(got, emulate(case, x), rtol=1e-5, atol=1e-5 * np.abs(got).max())


@pytest.mark.parametrize(
    ("bits", "code_type", "sqnr"),
    [(2, ir.DataType.UINT8, 0), (4, ir.DataType.UINT8, 12), (8, ir.DataType.UINT8, 30),
     (16, ir.DataType.UINT16, 35)],
)  # fmt: skip
def test_activations_of_any_width_run(bits: int, code_type: ir.DataType, sqnr: float) -> None:
    model = small()
    feeds = {"x": np.random.default_rng(3).normal(size=(64, 4, 8, 8)).astype(np.float32)}
    case = prepare(model, feeds, act_bits=bits)
    out = case.insert()
    nodes = {node.name: node for node in out.graph}
    assert nodes["r/quantize"].outputs[0].dtype == code_type
    assert nodes["r/quantize"].inputs[2].dtype == code_type
    assert ("r/clip_codes" in nodes) == (bits < 8)
    wanted = run(model, feeds)[0]
    close(run(out, feeds)[0], wanted, sqnr)
    close(open_session(out).run(None, feeds)[0], wanted, sqnr)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_narrow_codes_are_held_in_their_range(bits: int) -> None:
    """A QuantizeLinear saturates at 255 only."""
    case = prepare(net(f"a = {CONV}(x, w1) r = Relu(a) b = {CONV}(r, w2) y = {CONV}(b, w1)"),
                   act_bits=bits)  # fmt: skip
    out = case.insert()
    check(out)
    exposed = graph.with_outputs(out, ["r", "b"])
    x = 100 * random_feeds(case.model)["x"]
    r, b = run(exposed, {"x": x})
    params = case.params["r"]
    levels = np.arange(2**bits, dtype=np.float32) * params.scale
    assert set(np.unique(r)) <= set(levels)
    assert {levels[0], levels[-1]} <= set(np.unique(r))
    assert len(np.unique(b)) > 2**bits  # what the last layer reads has 8 bits


def test_codes_that_only_move_are_clipped_once() -> None:
    body = (f"a = {CONV}(x, w1) r = Relu(a) p = MaxPool<kernel_shape=[2,2]>(r) "
            f"b = {CONV}(p, w2) y = {CONV}(b, w1)")  # fmt: skip
    out = quantised(net(body), act_bits=4)
    assert [node.name for node in out.graph if node.op_type == "Clip"] == ["r/clip_codes"]


def test_fused_kernels_agree_with_the_nodes_that_they_replace() -> None:
    case = prepare(small())
    feeds = random_feeds(case.model, seed=5)
    got = open_session(case.insert()).run(None, feeds)[0]
    close(got, run(case.insert(), feeds)[0], 30)


# --- what ONNX Runtime makes of it --------------------------------------------------------

FUSED = {
    "conv": (f"a = {CONV}(x, w1, b1) y = Relu(a)", {"QLinearConv": 1}),
    "conv without bias": (f"y = {CONV}(x, w1)", {"QLinearConv": 1}),
    "clip": (f"a = {CONV}(x, w1) y = Clip(a, lo, hi)", {"QLinearConv": 1}),
    "clip elsewhere": (f"a = {CONV}(x, w1) c = Clip(a, neg, hi) y = {CONV}(c, w1)",
                       {"QLinearConv": 2, "DequantizeLinear": 1, "Clip": 1, "QuantizeLinear": 1}),
    "residual": (f"a = {CONV}(x, w1) r = Relu(a) b = {CONV}(r, w2) s = Add(b, x) t = Relu(s) "
                 f"y = {CONV}(t, w1)", {"QLinearConv": 3, "QLinearAdd": 1}),
    "pools": (f"a = {CONV}(x, w1) r = Relu(a) p = AveragePool<kernel_shape=[2,2]>(r) "
              f"b = {CONV}(p, w2) g = GlobalAveragePool(b) y = Conv(g, w3)",
              {"QLinearConv": 3, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1}),
    "max pool": (f"a = {CONV}(x, w1) r = Relu(a) p = MaxPool<kernel_shape=[2,2]>(r) "
                 f"y = {CONV}(p, w2)", {"QLinearConv": 2, "NhwcMaxPool": 1}),
    "concat": (f"a = {CONV}(x, w1) r = Relu(a) b = {CONV}(x, w2) c = Concat<axis=1>(r, b) "
               "y = Conv(c, w8)", {"QLinearConv": 3, "QLinearConcat": 1}),
    "split": (f"a = {CONV}(x, w1) p, q = Split<axis=1>(a) c = Concat<axis=1>(q, p) "
              f"y = {CONV}(c, w2)", {"QLinearConv": 2, "Split": 1, "QLinearConcat": 1}),
    "u-net": (f"a = {CONV}(x, w1) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) "
              f"b = {CONV}(p, w2) u = Resize(b, , up) c = Concat<axis=1>(u, a) y = Conv(c, w8)",
              {"QLinearConv": 3, "NhwcMaxPool": 1, "Resize": 1, "QLinearConcat": 1}),
    "silu": (f"a = {CONV}(x, w1) s = Sigmoid(a) t = Mul(a, s) y = {CONV}(t, w2)",
             {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1}),
    "squeeze and excite": (
        f"a = {CONV}(x, w1) g = GlobalAveragePool(a) e = Conv(g, w3) s = Sigmoid(e) "
        f"t = Mul(a, s) y = {CONV}(t, w2)",
        {"QLinearConv": 3, "QLinearGlobalAveragePool": 1, "QLinearSigmoid": 1, "QLinearMul": 1}),
    "leaky": (f"a = {CONV}(x, w1) l = LeakyRelu(a) s = Add(l, x) y = {CONV}(s, w2)",
              {"QLinearConv": 2, "QLinearLeakyRelu": 1, "QLinearAdd": 1}),
    "moves": (f"a = {CONV}(x, w1) t = Reshape(a, shape) u = Gather<axis=2>(t, index) "
              f"v = DepthToSpace<blocksize=2>(u) y = Conv(v, w1x)",
              {"QLinearConv": 2, "Reshape": 1, "Gather": 1, "DepthToSpace": 1}),
}  # fmt: skip


FUSED_CONSTANTS = (
    f"{CONSTANTS}, float[4,1,1,1] w1x, float lo = {{0}}, float hi = {{6}}, float neg = {{-1}}, "
    "float[4] up = {1, 1, 2, 2}, int64[4] shape = {0, 4, 4, 16}, int64[2] index = {3, 1}"
)


@pytest.mark.parametrize("name", FUSED)
def test_convolutional_nets_run_in_integer(name: str, tmp_path: Path) -> None:
    body, ops = FUSED[name]
    assert runs_as(net(body, FUSED_CONSTANTS), tmp_path) == ops


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", FUSED)
def test_whatever_fuses_computes_the_same(name: str, bits: int) -> None:
    model, _ = simplify(net(FUSED[name][0], FUSED_CONSTANTS))
    case = prepare(model, act_bits=bits)
    feeds = random_feeds(model)
    wanted = run(model, feeds)[0]
    close(run(case.insert(), feeds)[0], wanted, 8 if bits == 4 else 25)
    close(open_session(case.insert()).run(None, feeds)[0], wanted, 8 if bits == 4 else 25)


@pytest.mark.parametrize("x", ["float[N,4,16] x", "float[N,4,6,6,6] x"])
def test_convolutions_of_one_and_three_dimensions_fuse(x: str, tmp_path: Path) -> None:
    rank = x.count(",") - 1
    ones = ",".join(["1"] * (2 * rank))
    kernel = ",".join(["3"] * rank)
    model = net(f"a = Conv<pads=[{ones}]>(x, v, b1) r = Relu(a) y = Conv(r, v)",
                f"float[4,4,{kernel}] v, float[4] b1", x,
                f"float[N,4,{','.join('hwd'[:rank])}] y")  # fmt: skip
    assert runs_as(model, tmp_path) == {"QLinearConv": 2}


DENSE = {
    "gemm": ("a = Gemm<transB=1>(x, m, b) r = Relu(a) y = Gemm(r, n, b)", "[N,4]", {"QGemm": 2}),
    "gemm without bias": ("a = Gemm(x, m) r = Relu(a) y = Gemm(r, n)", "[N,4]", {"QGemm": 2}),
    "matmul": ("a = MatMul(x, m) r = Relu(a) y = MatMul(r, n)", "[N,4]",
               {"QLinearMatMul": 1, "MatMulIntegerToFloat": 1}),
    "matmul and bias": ("a = MatMul(x, m) s = Add(a, b) t = Relu(s) c = MatMul(t, n) "
                        "y = Add(b, c)", "[N,3,4]",
                        {"MatMulIntegerToFloat": 2, "Add": 2, "QuantizeLinear": 1}),
    "matmul and bias of known shape": ("a = MatMul(x, m) s = Add(a, b) t = Relu(s) "
                                       "c = MatMul(t, n) y = Add(b, c)", "[1,3,4]",
                                       {"MatMulIntegerToFloat": 2, "Add": 2, "QuantizeLinear": 1}),
    "matmul and bias of rank 4": ("a = MatMul(x, m) s = Add(b, a) u = Add(s, b) c = MatMul(u, n) "
                                  "y = Add(c, b)", "[2,2,3,4]",
                                  {"MatMulIntegerToFloat": 2, "Add": 3, "QuantizeLinear": 1}),
    "matmul and matrix": ("a = MatMul(x, m) s = Add(a, n) y = Softmax(s)", "[4,4]",
                            {"QGemm": 1, "Add": 1, "Softmax": 1}),
    "matmul and bias of rank 2": ("a = MatMul(x, m) s = Add(a, b) t = Relu(s) c = MatMul(t, n) "
                                  "y = Add(b, c)", "[N,4]", {"QGemm": 2}),
}  # fmt: skip


@pytest.mark.parametrize("storage", ["int8", "packed"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_layers_run_in_integer(name: str, storage: WeightStorage, tmp_path: Path) -> None:
    body, dims, ops = DENSE[name]
    model = net(body, "float[4,4] m, float[4,4] n, float[4] b", f"float{dims} x", f"float{dims} y")
    assert runs_as(model, tmp_path, storage=storage, weight_bits=4, first_last_bits=4) == ops


@cache
def clipped(top: float) -> ir.Model:
    exact = np.format_float_positional(np.float32(top), unique=True, trim="0")
    return net(f"a = {CONV}(x, w1) y = Clip(a, lo, hi)",
               f"{CONSTANTS}, float lo = {{0}}, float hi = {{{exact}}}")  # fmt: skip


def clipped_case(top: float, bits: int, highest: float) -> Case:
    """Conv, then Clip from 0 to ``top``; the codes of what comes out reach to ``highest``."""
    model = clipped(top)
    plan = make_plan(model, QuantConfig(), quantise_activations=True)
    assert set(plan.activations) == {"x", "y"}
    specs = {"x": plan.activations["x"], "y": replace(plan.activations["y"], bits=bits)}
    params = {"x": params_from_range(specs["x"], -3, 3),
              "y": params_from_range(specs["y"], 0, highest)}  # fmt: skip
    matrices = {"Conv_0": weight_matrix(plan.layers[0], graph.tensor_value(model, "w1"))}
    allocation = allocate(plan.layers, matrices.__getitem__, QuantConfig())
    plan = replace(plan, activations=specs)
    return Case(model, plan, params, round_plain(model, plan, params, allocation))


@pytest.mark.parametrize("top", [6.0, 1.0, 0.1, 3.3, 20.0, 255.89555, 1e-3])
@pytest.mark.parametrize("share", [1.0, 0.73])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_clip_goes_where_its_range_holds_that_of_the_codes(
    top: float, share: float, bits: int, tmp_path: Path
) -> None:
    """Scales are rounded to float32, yet the largest code must not lie beyond the bound."""
    if (top, share, bits) == (255.89555, 1.0, 8) and RUNTIME <= (1, 25):
        pytest.skip("ONNX Runtime 1.23 to 1.25 give a Conv and what they make of its Clip one name")
    case = clipped_case(top, bits, share * float(np.float32(top)))
    expected = {"QLinearConv": 1} if bits == 8 else {"QLinearConv": 1, "Clip": 1}
    assert inner_ops(optimised(case.insert(), tmp_path)) == expected


@pytest.mark.parametrize("highest", [5.0, 6.0, 6.1, 7.0])
def test_clip_before_narrow_codes_goes_only_if_it_changes_none(highest: float) -> None:
    case = clipped_case(6.0, 4, highest)
    out = case.insert()
    idle = highest < 6.2  # 6 then still rounds to the highest code
    assert [n.name for n in out.graph if n.op_type == "Clip"] == [
        *([] if idle else ["Clip_0"]), "y/clip_codes"
    ]  # fmt: skip
    assert out.graph.outputs[0].name == "y"
    x = 4 * random_feeds(case.model)["x"]
    (conv,) = [node.outputs[0].name or "" for node in out.graph if node.op_type == "Conv"]
    values = np.clip(run(graph.with_outputs(out, [conv]), {"x": x})[0], 0, 6)
    params = case.params["y"]
    codes = quantize(values, params.scale, np.float32(0), 0, 15)
    np.testing.assert_array_equal(run(out, {"x": x})[0], dequantize(codes, params.scale, 0))


@pytest.mark.parametrize("node", ["Relu(a)", "Clip(a, lo)", "Clip(a, lo, hi)"])
def test_what_a_q_does_anyhow_is_left_out_where_the_target_wants_that(node: str) -> None:
    constants = f"{CONSTANTS}, float lo = {{0}}, float hi = {{9999}}"
    model = net(f"a = {CONV}(x, w1) b = {node} y = {CONV}(b, w2)", constants)
    assert not {n.op_type for n in quantised(model, target="qnn").graph} & {"Relu", "Clip"}


INTEGER = {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QLinearAveragePool", "QGemm",
           "Flatten", "Reshape", "Slice", "Concat"}  # fmt: skip


def check_fusion(path: Path, samples: Any, folder: Path, pads: int = 0) -> None:
    """All in integer, packed 4-bit codes like 8-bit ones; ``pads`` stay between DQ and Q."""
    model, _ = simplify(graph.load(path))
    source = Counter(node.op_type for node in model.graph)

    def ops(storage: WeightStorage, **options: Any) -> Counter[str]:
        case = prepare(model, samples, **options)
        return inner_ops(optimised(case.insert(storage), folder))

    fused = ops("int8", weight_bits=8)
    assert fused["QLinearConv"] == source["Conv"]
    assert fused["QGemm"] == source["Gemm"] == 1
    assert fused["QLinearAdd"] == source["Add"] > 0
    around = {"DequantizeLinear": pads, "Pad": pads, "QuantizeLinear": pads} if pads else {}
    assert {op: count for op, count in fused.items() if op not in INTEGER} == around
    assert ops("int8", weight_bits=4) == ops("packed", weight_bits=4) == fused
    # The first and the last layer have 8 bits; the others unpack their weights to float.
    plain = ops("int4", weight_bits=4)
    assert (plain["QLinearConv"], plain["QGemm"]) == (1, 1)
    assert plain["Conv"] == source["Conv"] - 1
    assert plain["DequantizeLinear"] > plain["Conv"]
    # Activations of 4 bits are codes of 8 bits that a Clip on integers holds in their range.
    narrow = ops("packed", weight_bits=4, act_bits=4)
    clips = narrow.pop("Clip")
    assert narrow == fused
    assert 0 < clips < source["Conv"]


@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobilenet"])
def test_sample_models_run_in_integer(name: str, models_dir: Path, tmp_path: Path) -> None:
    check_fusion(models_dir / f"{name}.onnx", models_dir / "digits_calib.npz", tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(("name", "pads"), [("resnet20_cifar", 2), ("mobilenetv2_cifar", 0)])
def test_real_models_run_in_integer(name: str, pads: int, data_dir: Path, tmp_path: Path) -> None:
    if pads and version("onnxsim").startswith("0.7."):
        pytest.skip("onnxsim 0.7 leaves the arithmetic on shapes before a Pad")
    images = np.load(data_dir / "cifar10" / "calib.npz")["images"][:32]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((images / 255 - mean) / deviation).transpose(0, 3, 1, 2).astype(np.float32)
    check_fusion(data_dir / f"{name}.onnx", x, tmp_path, pads)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobilenet"])
def test_sample_models_keep_their_accuracy(name: str, bits: int, models_dir: Path) -> None:
    """Rounding to nearest: a coarse check that every scale is where it belongs."""
    model, _ = simplify(graph.load(models_dir / f"{name}.onnx"))
    samples = np.load(models_dir / "digits_eval.npz")
    case = prepare(model, models_dir / "digits_calib.npz", observer="mse", weight_bits=bits)
    top1 = {}
    for storage in ("int8", "packed", "int4"):
        session = open_session(case.insert(storage))
        logits = session.run(None, {"input": samples["input"]})[0]
        top1[storage] = float((logits.argmax(1) == samples["labels"]).mean())
    assert max(top1.values()) - min(top1.values()) < 0.01
    assert top1["int8"] > (0.97 if bits == 8 else 0.8)


def test_specs_with_signed_codes_are_written_as_such() -> None:
    """Another target may ask for signed symmetric activations."""
    case = prepare(small())
    spec = QuantSpec(bits=8, signed=True, symmetric=True)
    plan = replace(case.plan, activations=dict.fromkeys(case.plan.activations, spec))
    params = {name: params_from_range(spec, -30, 30) for name in plan.activations}
    out = qdq.insert(case.model, plan, params, case.roundings, "int8")
    check(out)
    points = {value.dtype for name, value in out.graph.initializers.items()
              if name.endswith("/zero_point")}  # fmt: skip
    assert points == {ir.DataType.INT8}
    feeds = random_feeds(case.model)
    close(run(out, feeds)[0], run(case.model, feeds)[0], 15)
