"""Sessions: from memory and from files, with errors of one line."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from layered_models import LAYERED
from qdq_builder import Builder
from small_models import build, build_proto, run

from onnx_attnround import graph
from onnx_attnround.errors import ModelError, OutputError
from onnx_attnround.graph import constants
from onnx_attnround.runtime import session as sessions
from onnx_attnround.runtime.session import first_line, open_session

X = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)


def test_a_model_in_memory_and_its_file_give_the_same(tmp_path: Path) -> None:
    model = build(LAYERED["chain"])
    before = ir.to_proto(model).SerializeToString()
    graph.save(model, tmp_path / "m.onnx")
    results = [
        open_session(source, threads=1).run(None, {"x": X})[0]
        for source in (model, tmp_path / "m.onnx")
    ]
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], run(model, {"x": X})[0], rtol=1e-5, atol=1e-6)
    assert ir.to_proto(model).SerializeToString() == before


def test_weights_in_a_file_of_their_own_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "model" / "m.onnx"
    onnx.save(build_proto(LAYERED["chain"]), path, save_as_external_data=True,
              location="m.data", size_threshold=0)  # fmt: skip
    model = graph.load(path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (y,) = open_session(model).run(None, {"x": X})
    np.testing.assert_allclose(y, run(build(LAYERED["chain"]), {"x": X})[0], rtol=1e-5, atol=1e-6)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every model counts as a large one; the folder for temporary files."""
    monkeypatch.setattr(sessions, "LARGE", 0)
    monkeypatch.setattr(constants, "SMALL", 0)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.mark.parametrize("external", [False, True])
def test_large_models_are_read_from_files(external: bool, large: Path, tmp_path: Path) -> None:
    proto, path = build_proto(LAYERED["chain"]), tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=external, location="m.data", size_threshold=0)
    model = graph.load(path)
    name, value = next(iter(model.graph.initializers.items()))
    value.const_value = ir.tensor(2 * graph.tensor_value(model, name), name=name)
    before = ir.to_proto(model).SerializeToString()
    session = open_session(model, threads=1, optimised_model=tmp_path / "optimised.onnx")
    assert not list(large.iterdir())
    np.testing.assert_allclose(
        session.run(None, {"x": X})[0], run(model, {"x": X})[0], rtol=1e-5, atol=1e-6
    )
    assert ir.to_proto(model).SerializeToString() == before
    onnx.checker.check_model(tmp_path / "optimised.onnx")


def test_large_models_may_hold_codes_of_four_bits(large: Path) -> None:
    model = build(
        """g (float[N,4] x, int4[4,6] codes) => (float[N,6] y) <float[6] s> {
            weight = DequantizeLinear<axis = 1>(codes, s)
            y = MatMul(x, weight)
        }""",
        opset=21,
        ir_version=10,
    )
    values = np.arange(-8, 16).reshape(4, 6) % 16 - 8
    codes = model.graph.inputs.pop()
    codes.const_value = ir.tensor(values.astype(ml_dtypes.int4), name="codes")
    model.graph.register_initializer(codes)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    (y,) = open_session(model, threads=1, optimise=False).run(None, {"x": x})
    np.testing.assert_allclose(y, run(model, {"x": x})[0], rtol=1e-5, atol=1e-6)
    assert not list(large.iterdir())


def test_no_room_for_the_weights_of_a_large_model(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(large / "missing"))
    with pytest.raises(OutputError, match="set TMPDIR to a larger disk"):
        open_session(build(LAYERED["chain"]))


def test_threads_and_provider(tmp_path: Path) -> None:
    model = build(LAYERED["chain"])
    session = open_session(model, threads=1)
    assert session.get_session_options().intra_op_num_threads == 1
    assert open_session(model).get_session_options().intra_op_num_threads == 0
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_the_graph_that_runs_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "optimised.onnx"
    open_session(build(LAYERED["chain"]), optimised_model=path)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert "Conv" in ops
    assert "Relu" not in ops


def test_what_onnx_runtime_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    unknown = build("g (float[N] x) => (float[N] y) { y = own.Nothing(x) }")
    for source in (tmp_path / "bad.onnx", tmp_path / "missing.onnx", unknown):
        with pytest.raises(ModelError, match="^ONNX Runtime cannot load the model: .+") as caught:
            open_session(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \n  two  \n"), "two"),
        (ValueError(), "ValueError()"),
    ],
)
def test_first_line(error: BaseException, line: str) -> None:
    assert first_line(error) == line


def largest_products(op: str, dtype: str = "UINT8") -> ir.Model:
    """A layer all of whose codes are the largest that there are, on an input of ones.

    A sum of two products exceeds 16 bits. The operator may be one on integers.
    """
    made = Builder(opset=13, ir_version=8)
    least, weights = -128 if dtype == "INT8" else 0, np.full((8, 8), 127)
    scale, point = made.constant("s", 1 / 255), made.constant("z", least, dtype)
    codes = made.node("QuantizeLinear", ["x", scale, point], "q")
    steps = [made.constant("ws", 1 / 64), made.constant("wz", 0, "INT8")]
    end = [made.constant("os", 0.5), made.constant("oz", least, dtype)]
    if op == "QLinearMatMul":
        weight = made.constant("w", weights, "INT8")
        made.node(op, [codes, scale, point, weight, *steps, *end], "sums")
    else:
        x = made.node("DequantizeLinear", [codes, scale, point], "dq")
        shape = (8, 8, 1, 1) if op == "Conv" else (8, 8)
        weight = made.constant("w", weights.reshape(shape), "INT8")
        made.node(op, [x, made.node("DequantizeLinear", [weight, *steps], "wdq")], "product")
        made.node("QuantizeLinear", ["product", *end], "sums")
    made.node("DequantizeLinear", ["sums", *end], "y")
    return made.build("y", (2, 8, 4, 4) if op == "Conv" else (2, 8))


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul", "QLinearMatMul"])
@pytest.mark.parametrize("dtype", ["UINT8", "INT8"])
def test_sums_are_exact_on_any_cpu(op: str, dtype: str) -> None:
    """Also on those whose kernels have no such option for signed codes."""
    model = largest_products(op, dtype)
    x = np.ones((2, 8, 4, 4) if op == "Conv" else (2, 8), np.float32)
    (y,) = open_session(model, threads=1).run(None, {"x": x})
    np.testing.assert_allclose(y, 8 * 127 / 64, atol=0.25)
