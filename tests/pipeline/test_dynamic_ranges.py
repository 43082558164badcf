"""Ranges that are found in each run: what is written, how it runs, and how good it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build, run

from onnx_attnround import GateError, QuantConfig, QuantizeResult, quantize
from onnx_attnround.check import check
from onnx_attnround.qdq.arithmetic import dynamically
from onnx_attnround.records import Array
from onnx_attnround.targets import get_target

ENCODER = """
    g (float[N,T,16] x) => (float[N,T,16] y)
    <float[16,16] wq, float[16,16] wk, float[16] bq, float[16,32] w1, float[32] b1, float[32,16] w2>
    { q = MatMul(x, wq)  qb = Add(q, bq)  k = MatMul(x, wk)
      t = Mul(qb, k)  h = MatMul(t, w1)  hb = Add(h, b1)  r = Tanh(hb)
      o = MatMul(r, w2)  y = Add(o, x) }"""
FIXED = ENCODER.replace("float[N,T,", "float[1,5,")
SETTINGS = {"threads": 1, "activations": "dynamic", "holdout": 0.0, "smooth": "never"}


def uneven(count: int, seed: int = 0) -> Array:
    """Samples ``[count, 5, 16]`` that are large or small by a factor of hundreds."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0.0, 2.0, (count, 1, 1)))
    return (rng.normal(size=(count, 5, 16)) * size).astype(np.float32)


@pytest.fixture(scope="module")
def result() -> QuantizeResult:
    return quantize(build(ENCODER), uneven(48), QuantConfig.parse(SETTINGS))


def error_db(model: ir.Model, result: QuantizeResult, samples: Array) -> float:
    """The mean over samples of the output's error, each against its own power, in dB."""
    logs = []
    for sample in samples:
        feeds = {"x": sample[None]}
        (wanted,), (got,) = run(model, feeds), run(result.model, feeds)
        logs.append(np.log10(np.square(got - wanted).sum() / np.square(wanted).sum()))
    return 10 * float(np.mean(logs))


def test_all_layers_run_in_integer_and_no_rule_is_broken(result: QuantizeResult) -> None:
    ops = [node.op_type for node in result.model.graph]
    assert ops.count("DynamicQuantizeLinear") == 3
    assert "QuantizeLinear" not in ops
    assert len(result.checked.fusion.integer) == 4
    assert result.checked.findings == ()
    assert result.checked.fits_int16 is True


def test_signed_codes_of_other_tensors_do_no_harm() -> None:
    settings = {**SETTINGS, "target": "ort-arm", "method": "nearest"}
    result = quantize(build(ENCODER), uneven(24), QuantConfig.parse(settings))
    assert len(result.checked.fusion.integer) == 4
    assert result.checked.findings == ()


def test_known_shapes_run_in_integer_too() -> None:
    samples = uneven(24)
    result = quantize(build(FIXED), samples, QuantConfig.parse(SETTINGS))
    assert len(result.checked.fusion.integer) == 4
    assert result.checked.findings == ()


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0, 30.0])
def test_the_emulation_is_what_the_nodes_give(shift: float) -> None:
    model = build("""
        g (float[N,16] x) => (float[N,16] y)
        { c, s, z = DynamicQuantizeLinear(x)  y = DequantizeLinear(c, s, z) }""")
    x = np.random.default_rng(0).normal(shift, 1.0, (32, 16)).astype(np.float32)
    (expected,) = run(model, {"x": x})
    step = np.ptp(np.append(x, 0)) / 255
    assert np.abs(dynamically(x) - expected).max() < 1e-4 * step


def test_samples_of_other_sizes_keep_their_precision(result: QuantizeResult) -> None:
    model = build(ENCODER)
    static = quantize(model, uneven(48), QuantConfig.parse({**SETTINGS, "activations": "static"}))
    unseen = uneven(48, seed=1)
    assert error_db(model, result, unseen) < error_db(model, static, unseen) - 6.0


def test_it_says_that_results_depend_on_the_batch(result: QuantizeResult) -> None:
    assert any(
        note.startswith("4 layers find the range of their input in each run")
        for note in result.notes
    )
    batch = uneven(8)
    small = int(np.abs(batch).max((1, 2)).argmin())
    (alone,) = run(result.model, {"x": batch[small : small + 1]})
    (beside,) = run(result.model, {"x": batch})
    assert not np.allclose(alone[0], beside[small], rtol=0.01)


def test_figures_are_those_of_single_samples(result: QuantizeResult) -> None:
    model, samples = build(ENCODER), uneven(48)
    pairs = [(run(model, {"x": x[None]})[0], run(result.model, {"x": x[None]})[0]) for x in samples]
    wanted, got = (np.concatenate(each).astype(np.float64) for each in zip(*pairs, strict=True))
    ratio = np.square(wanted).sum() / np.square(wanted - got).sum()
    assert result.verification is not None
    assert result.verification.outputs[0].sqnr_db == pytest.approx(10 * np.log10(ratio), abs=0.1)


def test_rounding_sees_what_the_file_computes(result: QuantizeResult) -> None:
    """The layer has no bias, so that the error that was foreseen is that of the file."""
    model = build(ENCODER)
    (layer,) = (layer for layer in result.plan.layers if layer.y == "o")
    inner = [each.clone() for each in (model, result.model)]
    for each in inner:
        value = ir.convenience.create_value_mapping(each.graph)["o"]
        each.graph.outputs.append(value)
    pairs = [[run(each, {"x": x[None]})[1] for each in inner] for x in uneven(48)]
    wanted, got = (np.concatenate(each).reshape(-1, 16) for each in zip(*pairs, strict=True))
    error = np.square(wanted - got).mean(0).sum() / wanted.var(0).sum()
    assert result.roundings[layer.node].mse_final == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [{"weight_bits": 4}, pytest.param({"reconstruct": "block"}, marks=pytest.mark.slow)],
)
def test_few_bits_and_blocks(settings: dict[str, object]) -> None:
    config = QuantConfig.parse({**SETTINGS, **settings})
    result = quantize(build(ENCODER), uneven(8), config)
    assert len(result.checked.fusion.integer) == 4
    assert result.verification is not None
    assert result.verification.outputs[0].sqnr_db > 15.0


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    config = QuantConfig.parse({**SETTINGS, "work_dir": tmp_path / "work"})
    first = quantize(build(ENCODER), uneven(48), config, output=tmp_path / "first.onnx")
    again = quantize(build(ENCODER), uneven(48), config, output=tmp_path / "again.onnx")
    assert first.plan == again.plan
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_a_gemm_of_such_codes_is_named_with_the_reason() -> None:
    model = build("""
        g (float[N,2] x) => (float[N,2] y)
        <int8[2,2] w = {1, 2, 3, 4}, float s = {0.1}, int8 z = {0}, float[2] b>
        { c, cs, cz = DynamicQuantizeLinear(x)  d = DequantizeLinear(c, cs, cz)
          v = DequantizeLinear(w, s, z)  y = Gemm(d, v, b) }""")
    checked = check(model, get_target("ort"))
    assert list(checked.fusion.fallen.values()) == [
        "the range of its input is found in each run, and ONNX Runtime multiplies such codes in "
        "MatMul alone: give it a fixed scale"
    ]


def test_other_targets_are_told_that_such_a_file_computes_in_float(result: QuantizeResult) -> None:
    checked = check(result.model, get_target("tensorrt"))
    assert checked.refused
    assert {why.split(":")[0] for why in checked.fusion.fallen.values()} == {
        "the range of its input is found in each run"
    }


WIDE = """
    g (float[N,T,16] x) => (float[N,T,16] y)
    <float[16,128] wq, float[16,128] wk, float[128,128] w1, float[128,16] w2>
    { q = MatMul(x, wq)  k = MatMul(x, wk)  t = Mul(q, k)  h = MatMul(t, w1)
      r = Tanh(h)  o = MatMul(r, w2)  y = Add(o, x) }"""
ALIKE = """
    g (float[N,T,16] x) => (float[N,T,128] y)
    <float[16,128] w1, float[128,128] w2> { h = MatMul(x, w1)  r = Sin(h)  y = MatMul(r, w2) }"""
AUTO = {**SETTINGS, "activations": "auto"}


def test_auto_takes_ranges_of_each_run_where_samples_are_uneven() -> None:
    result = quantize(build(WIDE), uneven(48), QuantConfig.parse(AUTO))
    assert result.plan.dynamic == ("x/parted", "t")
    assert any("dB off the error of the outputs" in note for note in result.notes)
    # Each element of what the last layer reads serves 16 products: too few for one more search.
    assert not any(layer.x in result.plan.dynamic for layer in result.plan.layers if layer.y == "o")


def test_auto_keeps_fixed_ranges_where_samples_are_alike() -> None:
    even = np.random.default_rng(0).uniform(-3.0, 3.0, (48, 40, 16)).astype(np.float32)
    result = quantize(build(ALIKE), even, QuantConfig.parse(AUTO))
    assert result.plan.dynamic == ()
    assert not any("in each run" in note for note in result.notes)


def test_auto_leaves_targets_alone_that_do_not_multiply_so() -> None:
    settings = {**AUTO, "target": "openvino"}
    assert quantize(build(WIDE), uneven(24), QuantConfig.parse(settings)).plan.dynamic == ()


def test_what_auto_chose_is_kept_for_the_next_run(tmp_path: Path) -> None:
    config = QuantConfig.parse({**AUTO, "work_dir": tmp_path / "work", "min_sqnr": 90.0})
    found = []
    for _ in range(2):
        with pytest.raises(GateError) as missed:
            quantize(build(WIDE), uneven(48), config)
        found.append(missed.value.result)
    assert found[0].plan.dynamic == found[1].plan.dynamic != ()
    assert any("dynamic 1" in note for note in found[1].notes)
