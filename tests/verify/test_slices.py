"""slices and collapse: what a figure over a whole output would hide."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from onnx_attnround import graph
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import GateError
from onnx_attnround.records import Array
from onnx_attnround.samples import open_samples
from onnx_attnround.verify import OutputComparison, check_gates, speed, verify
from onnx_attnround.verify.compare import OutputSums
from onnx_attnround.verify.slices import Details

RNG = np.random.default_rng(5)


def compared(
    expected: Array, got: Array, batch: int = 8, *, one_kind: bool = False
) -> OutputComparison:
    """The figures of an output ``[n, ...]``, added in batches."""
    sums = OutputSums("y", one_kind=one_kind)
    for start in range(0, len(expected), batch):
        sums.add(
            expected[start : start + batch].astype(np.float32),
            got[start : start + batch].astype(np.float32),
        )
    return sums.result()


def sqnr(expected: Array, got: Array) -> float:
    return float(10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum()))


def boxes_and_scores(samples: int = 24, classes: int = 3) -> Array:
    """``[n, 4 + classes, 50]``: coordinates up to 640, and probabilities of which few are high."""
    boxes = RNG.uniform(0, 640, (samples, 4, 50))
    scores = RNG.uniform(0, 1, (samples, classes, 50)) ** 8
    return np.concatenate([boxes, scores], 1).astype(np.float32)


def in_steps(values: Array, step: float) -> Array:
    """Values rounded to multiples of ``step``."""
    rounded: Array = np.round(values / step) * step
    return rounded


def test_figures_follow_their_definition() -> None:
    expected = RNG.normal(size=(20, 3, 700, 5)).astype(np.float32)
    got = (expected + RNG.normal(size=expected.shape) * [0.1, 0.2, 0.3, 0.4, 0.5]).astype(
        np.float32
    )
    found = compared(expected, got)
    first, last = found.worst_slices
    channels = [sqnr(expected[:, i], got[:, i]) for i in range(3)]
    assert (first.axis, first.index) == (1, int(np.argmin(channels)))
    assert first.sqnr_db == pytest.approx(min(channels), abs=1e-4)
    assert (last.axis, last.index) == (3, 4)
    assert last.sqnr_db == pytest.approx(sqnr(expected[..., 4], got[..., 4]), abs=1e-4)
    assert found.worst_slice == last
    correlation = np.corrcoef(expected.ravel(), got.ravel())[0, 1]
    assert found.correlation == pytest.approx(correlation, abs=1e-6)
    assert found.frozen == 0.0


def test_scores_that_drown_beside_boxes_are_a_collapse() -> None:
    expected = boxes_and_scores()
    coarse = compared(expected, in_steps(expected, 640 / 255))
    assert coarse.sqnr_db is not None and coarse.sqnr_db > 50
    assert coarse.lost_extreme is not None and coarse.lost_extreme.index >= 4
    assert coarse.lost_extreme.expected > 0.9 and coarse.lost_extreme.got == 0
    assert coarse.collapsed is not None and "slice" in coarse.collapsed
    fine = compared(expected, in_steps(expected, 1 / 255))
    assert fine.collapsed is None and fine.lost_extreme is None


def test_scores_of_a_few_steps_are_a_collapse_too() -> None:
    expected = boxes_and_scores()
    expected[:, :4] /= 4
    found = compared(expected, in_steps(expected, 160 / 255))
    assert found.lost_extreme is None
    assert found.collapsed is not None and "dB" in found.collapsed


def test_a_single_class_is_not_overlooked() -> None:
    expected = boxes_and_scores(classes=1)
    found = compared(expected, in_steps(expected, 640 / 255))
    assert found.collapsed is not None and "slice 4 of axis 1" in found.collapsed


def test_classes_that_never_come_up_are_no_collapse() -> None:
    """Probabilities of rare classes below the step of 8 bits become 0."""
    height = np.geomspace(1e-4, 1, 40)[:, None]
    expected = RNG.uniform(0, 1, (24, 40, 50)) ** 4 * height
    found = compared(expected, in_steps(expected, 1 / 255))
    assert found.worst_slice is not None and found.worst_slice.sqnr_db < 10
    assert found.collapsed is None


def test_an_extreme_that_is_cut_off_is_told() -> None:
    expected = RNG.uniform(0, 0.3, (24, 2, 400))
    expected[3, 1, 7] = 1.0
    found = compared(expected, np.minimum(expected, 0.4))
    assert found.sqnr_db is not None and found.sqnr_db > 25
    assert found.lost_extreme is not None
    assert found.lost_extreme.expected == 1.0
    assert found.lost_extreme.got == pytest.approx(0.4)
    assert found.collapsed is not None and "goes to 1 in the float model" in found.collapsed


def test_a_large_mean_hides_no_lost_signal() -> None:
    expected = 100 + RNG.normal(size=(24, 6, 30))
    found = compared(expected, np.full_like(expected, 100.0))
    assert found.sqnr_db is not None and found.sqnr_db > 30
    assert (found.correlation, found.frozen) == (0.0, 1.0)
    assert found.collapsed is not None


def test_low_sqnr_and_other_classes_are_a_collapse() -> None:
    expected = RNG.normal(size=(40, 10))
    noisy = compared(expected, expected + 0.5 * RNG.normal(size=expected.shape))
    assert noisy.collapsed is not None and noisy.collapsed.startswith("its SQNR is ")
    sound = compared(expected, expected + 0.1 * RNG.normal(size=expected.shape))
    assert sound.collapsed is None
    even = 10 + 0.01 * RNG.normal(size=(40, 600))
    other = compared(even, even + 0.004 * RNG.normal(size=even.shape))
    assert other.agreement is not None and other.agreement < 0.5
    assert other.collapsed is not None and "largest value" in other.collapsed


def test_shapes_that_change_leave_the_axes_that_stay() -> None:
    details = Details()
    for length in (7, 9):
        batch = RNG.normal(size=(4, length, 3))
        details.add(batch, batch * 1.1)
    assert [part.axis for part in details.worst_slices()] == [2]
    assert details.frozen is None
    details.add(np.ones((4, 3)), np.ones((4, 3)))
    assert details.worst_slices() == ()


@pytest.mark.parametrize("shape", [(5,), (5, 1), (), (0, 3), (5, 3, 0)])
def test_outputs_without_slices_have_figures_all_the_same(shape: tuple[int, ...]) -> None:
    expected = RNG.normal(size=shape).astype(np.float32)
    sums = OutputSums("y")
    sums.add(np.asarray(expected), np.asarray(expected))
    found = sums.result()
    assert found.collapsed is None
    assert all(part.sqnr_db == np.inf for part in found.worst_slices)


def test_a_strict_run_fails_on_a_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LATENCY_SECONDS", 0.0)

    def model(factor: str) -> ir.Model:
        text = f"net (float[N, 3] x) => (float[N, 3] y) <float f = {{{factor}}}>"
        return build(f"{text} {{ y = Mul(x, f) }}")

    samples = open_samples(
        RNG.normal(size=(40, 3)).astype(np.float32), graph.input_specs(model("1.0"))
    )
    sound, broken = (verify(model("1.0"), model(f), samples) for f in ("1.1", "0.5"))
    check_gates(sound, QuantConfig(strict=True))
    check_gates(broken, QuantConfig())
    assert sound.collapsed == []
    with pytest.raises(GateError, match="output 'y' has collapsed: its SQNR is 6.0 dB"):
        check_gates(broken, QuantConfig(strict=True))


@pytest.mark.parametrize("end", ["Sigmoid", "Softmax"])
def test_rows_of_a_mask_in_which_nothing_is_found_are_no_loss(end: str) -> None:
    """They are beneath the resolution of 8 bits, but of the unit of all others."""
    body = f"a = {end}(x) y = Transpose<perm = [0, 2, 1]>(a)"
    model = build(f"net (float[N, 5, 20] x) => (float[N, 20, 5] y) {{ {body} }}")
    assert graph.outputs_of_shares(model) == {"y"}
    expected = RNG.uniform(0, 1, (24, 20, 5)) ** 4
    expected[:, 18:] *= 1e-3
    got = in_steps(expected, 1 / 255)
    assert compared(expected, got).collapsed is not None
    assert compared(expected, got, one_kind=True).collapsed is None
    got[:, 3] = 0
    assert "slice 3 of axis 1" in (compared(expected, got, one_kind=True).collapsed or "")


def test_what_is_joined_may_have_units_of_its_own() -> None:
    body = "a = Sigmoid(x) y = Concat<axis = 1>(a, x)"
    model = build(f"net (float[N, 5] x) => (float[N, 10] y) {{ {body} }}")
    assert graph.outputs_of_shares(model) == frozenset()
