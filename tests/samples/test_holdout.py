"""holdout: which samples are kept apart, and that they and the rest are the samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_attnround.records import Array, InputSpec
from onnx_attnround.samples import Samples, open_samples
from onnx_attnround.samples.holdout import hold_out


def spec(batch: int | None = None) -> InputSpec:
    return InputSpec(name="x", dtype=np.dtype(np.float32), shape=(batch, 2))


def numbered(count: int, batch: int | None = None, limit: int | None = None) -> Samples:
    """Samples that hold their own number, for a model whose batch is ``batch``."""
    array = np.repeat(np.arange(count, dtype=np.float32)[:, None], 2, 1)
    return open_samples({"x": array}, [spec(batch)], limit=limit)


def numbers(samples: Samples | None, size: int = 16) -> list[int]:
    """The numbers of the samples in order, which are as many as ``count`` says."""
    assert samples is not None
    found = [int(row[0]) for feeds in samples.batches(size) for row in feeds["x"]]
    assert len(found) == samples.count
    return found


@pytest.mark.parametrize(
    ("count", "apart"), [(96, 32), (100, 32), (160, 32), (400, 80), (1024, 205), (2000, 256)]
)
def test_a_fifth_is_kept_apart_within_bounds(count: int, apart: int) -> None:
    fitted, held = hold_out(numbered(count), None)
    assert held is not None
    assert (fitted.count, held.count) == (count - apart, apart)
    assert sorted(numbers(fitted) + numbers(held)) == list(range(count))


@pytest.mark.parametrize("count", [1, 64, 95])
def test_of_few_samples_none_are_kept_apart(count: int) -> None:
    samples = numbered(count)
    assert hold_out(samples, None) == (samples, None)


def test_a_share_that_is_asked_for_is_taken() -> None:
    for count, share, apart in ((10, 0.3, 3), (10, 0.01, 1), (1000, 0.9, 900)):
        fitted, held = hold_out(numbered(count), share)
        assert held is not None and (fitted.count, held.count) == (count - apart, apart)
    samples = numbered(500)
    assert hold_out(samples, 0.0) == (samples, None)
    assert hold_out(numbered(1), 0.5)[1] is None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 300), st.integers(1, 200), st.sampled_from([None, 1, 3, 8]), st.integers(1, 40)
)
def test_every_sample_is_on_one_side(count: int, apart: int, batch: int | None, size: int) -> None:
    if batch is not None and count < batch:
        return
    samples = numbered(count, batch)
    parted = samples.split(apart)
    if parted is None:
        assert apart > samples.count - (batch or 1)
        return
    fitted, held = (numbers(part, size) for part in parted)
    assert sorted(fitted + held) == list(range(samples.count))
    assert fitted == sorted(fitted) and held == sorted(held)
    assert apart <= len(held) < apart + (batch or 1)


@pytest.mark.parametrize("period", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [128, 160, 256, 1000])
def test_no_kind_is_favoured_where_kinds_take_turns_or_are_sorted(count: int, period: int) -> None:
    held = np.array(numbers(hold_out(numbered(count), None)[1]))
    for kind in (held % period, held * period // count):
        shares = np.bincount(kind, minlength=period) / len(held) * period
        assert shares.min() > 0.4 and shares.max() < 1.8


def test_static_batches_stay_whole() -> None:
    samples = numbered(203, batch=8)
    fitted, held = hold_out(samples, 0.25)
    for part in (fitted, held):
        for feeds in part.batches(64):
            first = feeds["x"][0, 0]
            assert first % 8 == 0
            assert feeds["x"][:, 0].tolist() == list(range(int(first), int(first) + 8))
    assert fitted.count + held.count == 200


def test_a_folder_is_parted_by_its_files(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(1, 2), (3, 2)]
    for number in range(120):
        array = np.full(shapes[number % 2], number, np.float32)
        np.savez(tmp_path / f"{number:03}.npz", x=array)
    samples = open_samples(tmp_path, [spec()])
    fitted, held = hold_out(samples, None)
    assert (samples.count, held and held.count) == (240, 48)
    both = numbers(fitted) + numbers(held)
    assert sorted(both) == sorted(n for n in range(120) for _ in range(1 + 2 * (n % 2)))


def test_feeds_that_are_fed_as_they_are_count_as_one(tmp_path: Path) -> None:
    specs = [
        InputSpec(name=name, dtype=np.dtype(np.float32), shape=(None, 2)) for name in ("x", "z")
    ]
    feeds = [
        {"x": np.full((2, 2), n, np.float32), "z": np.full((3, 2), n, np.float32)}
        for n in range(100)
    ]
    fitted, held = hold_out(open_samples(feeds, specs), None)
    assert held is not None
    found: list[Array] = [f["x"] for part in (fitted, held) for f in part.batches(4)]
    assert (fitted.count, held.count) == (68, 32)
    assert sorted(int(array[0, 0]) for array in found) == list(range(100))


def test_the_limit_comes_first_and_batches_may_be_bounded() -> None:
    fitted, held = hold_out(numbered(300, limit=200), None)
    assert held is not None
    assert sorted(numbers(fitted) + numbers(held)) == list(range(200))
    assert max(len(feeds["x"]) for feeds in held.at_most(5).batches(64)) == 5
    assert numbers(held.at_most(5), 64) == numbers(held)
    again = held.split(8)
    assert again is not None
    assert sorted(numbers(again[0]) + numbers(again[1])) == numbers(held)
