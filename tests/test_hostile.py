"""Models and samples that are broken or mean harm: an error of the package, or a sound file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from checked_conversion import convert, layers
from onnx import TensorProto
from small_models import build_proto

from onnx_attnround import AttnRoundError, QuantConfig, quantize
from onnx_attnround.errors import CalibrationError, ModelError

pytestmark = pytest.mark.slow

GEMM = """net (float[N,4] x) => (float[N,3] y) <float[4,3] w, float[3] b> { y = Gemm(x, w, b) }"""
CONV = """net (float[N,2,6,6] x) => (float[N,3,6,6] y) <float[3,2,3,3] w, float[3] b> {
    c = Conv<pads = [1,1,1,1]>(x, w, b)  y = Relu(c) }"""
TWO = """net (float[N,4] x) => (float[N,3] y) <float[4,4] v, float[4,3] w> {
    h = MatMul(x, v)  r = Relu(h)  y = MatMul(r, w) }"""


def quantise_bytes(data: bytes, folder: Path, calibration: object = None) -> None:
    (folder / "in.onnx").write_bytes(data)
    calibration = {"x": np.ones((4, 4), np.float32)} if calibration is None else calibration
    quantize(folder / "in.onnx", calibration, QuantConfig(threads=1), output=folder / "out.onnx")


# --- graphs -----------------------------------------------------------------------------


def cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "r"


def same_value_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].output[0] = "h"
    proto.graph.node[2].input[0] = "h"


def constant_twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])


def constant_missing(proto: onnx.ModelProto) -> None:
    del proto.graph.initializer[0]


def output_missing(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "z"


def data_missing(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = b""


def data_too_long(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [4, 2]


def dimensions_absurd(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [2**40, 2**40]


def dimensions_negative(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [-4, -4]


def weight_of_another_size(proto: onnx.ModelProto) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((7, 3), np.float32), "w")
    proto.graph.initializer[1].CopyFrom(weight)


def type_unknown(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = 99


def operator_unknown(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type = "Relux"


def no_opset(proto: onnx.ModelProto) -> None:
    del proto.opset_import[:]


def no_ends(proto: onnx.ModelProto) -> None:
    del proto.graph.output[:]


@pytest.mark.parametrize(
    "harm",
    [cycle, same_value_twice, constant_twice, constant_missing, output_missing, data_missing,
     data_too_long, dimensions_absurd, dimensions_negative, weight_of_another_size, type_unknown,
     operator_unknown, no_opset, no_ends],
    ids=lambda harm: harm.__name__,
)  # fmt: skip
def test_a_broken_graph_is_refused(
    harm: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    proto = build_proto(TWO)
    harm(proto)
    with pytest.raises(ModelError) as caught:
        quantise_bytes(proto.SerializeToString(), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_cut_short_anywhere_is_refused_or_sound(tmp_path: Path) -> None:
    data = build_proto(TWO).SerializeToString()
    for end in range(0, len(data), 7):
        with pytest.raises(AttnRoundError):
            quantise_bytes(data[:end], tmp_path)


def external(tensor: onnx.TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", "0"), ("length", "48")):
        tensor.external_data.add(key=key, value=value)


def in_initializer(location: str) -> onnx.ModelProto:
    proto = build_proto(GEMM)
    external(proto.graph.initializer[0], location)
    return proto


def in_constant(location: str) -> onnx.ModelProto:
    zeros = "0," * 11 + "0"
    proto = build_proto(
        "net (float[N,4] x) => (float[N,3] y) {"
        f"w = Constant<value = float[4,3] {{{zeros}}}>()  y = MatMul(x, w) }}"
    )
    tensor = proto.graph.node[0].attribute[0].t
    tensor.ClearField("float_data")
    external(tensor, location)
    return proto


def in_branch(location: str) -> onnx.ModelProto:
    proto = build_proto(
        "net (float[N,4] x, bool f) => (float[N,3] y) <float[4,3] u> { y = If(f)<"
        "then_branch = t () => (float[N,3] p) { p = MatMul(x, u) },"
        "else_branch = e () => (float[N,3] q) <float[4,3] w = {"
        + "0," * 11
        + "0}> { q = MatMul(x, w) }> }"
    )
    tensor = proto.graph.node[0].attribute[1].g.initializer[0]
    tensor.ClearField("float_data")
    external(tensor, location)
    return proto


@pytest.mark.parametrize("place", [in_initializer, in_constant, in_branch])
@pytest.mark.parametrize("location", ["../secret", "{0}/secret", "link"])
def test_no_file_outside_the_folder_is_read(
    location: str, place: Callable[[str], onnx.ModelProto], tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(np.full(12, 7, np.float32).tobytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    proto = place(location.format(tmp_path))
    feeds = {"x": np.ones((4, 4), np.float32), "f": np.array(True)}
    with pytest.raises(ModelError):
        quantise_bytes(proto.SerializeToString(), folder, [feeds])


# --- numbers ----------------------------------------------------------------------------


def with_values(text: str, **values: object) -> onnx.ModelProto:
    proto = build_proto(text)
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            data = np.asarray(values[tensor.name], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(data, tensor.name))
    return proto


W = np.random.default_rng(0).normal(size=(4, 3))


@pytest.mark.parametrize("name", ["w", "b"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_constants_that_are_not_finite_are_named(name: str, value: float, tmp_path: Path) -> None:
    values = {"w": W * 1.0, "b": np.ones(3)}
    values[name].reshape(-1)[1] = value
    with pytest.raises(ModelError, match=f"'{name}' holds NaN or Inf"):
        convert(with_values(GEMM, **values), tmp_path)


WEIGHTS = {
    "zeros": W * 0,
    "a channel of zeros": W * [0, 1, 1],
    "constant channels": np.ones((4, 3)) * [1, -2, 3],
    "tiny": W * 1e-38,
    "denormal": W * 1e-44,
    "a denormal channel": W * [1e-41, 1, 1],
    "huge": W * 1e37,
    "of all sizes": W * [1e-20, 1, 1e20],
}
BIASES = {"usual": np.ones(3), "huge": np.array([1e30, 1, -1e30]), "tiny": np.full(3, 1e-42)}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights_and_biases_of_any_size(
    weight: np.ndarray, bias: np.ndarray, tmp_path: Path
) -> None:
    proto = with_values(GEMM, w=weight, b=bias)
    assert layers(convert(proto, tmp_path, sqnr=-np.inf)) == ["Gemm"]


def test_a_bias_beyond_int32_keeps_its_value(tmp_path: Path) -> None:
    proto = with_values(GEMM, w=W * 1e-12, b=[1e6, -1e6, 1])
    convert(proto, tmp_path, sqnr=100)


SAMPLES = {
    "constant": np.full((4, 2, 6, 6), 3),
    "zero": np.zeros((4, 2, 6, 6)),
    "huge": W.reshape(1, 2, 6, 1) * np.full((4, 1, 1, 6), 1e30),
    "tiny": W.reshape(1, 2, 6, 1) * np.full((4, 1, 1, 6), 1e-40),
    "one": np.ones((1, 2, 6, 6)),
}


@pytest.mark.parametrize("x", SAMPLES.values(), ids=SAMPLES.keys())
def test_samples_of_any_size(x: np.ndarray, tmp_path: Path) -> None:
    feeds = [{"x": x.astype(np.float32)}]
    assert layers(convert(build_proto(CONV), tmp_path, feeds)) == ["Conv"]


def test_activations_too_large_to_square_fall_back_to_nearest(tmp_path: Path) -> None:
    """Their second moments overflow: the layer is rounded on its weights alone."""
    proto = with_values(TWO, v=np.eye(4) * 1e20, w=W)
    feeds = [{"x": np.abs(np.random.default_rng(0).normal(size=(16, 4))).astype(np.float32)}]
    result = convert(proto, tmp_path, feeds, sqnr=20)
    assert layers(result) == ["MatMul", "MatMul"]
    assert result.roundings["MatMul_1"].changed == 0


# --- samples that do not fit ------------------------------------------------------------

UNFIT = {
    "another name": {"z": np.ones((4, 4), np.float32)},
    "another rank": {"x": np.ones((4, 4, 1), np.float32)},
    "another size": {"x": np.ones((4, 5), np.float32)},
    "another type": {"x": np.ones((4, 4), np.int64)},
    "text": {"x": np.full((4, 4), "1")},
    "objects": {"x": np.full((4, 4), None)},
    "none": {"x": np.ones((0, 4), np.float32)},
    "NaN": {"x": np.full((4, 4), np.nan, np.float32)},
    "infinity": {"x": np.full((4, 4), np.inf, np.float32)},
    "not a mapping": 7,
}


@pytest.mark.parametrize("samples", UNFIT.values(), ids=UNFIT.keys())
def test_samples_that_do_not_fit_are_refused(samples: object, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        quantise_bytes(build_proto(TWO).SerializeToString(), tmp_path, samples)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("act_bits", [8, 32])
def test_a_free_dimension_that_only_the_weight_knows(act_bits: int, tmp_path: Path) -> None:
    proto = build_proto(TWO.replace("float[N,4] x", "float[N,K] x"))
    samples = [{"x": np.ones((2, size), np.float32)} for size in (4, 5)]
    with pytest.raises(CalibrationError, match="ONNX Runtime failed on the calibration samples"):
        convert(proto, tmp_path, samples, act_bits=act_bits)


def test_a_pickle_in_an_archive_is_not_opened(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "harmed",))

    np.savez(tmp_path / "c.npz", x=np.array([Harm()], object), allow_pickle=True)
    with pytest.raises(CalibrationError, match="holds Python objects"):
        quantise_bytes(build_proto(TWO).SerializeToString(), tmp_path, tmp_path / "c.npz")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("location", ["../secret", "{0}/secret"])
def test_a_data_set_that_points_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(48))
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    tensor = onnx.numpy_helper.from_array(np.ones((3, 4), np.float32), "x")
    external(tensor, location.format(tmp_path))
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(CalibrationError, match="input_0"):
        quantise_bytes(build_proto(TWO).SerializeToString(), tmp_path, folder)
