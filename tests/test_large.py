"""Models too large for memory or for one protobuf message: the same results, by other ways."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_attnround import QuantConfig, graph, quantize
from onnx_attnround.graph import constants, saving
from onnx_attnround.runtime import session as sessions
from onnx_attnround.simplify import onnxsim_pass, simplify

pytestmark = pytest.mark.slow

MODELS = Path(__file__).resolve().parent.parent / "models"
WEIGHTS_ONLY = {"weight_bits": 4, "act_bits": 32}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every model counts as too large, and every constant."""
    monkeypatch.setattr(saving, "INLINE_LIMIT", 1000)
    monkeypatch.setattr(constants, "SMALL", 0)
    monkeypatch.setattr(onnxsim_pass, "LARGE", 0)
    monkeypatch.setattr(sessions, "LARGE", 0)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture(params=["digits_resnet", "digits_mobilenet"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with its weights in a file of their own."""
    path = tmp_path / "in.onnx"
    proto = onnx.load(MODELS / f"{request.param}.onnx")
    onnx.save(proto, path, save_as_external_data=True, location="in.data", size_threshold=0)
    return path


@pytest.mark.parametrize("options", [{}, WEIGHTS_ONLY], ids=["integer", "weights only"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_large_model_becomes_what_it_would_if_it_were_small(
    calibrated: bool,
    options: dict[str, int],
    model: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    samples = np.load(MODELS / "digits_calib.npz")["input"][:16] if calibrated else None
    config = QuantConfig.parse({"threads": 1, "steps": 5, "observer": "minmax", **options})
    usual = quantize(model, samples, config, output=tmp_path / "small.onnx")
    request.getfixturevalue("large")
    other = quantize(model, samples, config, output=tmp_path / "large.onnx")
    assert not list((tmp_path / "tmp").iterdir())
    assert len(list(tmp_path.glob("large.onnx.*.data"))) == 1
    assert other.checked == usual.checked
    small, large = (graph.load(tmp_path / f"{name}.onnx") for name in ("small", "large"))
    assert values(large) == values(small)
    assert [str(node) for node in large.graph] == [str(node) for node in small.graph]
    if calibrated:
        assert other.verification is not None
        assert usual.verification is not None
        assert other.verification.outputs == usual.verification.outputs


def values(model: ir.Model) -> dict[str, bytes]:
    """The constants by name."""
    return {value.name or "": tensor.tobytes() for value, tensor in constants.constants(model)}


@pytest.mark.usefixtures("large")
def test_half_precision_is_widened_whenever_it_is_asked_for(tmp_path: Path) -> None:
    """The float32 values of a whole model are never held together."""
    given = np.arange(1024, dtype=np.float16).reshape(32, 32)
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float16[N,32] x) => (float16[N,32] y) { y = MatMul(x, w) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(given, "w"))
    path = tmp_path / "in.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="in.data", size_threshold=0)
    simplified, _ = simplify(graph.load(path))
    tensor = simplified.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    np.testing.assert_array_equal(tensor.numpy(), given.astype(np.float32))
    assert tensor.dtype == ir.DataType.FLOAT
    assert tensor.numpy() is not tensor.numpy()
