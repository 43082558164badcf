"""A file that would be slower than the float model has quantised weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import QuantizeResult, quantize
from onnx_attnround.pipeline import pace
from onnx_attnround.samples import Samples
from onnx_attnround.verify import Latency

NET = """net (float[n, 8, 10, 10] x) => (float[n, 8, 10, 10] y)
<float[16, 8, 3, 3] w, float[16, 1, 3, 3] v, float[8, 16, 1, 1] u>
{
    a = Conv <pads = [1, 1, 1, 1]> (x, w)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1], group = 16> (b, v)
    d = Relu (c)
    y = Conv (d, u)
}"""

Clock = Callable[..., list[tuple[int, bool]]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the seconds of the float model and the speeds of files in integer and in float.

    Returns a list of what is timed: batches, and whether the file has integer activations.
    """

    def set_to(
        seconds: float, integer: dict[int, float], alone: dict[int, float], noise: float = 0.01
    ) -> list[tuple[int, bool]]:
        timed: list[tuple[int, bool]] = []

        def measure(models: tuple[ir.Model, ir.Model], _: Samples, batch: int) -> Latency:
            rounded = any(node.op_type == "QuantizeLinear" for node in models[1].graph)
            timed.append((batch, rounded))
            speed = (integer if rounded else alone)[batch]
            return Latency(
                batch=batch, pairs=9, float_ms=1.0, quantised_ms=1 / speed, speedup=speed,
                spread=(speed - noise, speed + noise),
            )  # fmt: skip

        monkeypatch.setattr(pace, "float_seconds", lambda model, samples: seconds)
        monkeypatch.setattr(pace, "measure_speed", measure)
        return timed

    return set_to


def made(**settings: object) -> QuantizeResult:
    x = np.random.default_rng(0).normal(size=(32, 8, 10, 10)).astype(np.float32)
    return quantize(build(NET), x, threads=1, **settings)


def notes(result: QuantizeResult) -> list[str]:
    return [note for note in result.notes if "times the speed" in note]


def test_a_file_that_is_faster_is_as_ever(clock: Clock) -> None:
    timed = clock(1e-3, {1: 1.5, 16: 1.01}, {})
    result = made()
    assert timed == [(1, True), (16, True)]
    assert len(result.checked.fusion.integer) == 3
    assert notes(result) == []


@pytest.mark.parametrize("slow", [{1: 0.8, 16: 1.2}, {1: 1.2, 16: 0.8}])
def test_a_slower_one_leaves_activations_float(slow: dict[int, float], clock: Clock) -> None:
    clock(1e-3, slow, {1: 1.3, 16: 1.1})
    result = made()
    assert result.plan.activations == {}
    assert all(node.op_type != "QuantizeLinear" for node in result.model.graph)
    assert all(rounding.codes.dtype == np.int8 for rounding in result.roundings.values())
    (note,) = notes(result)
    told = [f"{speed:.2f} (batch {batch})" for batch, speed in slow.items()]
    assert all(figure in note for figure in (*told, "1.30 (batch 1)", "1.10 (batch 16)"))
    assert "keep_integer" in note


def test_weights_are_rounded_for_float_activations_with_all_their_codes(clock: Clock) -> None:
    clock(1e-3, {1: 0.5, 16: 0.5}, {1: 1.0, 16: 1.0})
    result = made()
    assert max(np.abs(each.codes.astype(int)).max() for each in result.roundings.values()) > 64


def test_matrices_are_unpacked_once_then_and_not_in_each_run(clock: Clock) -> None:
    clock(1e-3, {1: 0.5, 16: 0.5}, {1: 1.0, 16: 1.0})
    net = "net (float[n, 7, 32] x) => (float[n, 7, 16] y) <float[32, 16] w> { y = MatMul (x, w) }"
    x = np.random.default_rng(0).normal(size=(32, 7, 32)).astype(np.float32)
    result = quantize(build(net), x, threads=1)
    kinds = [node.op_type for node in result.model.graph]
    assert "MatMul" in kinds
    assert "DequantizeLinear" not in kinds


def test_where_nothing_helps_it_stays_in_integer_and_is_told_of(clock: Clock) -> None:
    clock(1e-3, {1: 0.8, 16: 0.9}, {1: 0.75, 16: 0.9})
    result = made()
    assert len(result.checked.fusion.integer) == 3
    assert "it stays in integer" in notes(result)[0]


def test_a_gain_that_hides_in_noise_is_no_reason_for_a_note(clock: Clock) -> None:
    timed = clock(1e-3, {1: 1.3, 16: 1.2}, {1: 1.0, 16: 1.0}, 0.5)
    result = made()
    assert len(timed) == 4
    assert len(result.checked.fusion.integer) == 3
    assert notes(result) == []


@pytest.mark.parametrize("speed", [0.97, 1.0, 1.04])
def test_codes_that_buy_no_time_are_not_made(speed: float, clock: Clock) -> None:
    clock(1e-3, {1: speed, 16: speed}, {1: 1.02, 16: 1.02}, 0.05)
    result = made()
    assert result.plan.activations == {}
    assert "stay float" in notes(result)[0]


@pytest.mark.parametrize(
    ("seconds", "speeds", "noise", "settings"),
    [
        (1e-4, {}, 0.01, {}),  # too short a run to tell
        (1e-3, {}, 0.01, {"keep_integer": True}),
        (1e-3, {}, 0.01, {"act_bits": 16}),
        (1e-3, {}, 0.01, {"target": "openvino"}),
        (1e-3, {}, 0.01, {"target": "ort-arm"}),
        (1e-3, {1: 1.2, 16: 0.97}, 0.05, {}),  # within noise at the one, and a gain at the other
    ],
)
def test_nothing_changes_where_it_does_not_matter(
    seconds: float,
    speeds: dict[int, float],
    noise: float,
    settings: dict[str, object],
    clock: Clock,
) -> None:
    timed = clock(seconds, speeds, {}, noise)
    result = made(**settings)
    assert result.plan.activations
    assert notes(result) == []
    assert len(timed) == len(speeds)


def test_the_batch_is_asked_for_and_left_out_where_single_samples_take_long(clock: Clock) -> None:
    assert [batch for batch, _ in _after(clock(1e-3, {1: 2, 4: 2}, {}), speed_batch=4)] == [1, 4]
    assert [batch for batch, _ in _after(clock(0.5, {1: 2}, {}), speed_batch=4)] == [1]


def _after(timed: list[tuple[int, bool]], **settings: object) -> list[tuple[int, bool]]:
    made(**settings)
    return timed


def test_a_run_that_goes_on_does_not_time_again(clock: Clock, tmp_path: Path) -> None:
    settings = {"work_dir": tmp_path / "work", "min_sqnr": 500.0}
    clock(1e-3, {1: 0.5, 16: 0.5}, {1: 1.0, 16: 1.0})
    with pytest.raises(Exception, match="min_sqnr") as first:
        made(**settings)
    again = clock(1e-3, {1: 2.0, 16: 2.0}, {})
    with pytest.raises(Exception, match="min_sqnr") as second:
        made(**settings)
    assert again == []
    for error in (first, second):
        assert error.value.result.plan.activations == {}
