"""Sessions: from memory and from files, with errors of one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from layered_models import LAYERED
from small_models import build, build_proto, run

from onnx_attnround import graph
from onnx_attnround.errors import ModelError
from onnx_attnround.runtime import first_line, open_session

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
