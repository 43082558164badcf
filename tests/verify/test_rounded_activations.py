"""What MatMulNBits costs by rounding float activations is told, with the remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from small_models import build_proto
from versions import needs_runtime_1_24

from onnx_attnround import QuantizeResult, check_model, quantize
from onnx_attnround.runtime.session import ACCURACY_LEVEL

FIRST = np.array([1, 1, 30, 30, 1, 30, 100, 1], np.float32)
FAR = np.array([1, 1, 50, 50, 1e3, 1e4, 1e5, 1], np.float32)
TABLE = """net (float[N,8] x) => (float[N,3] y)
<float[8,32] u, float[32,32] v, float[32,3] w> {
    a = MatMul(x, u)
    b = Relu(a)
    c = MatMul(b, v)
    d = Relu(c)
    y = MatMul(d, w)
}"""


def converted(columns: np.ndarray, folder: Path, **options: object) -> QuantizeResult:
    """A table of columns of those sizes, which the first layer evens out."""
    model = build_proto(TABLE)
    weight = model.graph.initializer[0]
    values = np.array(weight.float_data, np.float32).reshape(-1) if weight.float_data else None
    values = np.frombuffer(weight.raw_data, np.float32) if values is None else values
    weight.ClearField("float_data")
    weight.raw_data = (values.reshape(8, 32) / columns[:, None]).astype(np.float32).tobytes()
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    x = np.random.default_rng(0).normal(size=(128, 8)).astype(np.float32) * columns
    config = {"weight_bits": 8, "act_bits": 32, "threads": 1, **options}
    return quantize(folder / "in.onnx", {"x": x}, config, output=folder / "out.onnx")


@needs_runtime_1_24
def test_a_note_names_the_session_option(tmp_path: Path) -> None:
    notes = converted(FIRST, tmp_path).notes
    assert sum(f"session option {ACCURACY_LEVEL} set to 1" in note for note in notes) == 1


def test_even_columns_and_few_bits_need_no_note(tmp_path: Path) -> None:
    notes = converted(np.ones(8, np.float32), tmp_path, weight_bits=3, first_last_bits=3).notes
    assert not any(ACCURACY_LEVEL in note for note in notes)


@needs_runtime_1_24
def test_the_check_of_a_file_tells_it_too(tmp_path: Path) -> None:
    assert converted(FAR, tmp_path).checked.findings
    x = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32) * FAR
    checked = check_model(tmp_path / "out.onnx", calibration={"x": x})
    assert [finding.rule for finding in checked.findings] == ["activations-rounded"]
    assert not checked.refused
