"""verify: figures against their definition, and failures against their error."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from choosing_models import choosing
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build, run

from onnx_attnround import graph
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import CalibrationError, GateError, ModelError, OutputError
from onnx_attnround.records import Event, LayerPlan, QuantSpec
from onnx_attnround.samples import Samples, open_samples
from onnx_attnround.simplify import simplify
from onnx_attnround.verify import (
    Accuracy,
    Latency,
    OutputComparison,
    Verification,
    check_gates,
    speed,
    verify,
)
from onnx_attnround.verify.compare import OutputSums

TWO_LAYERS = """
net (float[N, 4] x) => (float[N, 3] scores)
<float[4, 5] w1, float[5, 3] w2>
{
    [first] hidden = MatMul(x, w1)
    active = Relu(hidden)
    [second] scores = MatMul(active, w2)
}
"""

INTEGER = """
net (float[N, 4] x) => (float[N, 2] scores)
<
    float sx = {0.05}, uint8 zx = {128}, float sw = {0.25}, int8 zw = {0}, float one = {1.0},
    int8[4, 2] w1 = {1, -2, 3, 4, -5, 6, 7, 0}, int8[2, 2] w2 = {1, 2, -3, 4}
>
{
    xq = QuantizeLinear(x, sx, zx)
    xd = DequantizeLinear(xq, sx, zx)
    w1d = DequantizeLinear(w1, sw, zw)
    [first] hidden_raw = MatMul(xd, w1d)
    hidden_q = QuantizeLinear(hidden_raw, sx, zx)
    hidden = DequantizeLinear(hidden_q, sx, zx)
    w2d = DequantizeLinear(w2, sw, zw)
    root = Abs(hidden)
    [second] scores = MatMul(root, w2d)
}
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings need not be good here."""
    monkeypatch.setattr(speed, "LATENCY_SECONDS", 0.0)


def scaled(factor: str, outputs: str = "float[N, 3] y") -> ir.Model:
    """``y = factor * x``."""
    return build(
        f"net (float[N, 3] x) => ({outputs}) <float f = {{{factor}}}> {{ [mul] y = Mul(x, f) }}"
    )


def noise(model: ir.Model, count: int, seed: int = 0) -> Samples:
    """``count`` samples of normal noise."""
    rng = np.random.default_rng(seed)
    specs = graph.input_specs(model)
    arrays = {
        spec.name: rng.normal(size=(count, *(dim or 2 for dim in spec.shape[1:]))).astype(
            spec.dtype
        )
        for spec in specs
    }
    return open_samples(arrays, specs)


def layer(node: str, y: str) -> LayerPlan:
    """A planned layer; only its names matter here."""
    return LayerPlan(
        node=node,
        op_type="MatMul",
        x="x",
        y=y,
        weight="w",
        bias=None,
        weight_shape=(4, 3),
        weight_spec=QuantSpec(bits=8, signed=True, symmetric=True),
    )


def scores_of(model: ir.Model, samples: Samples, name: str) -> np.ndarray:
    """All outputs ``name``, in float64, from numpy's own reading of ``INTEGER``-free graphs."""
    weights = {key: graph.tensor_value(model, key).astype(np.float64) for key in ("w1", "w2")}
    (feed,) = samples.batches(samples.count)
    hidden = feed["x"].astype(np.float64) @ weights["w1"]
    return hidden if name == "hidden" else np.maximum(hidden, 0) @ weights["w2"]


def perturbed(model: ir.Model, name: str, steps: int = 2) -> ir.Model:
    """A copy with one weight rounded to so many steps of one."""
    result = model.clone()
    value = result.graph.initializers[name]
    array = graph.tensor_value(model, name)
    value.const_value = ir.tensor((np.round(array * steps) / steps).astype(np.float32), name=name)
    return result


def test_a_tenth_too_large_is_twenty_decibels() -> None:
    samples = noise(scaled("1.0"), 50)
    found = verify(scaled("1.0"), scaled("1.1"), samples)
    (output,) = found.outputs
    largest = max(float(np.abs(feed["x"]).max()) for feed in samples.batches(50))
    assert output.name == "y"
    assert output.sqnr_db == pytest.approx(20.0, abs=1e-4)
    assert output.max_abs_error == pytest.approx(0.1 * largest, rel=1e-5)
    assert output.agreement == 1.0
    assert found.samples == 50
    assert found.accuracy is None


def test_equal_models_have_infinite_sqnr_and_agree() -> None:
    model = build(TWO_LAYERS)
    found = verify(model, model.clone(), noise(model, 20))
    (output,) = found.outputs
    assert (output.name, output.sqnr_db, output.max_abs_error) == ("scores", math.inf, 0.0)
    assert (output.agreeing, output.judged, output.frozen) == (20, 20, 0.0)
    assert output.correlation == pytest.approx(1.0)
    assert (output.lost_extreme, output.collapsed) == (None, None)


def test_figures_follow_their_definition_over_all_batches() -> None:
    model = build(TWO_LAYERS)
    quantised, samples = perturbed(model, "w1"), noise(model, 75)
    labels = np.arange(75) % 3
    found = verify(model, quantised, samples, basis="evaluation", labels=labels)
    expected, got = scores_of(model, samples, "scores"), scores_of(quantised, samples, "scores")
    sqnr = 10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum())
    (output,) = found.outputs
    assert output.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    assert output.agreeing == (expected.argmax(1) == got.argmax(1)).sum()
    assert output.judged == 75
    assert found.accuracy == Accuracy(
        samples=75,
        float_correct=int((expected.argmax(1) == labels).sum()),
        quantised_correct=int((got.argmax(1) == labels).sum()),
        flipped=int(((expected.argmax(1) == labels) != (got.argmax(1) == labels)).sum()),
    )


def test_layers_are_compared_by_name_and_lost_names_are_listed() -> None:
    model = build(TWO_LAYERS)
    quantised, samples = perturbed(model, "w1"), noise(model, 40)
    plans = [layer("first", "hidden"), layer("second", "scores"), layer("third", "gone")]
    found = verify(model, quantised, samples, layers=(model, plans))
    expected, got = scores_of(model, samples, "hidden"), scores_of(quantised, samples, "hidden")
    sqnr = 10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum())
    assert found.layer_sqnr["first"] == pytest.approx(sqnr, abs=1e-3)
    assert found.layer_sqnr["second"] == pytest.approx(found.outputs[0].sqnr_db, abs=1e-3)
    assert found.not_compared == ("third",)


@pytest.mark.parametrize(
    "behind",
    [
        "y = BatchNormalization(c, gamma, beta, mean, variance)",
        "s = Mul(c, forty) y = Relu(s)",
        "n = BatchNormalization(c, gamma, beta, mean, variance) s = Mul(n, forty) y = Abs(s)",
    ],
)
def test_layers_are_compared_as_they_are_once_factors_are_folded(behind: str) -> None:
    model = build(
        f"""net (float[N, 3, 6, 6] x) => (float[N, 4, 4, 4] y)
        <float[4, 3, 3, 3] w, float[4] beta, float[4] mean, float[4] variance,
         float[4] gamma = {{20.0, 30.0, 40.0, 50.0}}, float forty = {{40.0}}>
        {{ [conv] c = Conv(x, w) {behind} }}"""
    )
    simplified, _ = simplify(model)
    conv = next(node for node in simplified.graph if node.op_type == "Conv")
    weight, name = conv.inputs[1], conv.outputs[0].name or ""
    assert weight is not None and weight.name is not None
    quantised = perturbed(simplified, weight.name)
    samples = noise(model, 40)
    found = verify(model, quantised, samples, layers=(simplified, [layer(conv.name or "", name)]))
    (feed,) = samples.batches(40)
    expected, got = (
        run(graph.with_outputs(each, [name]), feed)[-1] for each in (simplified, quantised)
    )
    sqnr = 10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum())
    assert found.layer_sqnr[conv.name or ""] == pytest.approx(sqnr, abs=1e-2)
    assert sqnr > 15


def test_only_the_first_samples_are_run_unless_there_is_an_evaluation_set() -> None:
    model = scaled("1.0")
    samples = noise(model, 300)
    assert verify(model, scaled("1.1"), samples).samples == 256
    assert verify(model, scaled("1.1"), samples, basis="held out").samples == 300
    assert verify(model, scaled("1.1"), samples, basis="evaluation").samples == 300


def test_a_static_batch_is_kept_to() -> None:
    def model(factor: str) -> ir.Model:
        return build(
            f"net (float[8, 3] x) => (float[8, 3] y) <float f = {{{factor}}}> {{ y = Mul(x, f) }}"
        )

    samples = noise(model("1.0"), 20)
    found = verify(
        model("1.0"), model("1.1"), samples, basis="evaluation", labels=np.zeros(20, int)
    )
    assert found.samples == 16
    assert found.latency.batch == 8
    assert found.accuracy is not None
    assert found.accuracy.samples == 16


def test_latency_and_sizes_are_measured(tmp_path: Path) -> None:
    model = build(TWO_LAYERS)
    graph.save(model, tmp_path / "float.onnx")
    found = verify(model, perturbed(model, "w2"), noise(model, 20))
    assert found.latency.batch == 16
    assert found.latency.pairs == 3
    assert 0 < found.latency.float_ms < 1000
    low, high = found.latency.spread
    assert 0 < low <= found.latency.speedup <= high
    assert found.float_bytes == (tmp_path / "float.onnx").stat().st_size


def test_single_samples_are_timed_where_a_batch_takes_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(TWO_LAYERS)
    samples = noise(model, 20)
    monkeypatch.setattr("onnx_attnround.verify.speed.LONGEST", 0.0)
    assert verify(model, perturbed(model, "w2"), samples).latency.batch == 1


def test_progress_ends_at_its_total() -> None:
    model = build(TWO_LAYERS)
    events: list[Event] = []
    verify(model, model, noise(model, 70), layers=(model, [layer("first", "hidden")]),
           on_event=events.append)  # fmt: skip
    assert {event.stage for event in events} == {"verify"}
    assert {event.detail for event in events} == {"outputs", "layers", "latency"}
    assert [event.done for event in events] == sorted({event.done for event in events})
    assert events[-1].done == events[-1].total


def test_nan_is_an_error_unless_the_float_model_has_it_too() -> None:
    text = """net (float[N, 3] x) => (float[N, 3] y) <float f = {FACTOR}> {
        g = Mul(x, f)
        y = Sqrt(g) }"""
    positive, negative = build(text.replace("FACTOR", "1.0")), build(text.replace("FACTOR", "-1.0"))
    samples = open_samples(np.ones((4, 3), np.float32), graph.input_specs(positive))
    with pytest.raises(OutputError, match=r"tensor 'y' .* got 12 NaN or infinite elements of 12"):
        verify(positive, negative, samples)
    found = verify(negative, negative, samples)
    assert found.outputs[0].sqnr_db == math.inf


def test_a_quantised_model_that_does_not_load_is_an_output_error() -> None:
    broken = build("net (float[N, 3] x) => (float[N, 3] y) { y = own.Nowhere(x) }")
    with pytest.raises(OutputError, match="the quantised model: ONNX Runtime cannot load"):
        verify(scaled("1.0"), broken, noise(broken, 4))
    with pytest.raises(ModelError, match="the float model: ONNX Runtime cannot load"):
        verify(broken, scaled("1.0"), noise(broken, 4))


def test_a_quantised_model_that_does_not_run_is_an_output_error() -> None:
    broken = build(
        """net (float[N, 3] x) => (float[N, 3] y) <int64[2] shape = {-1, 7}> {
        y = Reshape(x, shape) }"""
    )
    with pytest.raises(OutputError, match="cannot run the quantised model"):
        verify(scaled("1.0"), broken, noise(broken, 4))


def test_other_outputs_are_an_output_error() -> None:
    other = build("net (float[N, 3] x) => (float[N, 3] z) { z = Abs(x) }")
    with pytest.raises(OutputError, match="got z, expected y"):
        verify(scaled("1.0"), other, noise(other, 4))
    wider = build("net (float[N, 3] x) => (float[N, M] y) { y = Concat<axis = 1>(x, x) }")
    with pytest.raises(OutputError, match=r"tensor 'y' .* got shape \[4, 6\], expected \[4, 3\]"):
        verify(scaled("1.0"), wider, noise(wider, 4))


CHOSEN = "compared on what the float model chooses and draws"


@pytest.mark.parametrize(
    ("name", "node", "what"),
    [
        ("top rows", "TopK", CHOSEN),
        ("above a threshold", "Greater", CHOSEN),
        ("suppressed", "NonMaxSuppression", CHOSEN),
        ("looked up", "ArgMax", CHOSEN),
        ("as long as it says", "Range", CHOSEN),
        ("branches", "Greater", CHOSEN),
        ("noise", "RandomNormalLike", CHOSEN),
        ("decides in a loop", "Loop", "not compared"),
        ("dropout in training", "Dropout", "not compared"),
    ],
)
def test_rows_chosen_by_data_are_compared_on_the_choices_of_the_float_model(
    name: str, node: str, what: str
) -> None:
    model = choosing(name)
    quantised = perturbed(model, "w0", 4)
    quantised.graph.node("first").name = "other"  # whose outputs so count as changed
    planned = [layer("second", "y")]
    found = verify(model, quantised, noise(model, 20), layers=(model, planned))
    (note,) = found.notes
    assert f"'y', since {node} '{node}_0' may choose or draw otherwise" in note
    assert note.endswith(what)
    assert found.layer_sqnr["second"] > 10
    if what == CHOSEN:
        (output,) = found.outputs
        assert output.sqnr_db is not None
        assert output.sqnr_db > 10
        assert found.not_compared == ()
    else:
        assert found.outputs == ()
        assert found.not_compared == ("y",)


def test_choices_as_outputs_are_compared_as_they_are() -> None:
    """Nothing is taken from the float model where an output has the same place in both."""
    model = build("""net (float[N, 4] x) => (int64[N, 1] best, float[N, 2] top) <
        float[4, 4] w0, int64[1] k = {2}> {
        [first] h = MatMul(x, w0)
        best = ArgMax<axis = 1>(h)
        top, index = TopK<axis = 1>(h, k) }""")
    quantised = perturbed(model, "w0", 1)
    quantised.graph.node("first").name = "other"
    found = verify(model, quantised, noise(model, 200))
    assert found.notes == ()
    best, top = found.outputs
    assert best.agreement is not None
    assert 0.5 < best.agreement < 1
    assert top.sqnr_db is not None


def test_integer_outputs_are_judged_by_equality() -> None:
    def model(factor: str) -> ir.Model:
        return build(
            f"""net (float[N, 3] x) => (int64[N, 1] best) <float f = {{{factor}}}> {{
            y = Mul(x, f)
            best = ArgMax<axis = 1>(y) }}"""
        )

    samples = noise(model("1.0"), 30)
    (same,) = verify(model("1.0"), model("2.0"), samples).outputs
    (other,) = verify(model("1.0"), model("-1.0"), samples).outputs
    assert (same.sqnr_db, same.agreement, same.judged) == (None, 1.0, 30)
    assert other.agreement == 0.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(19, int), r"got int64 of shape \[19\], expected integers of shape \[20\]"),
        (np.zeros(21, int), r"got int64 of shape \[21\]"),
        (np.zeros(20), "got float64"),
        (np.zeros((20, 1), int), r"shape \[20, 1\]"),
        (np.full(20, 3), "got values 3 to 3, expected 0 to 2"),
        (np.full(20, -1), "got values -1 to -1"),
    ],
)
def test_labels_that_do_not_fit(labels: np.ndarray, message: str) -> None:
    samples = noise(scaled("1.0"), 20)
    with pytest.raises(CalibrationError, match=message):
        verify(scaled("1.0"), scaled("1.0"), samples, basis="evaluation", labels=labels)


def test_labels_need_class_scores_and_samples() -> None:
    model = build("net (float[N, 3, 2] x) => (float[N, 3, 2] y) { y = Abs(x) }")
    samples, labels = noise(model, 6), np.zeros(6, int)
    with pytest.raises(CalibrationError, match="no output of y holds class scores"):
        verify(model, model, samples, basis="evaluation", labels=labels)
    with pytest.raises(CalibrationError, match="without evaluation samples"):
        verify(model, model, samples, labels=labels)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_sums_do_not_depend_on_how_samples_are_batched(
    seed: int, lengths: list[int], columns: int
) -> None:
    rng = np.random.default_rng(seed)
    expected = rng.normal(size=(sum(lengths), columns)).astype(np.float32)
    got = (expected + 0.1 * rng.normal(size=expected.shape)).astype(np.float32)
    whole, parts = OutputSums("y"), OutputSums("y")
    whole.add(expected, got, None, len(expected))
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        parts.add(expected[rows], got[rows], None, length)
        start += length
    one, many = whole.result(), parts.result()
    assert many.sqnr_db == pytest.approx(one.sqnr_db, rel=1e-9)
    assert (many.sqnr_error_db or 0.0) == pytest.approx(one.sqnr_error_db or 0.0, rel=1e-9)
    assert (many.correlation or 0.0) == pytest.approx(one.correlation or 0.0, abs=1e-6)
    assert (many.collapsed is None) == (one.collapsed is None)
    assert len(many.worst_slices) == len(one.worst_slices)
    summed = {
        "sqnr_db": None,
        "sqnr_error_db": None,
        "correlation": None,
        "worst_slices": (),
        "collapsed": None,
    }
    assert replace(many, **summed) == replace(one, **summed)


def verification(**changes: object) -> Verification:
    """Figures that miss no gate in the tests below, unless changed."""
    figures = {
        "samples": 100,
        "basis": "evaluation",
        "outputs": (
            OutputComparison(name="a", sqnr_db=30.0, max_abs_error=0.1, agreeing=98, judged=100),
            OutputComparison(name="b", sqnr_db=20.0, max_abs_error=0.1),
        ),
        "accuracy": None,
        "layer_sqnr": {},
        "not_compared": (),
        "latency": Latency(
            batch=16, pairs=3, float_ms=2.0, quantised_ms=1.0, speedup=2.0, spread=(1.9, 2.1)
        ),
        "float_bytes": 400,
        "quantised_bytes": 100,
    }
    return Verification(**{**figures, **changes})


def test_gates_that_are_met_or_unset_pass() -> None:
    check_gates(verification(), QuantConfig())
    check_gates(verification(), QuantConfig(min_sqnr=20.0, max_drop=2.0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"min_sqnr": 20.5}, "SQNR of output 'b' is 20.00 dB, below `min_sqnr` 20.5"),
        ({"max_drop": 1.9}, "disagreement with float is 2.00 points, above `max_drop` 1.9"),
        ({"min_sqnr": 25, "max_drop": 1}, "below `min_sqnr` 25; disagreement"),
    ],
)
def test_a_missed_gate_is_named_with_its_figure(config: dict[str, float], message: str) -> None:
    with pytest.raises(GateError, match=message) as raised:
        check_gates(verification(), QuantConfig(**config))
    assert "\n" not in str(raised.value)


def test_top1_decides_where_there_are_labels_and_a_drop_at_the_gate_passes() -> None:
    found = verification(
        accuracy=Accuracy(samples=10_000, float_correct=8_800, quantised_correct=8_700)
    )
    check_gates(found, QuantConfig(max_drop=1.0))
    with pytest.raises(GateError, match="loss of top-1 is 1.00 points, above `max_drop` 0.99"):
        check_gates(found, QuantConfig(max_drop=0.99))


def test_a_gain_misses_no_gate() -> None:
    gain = Accuracy(samples=10, float_correct=8, quantised_correct=9)
    check_gates(verification(accuracy=gain), QuantConfig(max_drop=0.0))


def test_a_gate_that_cannot_be_judged_is_missed() -> None:
    found = verification(outputs=(OutputComparison(name="y", sqnr_db=None, max_abs_error=0.0),))
    with pytest.raises(GateError, match="`min_sqnr` 5 cannot be judged"):
        check_gates(found, QuantConfig(min_sqnr=5))
    with pytest.raises(GateError, match="`max_drop` 5 cannot be judged"):
        check_gates(found, QuantConfig(max_drop=5))


@pytest.mark.parametrize("masked", [False, True])
def test_the_standard_error_is_how_much_the_sqnr_of_other_samples_differs(masked: bool) -> None:
    rng = np.random.default_rng(3)

    def sums(samples: int) -> OutputSums:
        found = OutputSums("y")
        for _ in range(samples // 4):
            expected = rng.normal(size=(4, 6, 5)) * rng.gamma(1.0, size=(4, 1, 1))
            got = expected + rng.normal(size=expected.shape) * rng.gamma(0.5, size=(4, 1, 1))
            found.add(expected, got, rng.random((4, 6)) < 0.7 if masked else None, 4)
        return found

    told = [sums(80) for _ in range(200)]
    spread = np.std([each.sqnr_db for each in told])
    assert np.mean([each.sqnr_error_db for each in told]) == pytest.approx(spread, rel=0.3)


def test_a_single_sample_and_an_exact_output_have_no_standard_error() -> None:
    x = np.arange(6.0).reshape(2, 3) + 1
    single, exact = OutputSums("y"), OutputSums("y")
    single.add(x[:1], x[:1] + 0.1, None, 1)
    exact.add(x, x, None, 2)
    assert single.sqnr_error_db is None
    assert exact.sqnr_error_db is None
