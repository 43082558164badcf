"""What the package exports: its functions take what they say, its results show themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build, build_proto

import onnx_attnround
from onnx_attnround import (
    AttnRoundError,
    CalibrationError,
    ConfigError,
    Event,
    OutputError,
    Preprocess,
    QuantConfig,
    QuantizeResult,
    Target,
    check_model,
    make_plan,
    quantize,
    trade_off,
)
from onnx_attnround.__main__ import main

PACKAGE = Path(onnx_attnround.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NET = """
net (float[N,3,8,8] x) => (float[N,5] y)
<float[4,3,3,3] w1, float[4,4,3,3] w2, float[4,5] w3> {
  a = Conv(x, w1)
  b = Relu(a)
  c = Conv(b, w2)
  d = GlobalAveragePool(c)
  e = Flatten(d)
  y = MatMul(e, w3)
}
"""
FAST: dict[str, Any] = {"method": "nearest", "observer": "minmax", "threads": 1}


def noise(count: int = 64) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def result() -> QuantizeResult:
    """A run with keywords in place of a config, verified on a mapping with labels."""
    evaluation = {"x": noise(32), "labels": np.arange(32) % 5}
    return quantize(build(NET), noise(), weight_bits=4, evaluation=evaluation, **FAST)


def test_all_that_is_public_is_there() -> None:
    for name in onnx_attnround.__all__:
        assert getattr(onnx_attnround, name) is not None
    assert re.match(r"\d+\.\d+|unknown", onnx_attnround.__version__)
    assert Event(stage="round", done=1, total=2).detail == ""
    assert isinstance(onnx_attnround.TARGETS["ort"], Target)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = onnx_attnround.nonsense


def test_keywords_are_settings_and_override_a_config(result: QuantizeResult) -> None:
    assert set(result.allocation.bits.values()) == {4, 8}
    _, allocation = make_plan(build(NET), {"weight_bits": 4}, weight_bits=3, first_last_bits=5)
    assert set(allocation.bits.values()) == {3, 5}
    _, allocation = make_plan(build(NET), QuantConfig(weight_bits=3), first_last_bits=5)
    assert set(allocation.bits.values()) == {3, 5}
    assert check_model(result.model, target="qnn").target == "qnn"
    for run in (make_plan, quantize, check_model):
        with pytest.raises(ConfigError, match="unknown option `weigth_bits`"):
            run(build(NET), weigth_bits=4)
        with pytest.raises(ConfigError, match="option `weight_bits`: .* got 9"):
            run(build(NET), weight_bits=9)


def test_a_result_is_one_line_and_shows_itself(result: QuantizeResult) -> None:
    assert re.fullmatch(
        r"<QuantizeResult: 3 layers at \d\.\d\d bits per weight, \d of 3 in integer, "
        r"[\d,]+ bytes of [\d,]+, SQNR \d+\.\d\d dB>",
        repr(result),
    )
    summary = result.summary()
    assert "top-1 (32 samples)" in summary and "layers by bits: " in summary
    assert max(map(len, summary.splitlines()[:5])) <= 100
    assert "learned" in result.summary(verbose=True)
    assert result._repr_html_().startswith("<pre>") and "32 samples" in result._repr_html_()
    assert len(repr(result.plan)) < 200
    assert repr(QuantConfig(weight_bits=4)) == "QuantConfig(weight_bits=4)"


def test_a_result_is_saved(result: QuantizeResult, tmp_path: Path) -> None:
    result.save(tmp_path / "out.onnx")
    assert len(list(ir.load(tmp_path / "out.onnx").graph)) == len(list(result.model.graph))
    with pytest.raises(OutputError, match="does not exist"):
        result.save(str(tmp_path / "missing" / "out.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["array", "mapping", "list", "file"])
def test_evaluation_takes_what_calibration_takes(form: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", x=noise(16), labels=np.arange(16) % 5)
    forms = {
        "array": noise(16),
        "mapping": {"x": noise(16), "labels": np.arange(16) % 5},
        "list": [{"x": noise(8)}, {"x": noise(8)}],
        "file": str(tmp_path / "e.npz"),
    }
    made = quantize(build(NET), noise(), evaluation=forms[form], **FAST)
    assert made.verification is not None
    assert (made.verification.samples, made.verification.held_out) == (16, True)
    assert (made.verification.accuracy is not None) == (form in ("mapping", "file"))


def test_arguments_of_a_wrong_type_are_errors_of_the_package() -> None:
    wrong: list[dict[str, Any]] = [
        {"evaluation": 3}, {"evaluation": iter([])}, {"evaluation": {"x": "text"}},
        {"evaluation": {"x": noise(8), "labels": np.ones(8)}}, {"evaluation": {"z": noise(8)}},
        {"output": 3}, {"preprocess": 3}, {"config": 3},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(AttnRoundError):
            quantize(build(NET), noise(), **FAST, **arguments)
    for means in (4, "4", [4, "x"], []):
        with pytest.raises(ConfigError, match="option `mean_bits`"):
            trade_off(build(NET), noise(), mean_bits=means)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="key 'size'"):
        Preprocess(size=-3)
    with pytest.raises(CalibrationError, match=r"mapping\['labels'\]: got float64"):
        quantize(build(NET), noise(), evaluation=wrong[3]["evaluation"], **FAST)


# --- a dry run says what the run will refuse ----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--target", "qnn"],
        ["--min-sqnr", "20"],
        ["--allocator", "gram", "--mean-bits", "4"],
        ["--mean-bits", "3,4"],
        ["--memory-limit", "1MB"],
        ["--custom-op-library", "missing.so"],
        [],
        ["--target", "openvino"],
    ],
    ids=" ".join,
)
def test_a_dry_run_refuses_what_the_run_refuses(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(build_proto(NET).SerializeToString())
    arguments = [str(path), str(tmp_path / "out.onnx"), *options]
    codes, errors = [], []
    for more in (["--dry-run"], []):
        codes.append(main([*arguments, *more]))
        lines = capsys.readouterr().err.splitlines()
        errors.append([line for line in lines if line.startswith("error: ")])
    assert codes[0] == codes[1] and errors[0] == errors[1]
    assert bool(codes[0]) == (options not in ([], ["--target", "openvino"]))


# --- public and private are told apart by name --------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_name_with_an_underscore_is_used_where_it_is_defined_alone(path: Path) -> None:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            assert [name for name in names if re.match(r"_[^_]", name)] == []
            modules |= set(names) if (node.module or "").startswith("onnx_attnround") else set()
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = re.match(r"_[^_]", node.attr) is not None
            assert not (private and node.value.id in modules), f"{node.value.id}.{node.attr}"
