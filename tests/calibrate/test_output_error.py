"""Ranges are judged by what they do to the model's outputs, slice by slice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_models import build

from onnx_attnround import graph
from onnx_attnround.calibrate import calibrate
from onnx_attnround.calibrate.output_error import BATCH, NEGLIGIBLE, RoundedModel
from onnx_attnround.calibrate.output_slices import Slices, kinds_of
from onnx_attnround.config import QuantConfig
from onnx_attnround.qdq.arithmetic import dequantize, params_from_range, quantize
from onnx_attnround.records import Array, QuantParams, QuantSpec
from onnx_attnround.samples import open_samples

U8 = QuantSpec(bits=8, signed=False, symmetric=False)
PASSES = "g (float[N,8] x) => (float[N,8] y) { r = Relu(x)  y = Identity(r) }"
CONFIG = QuantConfig(threads=1)


def rare(peak: float) -> Array:
    """Many small values, and one large in every thirtieth row."""
    x = np.random.default_rng(0).normal(size=(240, 8)).astype(np.float32)
    x[::30, 3] = peak
    return x


def opened(text: str, x: Array) -> tuple[object, object]:
    model = build(text)
    return model, open_samples({"x": x}, graph.input_specs(model))


def test_rounds_as_the_written_file_does() -> None:
    x = rare(6.0)
    model, samples = opened(PASSES, x)
    params = params_from_range(U8, 0.0, 3.0)
    rounded = RoundedModel(model, ["r"], samples, CONFIG)
    zero = float(params.zero_point)
    wanted = rounded._slices[0].expected
    assert {len(expected) for expected in wanted} == {BATCH}
    for feeds, expected in zip(rounded._feeds, wanted, strict=True):
        (got,) = rounded.outputs({**feeds, **rounded._table({"r": params})})
        codes = quantize(expected, params.scale, zero, 0, 255)
        np.testing.assert_allclose(got, dequantize(codes, params.scale, zero), rtol=1e-6)


def test_without_ranges_nothing_is_rounded() -> None:
    model, samples = opened(PASSES, rare(6.0))
    rounded = RoundedModel(model, ["r"], samples, CONFIG)
    assert rounded.error({}) == pytest.approx(np.log(NEGLIGIBLE), abs=0.1)


def test_what_is_not_rounded_may_be_as_large_as_masks_are() -> None:
    x = rare(6.0)
    x[::7, 0] = np.finfo(np.float32).max
    model, samples = opened(PASSES, x)
    rounded = RoundedModel(model, ["r"], samples, CONFIG)
    for feeds in rounded._feeds:
        (got,) = rounded.outputs({**feeds, **rounded._table({})})
        np.testing.assert_array_equal(got, np.maximum(feeds["x"], 0))


def test_a_finer_grid_has_less_error() -> None:
    model, samples = opened(PASSES, rare(6.0))
    rounded = RoundedModel(model, ["r"], samples, CONFIG)
    coarse, fine = (
        rounded.error({"r": params_from_range(replace(U8, bits=bits), 0.0, 6.0)}) for bits in (4, 8)
    )
    assert coarse > fine + 3


def chosen(text: str, x: Array, names: list[str]) -> dict[str, QuantParams]:
    model, samples = opened(text, x)
    found = calibrate(
        model, dict.fromkeys(names, U8), samples, CONFIG, same_range={},
        on_event=lambda event: None,
    )  # fmt: skip
    return dict(found.params)


def top(params: QuantParams) -> float:
    return float(params.scale) * (255 - float(params.zero_point))


def test_large_values_that_decide_an_output_are_kept() -> None:
    """A score that only a rare large value raises: its slice is nothing without it."""
    text = """g (float[N,8] x) => (float[N,8] y) <float[1] five = {5}>
        { r = Relu(x)  m = Sub(r, five)  y = Relu(m) }"""
    assert top(chosen(text, rare(9.0), ["r"])["r"]) > 8.0


def test_samples_weigh_by_what_they_have_of_the_signal() -> None:
    """A range that is finer on many empty samples loses to one that keeps the few full ones."""
    x = np.random.default_rng(3).random((64, 8)).astype(np.float32) * 0.2
    x[[20, 50]] *= 40  # up to 8
    model, samples = opened(PASSES, x)
    rounded = RoundedModel(model, ["r"], samples, CONFIG)
    narrow, wide = (
        {"r": params_from_range(U8, 0.0, share * float(x.max()))} for share in (0.81, 1.0)
    )
    finer, coarser = (np.median(rounded.errors(each)[0]) for each in (narrow, wide))
    assert finer < 0.9 * coarser
    best, found = rounded.best([narrow, wide])
    assert best == 1
    assert found.lost == 0


def test_outputs_that_are_no_floats_leave_the_range_of_least_squares() -> None:
    text = "g (float[N,8] x) => (int64[N,1] y) { r = Relu(x)  y = ArgMax<axis=1>(r) }"
    usual = chosen(text, rare(9.0), ["r"])["r"]
    assert 1.0 < top(usual) <= 9.1


@pytest.mark.parametrize("observer", ["mse", "percentile", "entropy"])
def test_no_observer_cuts_off_the_logits_of_what_is_seldom_found(observer: str) -> None:
    """One object in each sixteenth sample, whose logit lies far from the mass of the others."""
    text = """g (float[N,400] x) => (float[N,400] y) <float[1] gain = {16}, float[1] shift = {-14}>
        { r = Relu(x)  m = Mul(r, gain)  a = Add(m, shift)  y = Sigmoid(a) }"""
    x = np.abs(np.random.default_rng(1).normal(size=(256, 400))).astype(np.float32) * 0.1
    x[::16, 7] = 1.1
    model = build(text)
    samples = open_samples({"x": x}, graph.input_specs(model))
    found = calibrate(
        model, {"r": U8}, samples, CONFIG.model_copy(update={"observer": observer}), same_range={},
        on_event=lambda event: None,
    )  # fmt: skip
    assert top(found.params["r"]) > 0.95


def test_slices_are_of_one_kind_until_there_is_a_gap() -> None:
    reach = np.array([0.05, 640.0, 0.3, 600.0, 0.9])
    assert kinds_of(reach).tolist() == [1, 0, 1, 0, 1]


def test_a_faint_row_counts_by_the_rows_of_its_picture_and_a_score_by_scores() -> None:
    rng = np.random.default_rng(0)
    picture = rng.random((6, 5, 20)) * np.array([1.0, 0.3, 0.1, 0.03, 0.01])[None, :, None]

    def error(expected: Array, index: int) -> float:
        got = expected.copy()
        got[:, index] += 0.01
        return float(Slices([expected]).compare(0, got).errors.mean())

    assert error(picture, 4) < 2 * error(picture, 0)
    boxes = picture.copy()
    boxes[:, :2] *= 1e2
    assert error(boxes, 2) > 1e2 * error(boxes, 0)


def test_all_rows_of_shares_are_of_one_kind() -> None:
    """Where nothing is found, an error counts as much as where something is."""
    masks = np.random.default_rng(0).random((6, 5, 20))
    masks[:, 4] *= 1e-3
    got = masks + 1e-3 * (np.arange(5) == 4)[None, :, None]
    apart, together = (
        float(Slices([masks], one_kind=one).compare(0, got).errors.mean()) for one in (False, True)
    )
    assert apart > 0.1
    assert together < 1e-5


@pytest.mark.parametrize(("kept", "lost"), [(0.7, 2), (0.9, 0)])
def test_a_score_that_loses_a_third_is_lost(kept: float, lost: int) -> None:
    """In the slice of its class, and in that of its box."""
    expected = np.random.default_rng(0).uniform(0, 0.3, (6, 5, 20))
    expected[3, 2, 7] = 0.9
    got = expected.copy()
    got[3, 2, 7] = 0.9 * kept
    assert Slices([expected]).compare(0, got).lost == lost


def judged_alone(rounded: RoundedModel, candidates: list[dict[str, QuantParams]]) -> int:
    """The best candidate, each of them run on all samples."""
    ranks = [rounded.best([candidate])[1].rank for candidate in candidates]
    return ranks.index(min(ranks))


def test_candidates_that_are_clearly_worse_are_not_run_to_the_end() -> None:
    model, samples = opened(PASSES, rare(6.0))
    rounded = RoundedModel(model, ["r"], samples, CONFIG)
    grids = [(4, 6.0), (8, 6.0), (3, 6.0), (8, 6.1)]
    candidates = [{"r": params_from_range(replace(U8, bits=bits), 0.0, top)} for bits, top in grids]
    runs: list[int] = []
    judge = rounded._judge
    rounded._judge = lambda judged, batch: (runs.append(batch), judge(judged, batch))[1]  # type: ignore[method-assign]
    best, found = rounded.best(candidates)
    batches = len(rounded._feeds)
    assert found.batches == batches
    assert len(runs) <= 2 * batches + 2
    assert best == judged_alone(rounded, candidates)


def test_a_range_that_keeps_an_extreme_wins_though_it_was_given_up_for_its_error() -> None:
    """The narrow range has less error on all samples but one, which the last batch has."""
    x = rare(3.0)[:64]
    model, samples = opened(PASSES, x)
    last = BATCH * RoundedModel(model, ["r"], samples, CONFIG)._order[-1]
    x[last, 5] = 40.0
    model, samples = opened(PASSES, x)
    rounded = RoundedModel(model, ["r"], samples, CONFIG)
    narrow, wide = (
        {"r": params_from_range(replace(U8, bits=6), 0.0, end)} for end in (3.2, 40.0)
    )
    assert rounded.best([narrow])[1].lost == 1
    best, found = rounded.best([narrow, wide])
    assert (best, found.lost, found.batches) == (1, 0, len(rounded._feeds))


def test_outputs_without_elements_are_not_judged() -> None:
    """What a Slice beyond the end leaves."""
    text = """g (float[N,8] x) => (float[N,8] y, float[N,0] none)
        <int64[1] far = {20}, int64[1] last = {1}> {
        r = Relu(x)  y = Identity(r)  none = Slice(r, far, far, last) }"""
    model, samples = opened(text, rare(4.0))
    rounded = RoundedModel(model, ["r"], samples, CONFIG)
    errors = rounded.errors({"r": params_from_range(U8, 0.0, 4.0)})
    assert len(errors) == 1


def test_a_batch_in_which_nothing_is_found_has_no_error() -> None:
    slices = Slices([np.ones(3, np.float32), np.ones(0, np.float32)])
    found = slices.compare(1, np.ones(0, np.float32))
    assert (len(found.errors), found.lost) == (0, 0)
