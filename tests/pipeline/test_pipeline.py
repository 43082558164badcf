"""From model to model: what a whole run makes, promises, refuses and leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from layered_models import LAYERED, layered, noise
from small_models import build, build_proto

import onnx_attnround
from onnx_attnround import (
    QuantConfig,
    QuantizeResult,
    check_model,
    graph,
    make_plan,
    quantize,
    trade_off,
)
from onnx_attnround.errors import (
    AttnRoundError,
    CalibrationError,
    ConfigError,
    GateError,
    ModelError,
    OutputError,
)
from onnx_attnround.records import Event
from onnx_attnround.runtime.session import open_session
from onnx_attnround.verify import Latency

pytestmark = pytest.mark.slow

MODELS = Path(__file__).resolve().parents[2] / "models"
RESNET, MOBILENET = MODELS / "digits_resnet.onnx", MODELS / "digits_mobilenet.onnx"
EVALUATION = MODELS / "digits_eval.npz"
STAGES = ["load", "simplify", "plan", "smooth", "calibrate", "pace"]
STAGES += ["round", "write", "check", "verify"]


def samples(count: int = 64) -> np.ndarray:
    return np.load(MODELS / "digits_calib.npz")["input"][:count]


def config(**options: Any) -> QuantConfig:
    """Fast options, where a test asks for no others."""
    return QuantConfig.parse({"threads": 1, "steps": 30, "observer": "minmax", **options})


@cache
def result_of(model: Path = RESNET, **options: Any) -> QuantizeResult:
    """A run that is not changed afterwards, with 64 samples."""
    return quantize(model, samples(), config(**options))


def serialised(result: QuantizeResult) -> bytes:
    return ir.to_proto(result.model).SerializeToString(deterministic=True)


def sqnr(result: QuantizeResult) -> float:
    assert result.verification is not None
    assert result.verification.worst_output is not None
    assert result.verification.worst_output.sqnr_db is not None
    return result.verification.worst_output.sqnr_db


def ops(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def save_small(folder: Path, name: str = "chain") -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(build_proto(LAYERED[name]), path)
    return path


def small_feed(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


# --- what comes out ---------------------------------------------------------------------


@pytest.mark.parametrize("model", [RESNET, MOBILENET], ids=lambda path: path.stem)
@pytest.mark.parametrize("bits", [3, 4])
def test_learned_rounding_beats_nearest(model: Path, bits: int) -> None:
    learned = sqnr(result_of(model, weight_bits=bits))
    nearest = sqnr(result_of(model, weight_bits=bits, method="nearest"))
    assert learned > nearest + 2


def test_adaround_beats_nearest_and_attention_round_is_no_worse() -> None:
    """The two learned methods end within a decibel: which is ahead the CPU decides."""
    adaround = sqnr(result_of(weight_bits=3, method="adaround"))
    assert adaround > sqnr(result_of(weight_bits=3, method="nearest")) + 6
    assert sqnr(result_of(weight_bits=3)) > adaround - 3


def test_the_result_tells_all_of_the_run() -> None:
    result = result_of(weight_bits=4)
    names = [layer.node for layer in result.plan.layers]
    assert len(names) == 9
    assert list(result.roundings) == list(result.allocation.bits) == names
    assert {r.spec.bits for r in result.roundings.values()} == {4, 8}
    for layer in result.plan.layers:
        assert result.allocation.bits[layer.node] == (8 if layer.first_or_last else 4)
        assert result.roundings[layer.node].spec.bits == result.allocation.bits[layer.node]
    assert result.allocation.mean_bits == 4.0
    assert list(result.seconds) == STAGES
    assert all(seconds >= 0 for seconds in result.seconds.values())
    assert result.verification is not None
    assert result.verification.samples == 64
    assert result.verification.accuracy is None
    assert set(result.verification.layer_sqnr) == set(names)
    assert result.checked.fusion.integer == tuple(names)
    assert result.checked.fusion.integer_share == 1.0
    assert result.checked.findings == ()
    assert result.verification.quantised_bytes < result.verification.float_bytes


def test_the_file_is_the_model_that_was_verified(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = quantize(RESNET, samples(), config(weight_bits=4), output=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    feed = {"input": samples(8)}
    np.testing.assert_array_equal(
        open_session(out, threads=1).run(None, feed)[0],
        open_session(result.model, threads=1).run(None, feed)[0],
    )
    proto = onnx.load(out)
    onnx.checker.check_model(proto, full_check=True)
    before = onnx.load(RESNET)
    assert proto.graph.input == before.graph.input
    assert proto.graph.output == before.graph.output


def test_the_file_says_how_it_was_made() -> None:
    result = result_of(weight_bits=4)
    props = result.model.metadata_props
    assert props["onnx_attnround.version"]
    assert QuantConfig.parse(json.loads(props["onnx_attnround.config"])) == config(weight_bits=4)
    bits = dict(pair.split("=") for pair in props["onnx_attnround.bits"].split())
    assert {node: int(width) for node, width in bits.items()} == result.allocation.bits


@pytest.mark.parametrize(
    ("options", "opset"),
    [
        ({"weight_bits": 8}, 17),
        ({"weight_bits": 4}, 21),
        ({"weight_bits": 4, "weight_storage": "int8"}, 17),
        ({"weight_bits": 4, "weight_storage": "int4"}, 21),
        ({"act_bits": 16}, 21),
    ],
    ids=str,
)
def test_the_opset_is_raised_no_further_than_needed(options: dict[str, Any], opset: int) -> None:
    model = result_of(**options).model
    assert model.opset_imports[""] == opset
    assert ops(model) >= {"Conv", "DequantizeLinear", "QuantizeLinear"}


def test_activations_have_the_bits_that_were_asked_for() -> None:
    by_bits = {bits: result_of(weight_bits=8, act_bits=bits) for bits in (4, 8, 16, 32)}
    for bits, result in by_bits.items():
        assert bits in {spec.bits for spec in result.plan.activations.values()} or bits == 32
    assert by_bits[32].plan.activations == {}
    assert "QuantizeLinear" not in ops(by_bits[32].model)
    assert sqnr(by_bits[4]) < sqnr(by_bits[8]) < sqnr(by_bits[16])
    assert sqnr(by_bits[4]) > 8
    assert sqnr(by_bits[32]) > 35


def test_bits_under_a_budget() -> None:
    result = result_of(mean_bits=4.0)
    assert 3.0 < result.allocation.mean_bits <= 4.0
    assert len(set(result.allocation.bits.values())) > 2
    assert sqnr(result) > sqnr(result_of(weight_bits=3))


def test_bits_by_measured_errors() -> None:
    result = result_of(mean_bits=3.5, allocator="gram")
    assert 3.0 < result.allocation.mean_bits <= 3.5
    assert len(set(result.allocation.bits.values())) > 2
    assert sqnr(result) > sqnr(result_of(weight_bits=3))
    assert list(result.seconds) == [*STAGES[:6], "measure", *STAGES[6:]]
    assert list(result_of(weight_bits=3, allocator="gram").seconds) == STAGES


def test_a_dry_run_leaves_out_bits_that_only_a_run_can_tell() -> None:
    plan, allocation = make_plan(RESNET, config(mean_bits=3.5, allocator="gram"))
    assert allocation.bits == {layer.node: 8 for layer in plan.layers if layer.first_or_last}


def test_layer_bits_by_pattern() -> None:
    result = quantize(
        RESNET, samples(), config(weight_bits=4, layer_bits={"/4/*": 3}, first_last_bits=4)
    )
    for layer in result.plan.layers:
        assert result.allocation.bits[layer.node] == (3 if layer.node.startswith("/4/") else 4)
        assert result.roundings[layer.node].spec.bits == result.allocation.bits[layer.node]


def test_the_wide_layers_are_those_whose_rounding_costs_the_outputs_most() -> None:
    """Of three alike, the first counts a thousandth of the second, and the last less."""
    model = build("""
        g (float[N,12] x) => (float[N,12] y)
        <float[12,12] first, float[12,12] middle, float[12,12] last, float quiet = {0.001}>
        { a = MatMul(x, first)  b = Mul(a, quiet)  s = Add(b, x)  r = Relu(s)
          c = MatMul(r, middle)  e = MatMul(c, last)  f = Mul(e, quiet)  y = Add(c, f) }""")
    node_of = {layer.weight: layer.node for layer in make_plan(model)[0].layers}
    assert set(node_of) == {"first", "middle", "last"}
    feeds = {"x": np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)}
    bits = quantize(model, feeds, config(weight_bits=4)).allocation.bits
    assert bits[node_of["middle"]] == 8
    assert sorted(bits.values()) == [4, 8, 8]  # as many as the first and the last, by position
    assert make_plan(model, config(weight_bits=4))[1].bits[node_of["middle"]] == 4


def test_the_config_may_be_a_mapping() -> None:
    given = {"target": "tensorrt", "exclude": ["*"]}
    for call in (quantize, make_plan, partial(trade_off, calibration=samples(), mean_bits=[4])):
        with pytest.raises(ModelError, match="nothing to quantise"):
            call(RESNET, config=given)
    assert check_model(RESNET, given).target == "tensorrt"


def test_a_dry_run_plans_what_the_run_does() -> None:
    options = {"mean_bits": 5, "first_last_bits": 6}
    plan, allocation = make_plan(str(RESNET), config(**options))
    result = result_of(**options)
    assert plan == result.plan
    assert allocation == result.allocation
    assert make_plan(RESNET)[0].layers[0].weight_spec.bits == 8


# --- the same again ---------------------------------------------------------------------


@pytest.mark.parametrize("model", [RESNET, MOBILENET], ids=lambda path: path.stem)
def test_the_same_run_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    first = result_of(model, weight_bits=4)
    out = tmp_path / "out.onnx"
    again = quantize(str(model), {"input": samples()}, config(weight_bits=4), output=str(out))
    assert serialised(first) == serialised(again)
    once = out.read_bytes()
    if model == RESNET:
        quantize(graph.load(model), samples(), config(weight_bits=4), output=out)
        assert out.read_bytes() == once


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"threads": 2}], ids=str)
def test_batch_size_and_threads_matter_less_than_a_decibel(options: dict[str, Any]) -> None:
    """Sums of another order can break a tie: later layers then answer to another code."""
    whole, parts = result_of(weight_bits=4), result_of(weight_bits=4, **options)
    first = whole.plan.layers[0].node
    np.testing.assert_array_equal(whole.roundings[first].codes, parts.roundings[first].codes)
    for node, rounding in whole.roundings.items():
        other = parts.roundings[node]
        assert (rounding.codes != other.codes).mean() < (0.25 if rounding.spec.bits == 4 else 1)
        assert other.mse_final == pytest.approx(rounding.mse_final, rel=0.1)
    assert sqnr(parts) == pytest.approx(sqnr(whole), abs=1.0)


def test_the_model_given_is_left_as_it_is() -> None:
    model = graph.load(MOBILENET)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = quantize(model, samples(), config(weight_bits=4, steps=2))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert result.model is not model


# --- samples ----------------------------------------------------------------------------


def test_without_samples_the_weights_alone(tmp_path: Path) -> None:
    path, out, events = save_small(tmp_path), tmp_path / "out.onnx", list[Event]()
    result = quantize(path, config=config(weight_bits=4), output=out, on_event=events.append)
    (told,) = [note for note in result.notes if "no calibration samples" in note]
    assert "`calibration`" in told
    assert result.verification is None
    assert result.plan.activations == {}
    assert "QuantizeLinear" not in ops(result.model)
    plain, quantised = (
        open_session(file, threads=1).run(None, {"x": small_feed(5)})[0] for file in (path, out)
    )
    error = np.square(plain - quantised).mean() / plain.var()
    assert 0 < error < 0.05
    stages = [stage for stage in STAGES if stage != "smooth"]
    assert list(result.seconds) == stages
    assert [event.stage for event in events if event.total == 1] == stages


@pytest.mark.parametrize(("count", "few"), [(95, True), (96, False)])
def test_few_samples_are_told(count: int, few: bool, tmp_path: Path) -> None:
    result = quantize(save_small(tmp_path), small_feed(count), config(method="nearest"))
    assert [note.split(":")[0] for note in result.notes if "few" in note] == (
        [f"{count} calibration samples are too few to keep some apart"] if few else []
    )


def test_labels_under_another_name_are_told(tmp_path: Path) -> None:
    held_out = tmp_path / "eval.npz"
    np.savez(held_out, x=small_feed(4), label=np.zeros(4, np.int64))
    result = quantize(
        save_small(tmp_path), small_feed(64), config(method="nearest"), evaluation=held_out
    )
    assert [note for note in result.notes if "no 'labels'; not read: 'label'" in note]


@pytest.mark.parametrize(
    ("act_bits", "spread", "words"),
    [
        (8, (0.4, 0.6), "0.50x at batch 4 on one thread: its layers are too small"),
        (32, (0.4, 0.6), "0.50x at batch 4 on one thread: 0 of 3 layers run in integer"),
        (8, (0.9, 1.1), None),
    ],
)
def test_a_file_that_is_slower_says_so(
    act_bits: int,
    spread: tuple[float, float],
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(*given: Any) -> Latency:
        return Latency(
            batch=4, pairs=3, float_ms=1.0, quantised_ms=2.0, speedup=sum(spread) / 2, spread=spread
        )

    monkeypatch.setattr("onnx_attnround.verify.measure_speed", slow)
    result = quantize(save_small(tmp_path), small_feed(64), config(act_bits=act_bits))
    told = [note for note in result.notes if "slower" in note]
    assert [words in note for note in told] == ([] if words is None else [True])


def write_data_set(folder: Path, number: int) -> None:
    target = folder / f"test_data_set_{number}"
    target.mkdir()
    tensor = onnx.numpy_helper.from_array(small_feed(8, number), "x")
    (target / "input_0.pb").write_bytes(tensor.SerializeToString())


def test_samples_beside_the_model_are_used(tmp_path: Path) -> None:
    path = save_small(tmp_path)
    write_data_set(tmp_path, 0)
    write_data_set(tmp_path, 1)
    beside = quantize(path, config=config(weight_bits=4))
    assert [note for note in beside.notes if "test_data_set_*" in note and "chain.onnx" in note]
    both = np.concatenate([small_feed(8, 0), small_feed(8, 1)])
    given = quantize(path, both, config(weight_bits=4))
    assert not [note for note in given.notes if "test_data_set" in note]
    assert beside.verification is not None
    assert beside.verification.samples == 16
    assert not beside.verification.held_out
    assert serialised(beside) == serialised(given)


def test_too_few_samples_beside_the_model_are_used_only_when_asked_for(tmp_path: Path) -> None:
    path = save_small(tmp_path)
    write_data_set(tmp_path, 0)
    unasked, asked = quantize(path), quantize(path, tmp_path)
    assert "not calibrating with the test_data_set_*" in unasked.notes[0]
    assert not unasked.plan.activations
    assert asked.plan.activations


def test_no_more_samples_than_asked_for(tmp_path: Path) -> None:
    path = save_small(tmp_path)
    few, limited = (quantize(path, small_feed(40)[:n], config(samples=16)) for n in (16, 40))
    assert limited.verification is not None
    assert limited.verification.samples == 16
    assert serialised(few) == serialised(limited)


@pytest.mark.parametrize("labelled", [True, False])
def test_evaluation_with_labels_and_without(tmp_path: Path, labelled: bool) -> None:
    held_out = {key: values[:200] for key, values in np.load(EVALUATION).items()}
    path = tmp_path / "eval.npz"
    np.savez(path, **(held_out if labelled else {"input": held_out["input"]}))
    result = quantize(RESNET, samples(), config(weight_bits=8, steps=2), evaluation=path)
    assert result.verification is not None
    assert result.verification.samples == 200
    accuracy = result.verification.accuracy
    if labelled:
        assert accuracy is not None
        assert accuracy.samples == 200
        assert accuracy.float_top1 > 0.98
        assert accuracy.drop_points < 1
    else:
        assert accuracy is None


def test_evaluation_alone_judges_weights_alone() -> None:
    result = quantize(RESNET, config=config(weight_bits=6), evaluation=EVALUATION)
    assert result.plan.activations == {}
    assert result.verification is not None
    assert result.verification.samples == 600
    assert sqnr(result) > 25


# --- gates and refusals -----------------------------------------------------------------


@pytest.mark.parametrize("gate", [{"min_sqnr": 90.0}, {"max_drop": -1.0}], ids=str)
def test_a_missed_gate_leaves_no_file_but_the_figures(
    tmp_path: Path, gate: Mapping[str, float]
) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before")
    with pytest.raises(GateError) as caught:
        quantize(RESNET, samples(), config(steps=2, **gate), output=out)
    assert caught.value.exit_code == 3
    assert isinstance(caught.value.result, QuantizeResult)
    assert caught.value.result.verification is not None
    assert sqnr(caught.value.result) < 90
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out.onnx": b"before"}


def test_gates_that_are_met(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    quantize(RESNET, samples(), config(steps=2, min_sqnr=20.0, max_drop=1.0), output=out)
    assert out.exists()


def test_what_is_wrong_is_found_before_any_slow_work(tmp_path: Path) -> None:
    copy = tmp_path / "in.onnx"
    copy.write_bytes(RESNET.read_bytes())
    faults: list[tuple[type[AttnRoundError], str, dict[str, Any]]] = [
        (OutputError, "does not exist", {"output": tmp_path / "missing" / "out.onnx"}),
        (OutputError, "is the input model itself", {"output": copy}),
        (OutputError, "is a folder", {"output": tmp_path}),
        (ModelError, "nothing.onnx", {"model": tmp_path / "nothing.onnx"}),
        (CalibrationError, "gate is set", {"calibration": None, "config": config(min_sqnr=9)}),
        (
            CalibrationError,
            "allocator 'gram' measures",
            {"calibration": None, "config": config(mean_bits=4, allocator="gram")},
        ),
        (CalibrationError, "expected", {"calibration": samples()[..., :5]}),
        (CalibrationError, "nowhere", {"calibration": tmp_path / "nowhere.npz"}),
        (CalibrationError, "nowhere", {"evaluation": tmp_path / "nowhere.npz"}),
        (ConfigError, "matches no node", {"config": config(layer_bits={"no_such_node": 4})}),
        (ConfigError, "matches no node", {"config": config(include=["no_such_node"])}),
        (ModelError, "holds no graph", {"model": onnx.ModelProto()}),
        (ModelError, "of type int, expected a path", {"model": 4}),
        (ModelError, "nothing to quantise", {"config": config(exclude=["*"])}),
        (ConfigError, "of type int", {"config": 4}),
        (ConfigError, "unknown option `bits`", {"config": {"bits": 4}}),
    ]
    for kind, words, changes in faults:
        events: list[Event] = []
        arguments = {"model": copy, "calibration": samples(), "config": config(), **changes}
        with pytest.raises(kind, match=words) as caught:
            quantize(**arguments, on_event=events.append)
        assert "\n" not in str(caught.value)
        assert {event.stage for event in events} <= {"load", "simplify", "plan"}
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_a_layer_that_is_left_out_is_named() -> None:
    first = make_plan(RESNET)[0].layers[0].node
    plan, _ = make_plan(RESNET, config(exclude=[first]))
    assert plan.skipped[first] == "matched by exclude"
    assert first not in {layer.node for layer in plan.layers}


# --- models of every shape --------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERED)
def test_models_of_every_shape_go_all_the_way(name: str, tmp_path: Path) -> None:
    model = layered(name)
    feeds = noise(model, 8, seed=1)
    out = tmp_path / "out.onnx"
    result = quantize(model, feeds, config(weight_bits=6), output=out)
    assert result.verification is not None
    assert all(o.sqnr_db is None or o.sqnr_db > 20 for o in result.verification.outputs)
    assert [value.name for value in onnx.load(out).graph.output] == [
        value.name for value in model.graph.outputs
    ]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar", "mobilenetv2_cifar"])
def test_real_models_at_three_bits(name: str, data_dir: Path) -> None:
    """Judged on other images than those that the rounding was learned from."""
    images = np.load(data_dir / "cifar10" / "calib.npz")["images"][:64].astype(np.float32) / 255
    images -= np.float32([0.485, 0.456, 0.406])
    images /= np.float32([0.229, 0.224, 0.225])
    x = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    plain = open_session(path := data_dir / f"{name}.onnx", threads=1)
    wanted = plain.run(None, {"input": x[32:]})[0]
    errors = {}
    for method in ("attention", "nearest"):
        result = quantize(path, x[:32], config(weight_bits=3, steps=10, method=method))
        got = open_session(result.model, threads=1).run(None, {"input": x[32:]})[0]
        errors[method] = np.square(got - wanted).mean() / np.square(wanted).mean()
    assert errors["attention"] < 0.4 * errors["nearest"]
    assert errors["attention"] < 0.3


def test_a_bias_behind_constant_zeros_keeps_its_precision() -> None:
    model = build(
        """g (float[N,3,8,8] x) => (float[N,4,8,8] y)
        <float[4,3,3,3] w0, float[4] b0 = {-100, -100, -100, -100}, float[4,4,3,3] w1, float[4] b1>
        { c = Conv<pads=[1,1,1,1]>(x, w0, b0)  zeros = Relu(c)
          y = Conv<pads=[1,1,1,1]>(zeros, w1, b1) }"""
    )
    result = quantize(model, small_feed(64), config(weight_bits=4, first_last_bits=4))
    assert sqnr(result) > 40  # 8-bit codes of the output give some 48


def test_a_model_without_a_batch_dimension() -> None:
    model = build("g (float[6] x) => (float[3] y) <float[6,6] v, float[6,3] w>"
                  "{ a = MatMul(x, v)  r = Relu(a)  y = MatMul(r, w) }")  # fmt: skip
    feeds = [{"x": row} for row in np.random.default_rng(0).normal(size=(200, 6)).astype("f")]
    result = quantize(model, feeds, config(weight_bits=8))
    assert sqnr(result) > 25


def test_the_public_api_is_what_all_says() -> None:
    for name in onnx_attnround.__all__:
        assert hasattr(onnx_attnround, name)
    assert len(set(onnx_attnround.__all__)) == len(onnx_attnround.__all__)
    assert {"quantize", "make_plan", "QuantConfig", "QuantizeResult"} <= set(onnx_attnround.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onnx_attnround.nothing
