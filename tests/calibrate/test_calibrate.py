from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_attnround import calibrate as module
from onnx_attnround.calibrate import OBSERVERS, Calibration, calibrate
from onnx_attnround.calibrate.observers import BINS, Histogram, MeanSquare, MinMax, Percentile
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import CalibrationError, ModelError
from onnx_attnround.qdq.arithmetic import dequantize, params_from_range, quantize
from onnx_attnround.records import Event, InputSpec, QuantSpec, TensorStats
from onnx_attnround.samples import open_samples
from onnx_attnround.samples.preprocess import PREPROCESS

U8 = QuantSpec(bits=8, signed=False, symmetric=False)
SPECS = [
    U8,
    QuantSpec(bits=4, signed=False, symmetric=False),
    QuantSpec(bits=8, signed=True, symmetric=True, limit=64),
    QuantSpec(bits=8, signed=False, symmetric=True),
    QuantSpec(bits=2, signed=True, symmetric=True),
    QuantSpec(bits=16, signed=True, symmetric=False),
]
FLOATS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(0, 5)),
    elements=st.floats(-(2.0**120), 2.0**120, width=32) | st.floats(-9, 9, width=32),
)


def observed(name: str, *batches: np.ndarray):
    observer = OBSERVERS[name]()
    for batch in batches:
        observer.update(batch)
    return observer


def same(got: TensorStats, expected: TensorStats) -> None:
    np.testing.assert_equal(asdict(got), asdict(expected))


def grid_of(spec: QuantSpec, lo: float, hi: float):
    params = params_from_range(spec, lo, hi)
    return float(params.scale), int(params.zero_point)


def error_of(x: np.ndarray, spec: QuantSpec, lo: float, hi: float) -> float:
    scale, zero = grid_of(spec, lo, hi)
    codes = quantize(x.astype(np.float64), scale, zero, spec.qmin, spec.qmax)
    return float(np.mean((dequantize(codes, scale, zero) - x) ** 2))


def laplace(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).laplace(size=shape).astype(np.float32)


# --- the contract of every observer ------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVERS)
@settings(deadline=None, max_examples=12)
@given(x=FLOATS, cut=st.integers(0, 6))
def test_split_equals_joined_and_range_is_within_the_extrema(name, x, cut) -> None:
    whole = observed(name, x)
    split = observed(name, x[:cut], x[cut:])
    rows = observed(name, *x[:, None])
    for spec in SPECS:
        lo, hi = whole.range(spec)
        assert split.range(spec) == rows.range(spec) == (lo, hi)
        assert min(x.min(initial=0), 0) <= lo <= 0 <= hi <= max(x.max(initial=0), 0)
    same(split.stats("t"), whole.stats("t"))
    same(rows.stats("t"), whole.stats("t"))


@pytest.mark.parametrize("name", OBSERVERS)
def test_split_equals_joined_where_elements_are_sampled(name: str) -> None:
    x = laplace(7, 3, 41, 43) * np.geomspace(1e-6, 1e3, 7, dtype=np.float32)[:, None, None, None]
    whole, rows = observed(name, x), observed(name, x[:2], x[2:3], x[3:])
    assert [whole.range(spec) for spec in SPECS] == [rows.range(spec) for spec in SPECS]
    same(rows.stats("t"), whole.stats("t"))
    assert whole.stats("t").count == x.size


@pytest.mark.parametrize("name", OBSERVERS)
def test_memory_is_bounded(name: str) -> None:
    def held(observer: object) -> int:
        values = vars(observer).values()
        return sum(v.nbytes if isinstance(v, np.ndarray) else sys.getsizeof(v) for v in values)

    observer = observed(name, laplace(2, 5000))
    before = held(observer)
    for factor in (1e-9, 1, 1e9):
        observer.update(laplace(50, 5000) * np.float32(factor))
    assert held(observer) <= before + 64
    assert before < 1 << 16


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-30, -1e30])
def test_constants(name: str, value: float) -> None:
    x = np.full((3, 10), value, np.float32)
    for spec in SPECS[:3]:
        lo, hi = observed(name, x).range(spec)
        assert (lo, hi) == (min(x[0, 0], 0), max(x[0, 0], 0))


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize(
    "x", [np.zeros((0, 3)), np.zeros((4, 0)), np.array(2.5), np.array([2.5]), np.float32(2.5)]
)
def test_empty_and_single_elements(name: str, x: np.ndarray) -> None:
    x = np.asarray(x, np.float32)
    observer = observed(name, x)
    assert observer.range(U8) == (0.0, 2.5 if x.size else 0.0)
    assert observer.stats("t").count == x.size


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_raise(name: str, bad: float) -> None:
    x = laplace(4, 5000)
    x[3, 4321] = bad
    with pytest.raises(CalibrationError, match="holds NaN or Inf"):
        observed(name, x)


@pytest.mark.parametrize("name", OBSERVERS)
def test_scaling_by_a_power_of_two_scales_the_range(name: str) -> None:
    x = laplace(8, 500)
    for spec in SPECS:
        lo, hi = observed(name, x).range(spec)
        assert observed(name, x * 1024).range(spec) == (lo * 1024, hi * 1024)


# --- the histogram -----------------------------------------------------------------------


@given(x=FLOATS)
def test_histogram_counts_every_value_in_its_bin(x: np.ndarray) -> None:
    histogram = observed("mse", x)
    stats = histogram.stats("t")
    if stats.hist is None:
        assert not x.size
        return
    expected = np.histogram(x.astype(np.float64), stats.edges)[0]
    # numpy's last bin includes its upper edge, where no value ever lies.
    assert x.max() < stats.edges[-1]
    np.testing.assert_array_equal(stats.hist, expected)
    if x.any():
        assert BINS // 2 <= np.abs(x).max() / (stats.edges[1] - stats.edges[0]) < BINS


def test_subset_covers_all_channels_in_any_layout() -> None:
    for axis in (0, 2):
        for channels in (3, 16, 64, 96):
            shape = [32, 32, 32]
            shape[axis] = channels
            index = np.arange(channels).reshape([-1 if a == axis else 1 for a in range(3)])
            x = np.broadcast_to(index + 1, (2, *shape)).astype(np.float32)
            stats = observed("percentile", x).stats("t")
            seen = stats.hist[stats.hist > 0]
            assert len(seen) == channels
            assert seen.max() < 1.3 * seen.min()


def test_zeros_are_counted_apart_but_reported() -> None:
    histogram = observed("entropy", np.array([[0.0, -0.0, 1.0, -1.0]], np.float32))
    assert isinstance(histogram, Histogram)
    assert histogram.zeros == 2
    assert histogram.bins.sum() == 2
    assert histogram.stats("t").hist.sum() == 4


# --- each observer -----------------------------------------------------------------------


def test_minmax_is_exact() -> None:
    x = laplace(3, 100_000)
    assert observed("minmax", x).range(U8) == (x.min(), x.max())


def test_percentile_cuts_half_of_the_rest_at_each_end() -> None:
    x = laplace(800, 1000)
    lo, hi = observed("percentile", x).range(U8)
    width = 2.0 ** np.ceil(np.log2(np.abs(x).max())) / BINS
    ordered = np.sort(x, None)  # 0.005 % of 800,000 elements are 40 at each end
    assert ordered[-41] <= hi <= ordered[-40] + width
    assert ordered[39] - width <= lo <= ordered[40]
    few = laplace(10, 100)
    assert observed("percentile", few).range(U8) == (few.min(), few.max())


def test_entropy_ignores_rare_outliers_and_keeps_uniform_data() -> None:
    x = laplace(400, 1000)
    x[0, :2] = 60, -60
    for spec in (U8, SPECS[2]):
        lo, hi = observed("entropy", x).range(spec)
        assert -20 < lo < -3
        assert 3 < hi < 20
    positive = np.abs(x)
    up, down = observed("entropy", positive).range(U8), observed("entropy", -positive).range(U8)
    assert up[0] == down[1] == 0
    np.testing.assert_allclose(-down[0], up[1], rtol=0.05)
    uniform = np.random.default_rng(0).uniform(0, 1, (400, 1000)).astype(np.float32)
    assert observed("entropy", uniform).range(U8)[1] > 0.98
    assert observed("entropy", uniform).range(SPECS[-1]) == (0.0, uniform.max())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["laplace", "relu", "skewed", "outliers", "uniform"])
def test_mse_is_no_worse_than_minmax_and_near_the_best(spec: QuantSpec, kind: str) -> None:
    x = laplace(100, 1000)
    if kind == "relu":
        x = np.maximum(x, 0)
    elif kind == "skewed":
        x = np.where(x < 0, x / 8, x)
    elif kind == "outliers":
        x[0, :3] = 300, -200, 250
    elif kind == "uniform":
        x = np.random.default_rng(1).uniform(-1, 3, x.shape).astype(np.float32)
    observer = observed("mse", x)
    assert isinstance(observer, MeanSquare)
    full, chosen = MinMax.range(observer, spec), observer.range(spec)
    assert observer.error(spec, *chosen) <= observer.error(spec, *full)
    assert error_of(x, spec, *chosen) <= error_of(x, spec, *full) * 1.001
    shares = np.geomspace(1, 2**-7, 60)
    alike = min(error_of(x, spec, full[0] * share, full[1] * share) for share in shares)
    assert error_of(x, spec, *chosen) <= alike * 1.02


def test_mse_estimate_is_the_error_of_uniform_bins() -> None:
    x = np.linspace(-3, 5, 40_001)[:-1].astype(np.float32).reshape(-1, 100)
    observer = observed("mse", x)
    assert isinstance(observer, MeanSquare)
    for spec in SPECS[:5]:
        for lo, hi in ((-3, 5), (-1, 2), (0, 1.5), (-2.5, 0.1)):
            estimate = observer.error(spec, lo, hi)
            np.testing.assert_allclose(estimate, error_of(x, spec, lo, hi), rtol=5e-3)


@pytest.mark.parametrize("name", OBSERVERS)
def test_relu6_stays_within_its_clip(name: str) -> None:
    x = np.clip(laplace(20, 4000) * 3, 0, 6)
    assert x.max() == 6
    for bits in (4, 8):
        spec = QuantSpec(bits=bits, signed=False, symmetric=False)
        params = params_from_range(spec, *observed(name, x).range(spec))
        assert params.zero_point == 0
        assert np.float32(params.scale) * np.float32(spec.qmax) <= 6


# --- the pass over the samples -----------------------------------------------------------

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 2, 2] y)
<float[4] c = {1, -2, 3, 0.5}, int64[3] shape = {-1, 2, 2}> {
    a = Relu(x)
    b = Add(a, c)
    d = Neg(b)
    s = Shape(d)
    y = Reshape(d, shape)
}"""


def run(
    names: list[str],
    x: np.ndarray,
    *,
    observer: str = "minmax",
    batch_size: int = 3,
    same_range: dict[str, str] | None = None,
    model: str = MODEL,
    events: list[Event] | None = None,
) -> Calibration:
    parsed = ir.from_onnx_text(model)
    shape = tuple(d if isinstance(d, int) else None for d in parsed.graph.inputs[0].shape)
    spec = InputSpec(name="x", dtype=np.dtype(np.float32), shape=shape)
    return calibrate(
        parsed,
        dict.fromkeys(names, U8),
        open_samples(x, [spec]),
        QuantConfig.parse({"observer": observer, "batch_size": batch_size, "threads": 1}),
        same_range=same_range or {},
        on_event=(events if events is not None else []).append,
    )


def test_inputs_outputs_constants_and_values_between_are_observed() -> None:
    x = laplace(8, 4)
    c = np.array([1, -2, 3, 0.5], np.float32)
    b = np.maximum(x, 0) + c
    result = run(["x", "a", "b", "c", "y"], x)
    expected = {"x": x, "a": np.maximum(x, 0), "b": b, "c": c, "y": -b}
    for name, value in expected.items():
        stats, params = result.stats[name], params_from_range(U8, value.min(), value.max())
        assert (stats.name, stats.lo, stats.hi) == (name, value.min(), value.max())
        assert stats.count == value.size
        assert result.params[name] == params


@pytest.mark.parametrize("observer", OBSERVERS)
def test_batch_size_changes_nothing(observer: str) -> None:
    x = laplace(8, 4)
    results = [run(["x", "a", "y"], x, observer=observer, batch_size=n) for n in (1, 3, 8)]
    for result in results[1:]:
        assert result.params == results[0].params
        for name, stats in result.stats.items():
            same(stats, results[0].stats[name])


def test_same_range_follows_chains_to_the_root() -> None:
    x = laplace(8, 4)
    result = run(["x", "b", "d", "y"], x, same_range={"y": "d", "d": "b"})
    assert set(result.stats) == {"x", "b"}
    assert result.params["y"] is result.params["d"] is result.params["b"]
    only_root_unplanned = run(["y"], x, same_range={"y": "d"})
    assert only_root_unplanned.params["y"] == run(["d"], x).params["d"]
    with pytest.raises(ModelError, match="shares its range with itself"):
        run(["y"], x, same_range={"y": "d", "d": "y"})


def test_events_count_samples() -> None:
    for model, expected in ((MODEL, [3, 6, 8]), (MODEL.replace("[N,", "[4,"), [4, 8])):
        events: list[Event] = []
        run(["a"], laplace(8, 4), events=events, model=model)
        assert [event.done for event in events] == expected
        assert {(event.stage, event.total) for event in events} == {("calibrate", 8)}


def test_activations_of_one_run_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACTIVATION_BYTES", 2 * 4 * 4)
    events: list[Event] = []
    run(["a"], laplace(8, 4), events=events, batch_size=8)
    assert [event.done for event in events] == [2, 4, 6, 8]


def test_the_model_is_left_as_it_was() -> None:
    model = ir.from_onnx_text(MODEL)
    before = ir.to_proto(model).SerializeToString()
    spec = InputSpec(name="x", dtype=np.dtype(np.float32), shape=(None, 4))
    calibrate(
        model,
        {"a": U8},
        open_samples(laplace(2, 4), [spec]),
        QuantConfig(observer="minmax", batch_size=1, threads=1),
        same_range={},
        on_event=lambda _: None,
    )
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("observer", OBSERVERS)
def test_elements_that_are_no_numbers_do_not_count(observer: str) -> None:
    x = laplace(40, 4)
    x[:, 0] = np.abs(x[:, 0]) + 0.1
    positive = np.maximum(x, 0)
    found = run(["b"], x, observer=observer, model=MODEL.replace("Add(a, c)", "Div(c, a)"))
    expected = run(
        ["b"],
        np.where(positive == 0, np.float32(1e30), x),  # c / 1e30 is next to nothing
        observer=observer,
        model=MODEL.replace("Add(a, c)", "Div(c, a)"),
    )
    assert found.left_out == {"b": float((positive == 0).mean())}
    assert float(found.params["b"].scale) == pytest.approx(float(expected.params["b"].scale))
    assert not expected.left_out


def test_errors_name_the_tensor() -> None:
    x = laplace(4, 4)
    with pytest.raises(ModelError, match="tensor 'nowhere' is not in the graph"):
        run(["nowhere"], x)
    with pytest.raises(ModelError, match="tensor 's' is int64, expected a float"):
        run(["s"], x)
    with pytest.raises(CalibrationError, match="tensor 'b' holds NaN or Inf alone on the calibra"):
        run(["a", "b"], x, model=MODEL.replace("b = Add(a, c)", "z = Sub(a, a)  b = Div(z, z)"))
    bad = MODEL.replace("[N, 4]", "[N, M]")
    with pytest.raises(CalibrationError, match="ONNX Runtime failed on the calibration") as caught:
        run(["b"], laplace(4, 5), model=bad)
    assert "\n" not in str(caught.value)


def test_percentile_of_sparse_data_keeps_zero_exact() -> None:
    x = np.zeros((100, 4000), np.float32)
    x[:, 0] = 7
    observer = observed("percentile", x)
    assert isinstance(observer, Percentile)
    assert observer.range(U8) == (0.0, 7.0)


@pytest.mark.data
def test_mobilenet_activations() -> None:
    if "ATTNROUND_DATA" not in os.environ:
        pytest.skip("ATTNROUND_DATA is not set")
    data = Path(os.environ["ATTNROUND_DATA"])
    model = ir.load(data / "mobilenetv2_cifar.onnx")
    clips = [node.outputs[0].name for node in model.graph if node.op_type == "Clip"]
    spec = InputSpec(name="input", dtype=np.dtype(np.float32), shape=(None, 3, 32, 32))
    samples = open_samples(
        data / "cifar10" / "calib.npz", [spec], limit=16, preprocess=PREPROCESS["cifar10"]
    )
    result = calibrate(
        model,
        dict.fromkeys(clips, U8),
        samples,
        QuantConfig(observer="mse", batch_size=8, threads=2),
        same_range={},
        on_event=lambda _: None,
    )
    for name in clips:
        assert result.stats[name].lo == 0
        assert 0 < result.stats[name].hi <= 6
        assert float(np.float32(result.params[name].scale) * np.float32(255)) <= 6
