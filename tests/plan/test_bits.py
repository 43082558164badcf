"""Coding lengths against their formula, and bits that keep to a budget, by any allocator."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError
from onnx_attnround.plan.bits import (
    ALLOCATORS,
    DISTORTION,
    MEASURING,
    allocate,
    by_error_saved,
    coding_length,
    least_error,
    measures,
    moves_wide,
    under_budget,
)
from onnx_attnround.records import Array, BitAllocation, LayerPlan, QuantSpec

CHOICES = (2, 3, 4, 5, 6, 8)


def normal(m: int, n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(m, n)).astype(np.float32)


# --- coding length ----------------------------------------------------------------------


def naive(matrix: Array, distortion: float) -> float:
    """Bits per degree of freedom of ``(m + n)/2 log2 det(I + n/(m eps^2) W W')``."""
    w = matrix.astype(np.float64)
    m, n = w.shape
    mean_power = np.mean([row @ row for row in w])
    inside = np.eye(m) + n / (m * distortion * mean_power) * (w @ w.T)
    bits = (m + n) / 2 * math.log2(np.linalg.det(inside))
    return bits / ((m + n) * min(m, n))


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6), (1, 9), (9, 1)])
@pytest.mark.parametrize("distortion", [0.02, DISTORTION, 3.0])
def test_coding_length_is_its_formula(shape: tuple[int, int], distortion: float) -> None:
    matrix = normal(*shape)
    assert coding_length(matrix, distortion) == pytest.approx(naive(matrix, distortion), rel=1e-9)


@given(st.floats(-20, 20), st.integers(0, 99))
def test_coding_length_does_not_depend_on_a_common_factor(exponent: float, seed: int) -> None:
    matrix = normal(4, 7, seed)
    scaled = (matrix * 10.0**exponent).astype(np.float32)
    assert coding_length(scaled) == pytest.approx(coding_length(matrix), rel=1e-4)


def test_coding_length_of_nothing_is_nothing() -> None:
    assert coding_length(np.zeros((3, 4), np.float32)) == 0.0


def test_coding_length_grows_with_what_there_is_to_code() -> None:
    """Full rank over low rank, and a small distortion over a large one."""
    full = normal(16, 64)
    low = normal(16, 2) @ normal(2, 64, 1)
    assert coding_length(full) > 2 * coding_length(low)
    assert coding_length(full, 0.01) > coding_length(full, 0.1) > coding_length(full, 1.0)


# --- bits under a budget ----------------------------------------------------------------


@st.composite
def budgets(draw: st.DrawFn) -> tuple[list[float], list[int], tuple[int, ...], float]:
    count = draw(st.integers(1, 8))
    rates = draw(st.lists(st.floats(0, 6), min_size=count, max_size=count))
    sizes = draw(st.lists(st.integers(1, 5000), min_size=count, max_size=count))
    choices = tuple(sorted(draw(st.sets(st.integers(2, 8), min_size=1))))
    return rates, sizes, choices, draw(st.floats(choices[0], 8))


def spent(bits: list[int], sizes: list[int]) -> int:
    return sum(width * size for width, size in zip(bits, sizes, strict=True))


@given(budgets())
def test_budget_choices_and_order_are_kept(
    case: tuple[list[float], list[int], tuple[int, ...], float],
) -> None:
    rates, sizes, choices, mean = case
    bits = under_budget(rates, sizes, choices, mean)
    assert set(bits) <= set(choices)
    assert spent(bits, sizes) <= mean * sum(sizes)
    for rate, width in zip(rates, bits, strict=True):
        assert all(width >= w for r, w in zip(rates, bits, strict=True) if r < rate)
    assert bits == under_budget(rates, sizes, choices, mean)


@given(budgets(), st.floats(0, 2))
def test_a_larger_budget_never_buys_less(
    case: tuple[list[float], list[int], tuple[int, ...], float], more: float
) -> None:
    rates, sizes, choices, mean = case
    small, large = (under_budget(rates, sizes, choices, b) for b in (mean, mean + more))
    assert spent(small, sizes) <= spent(large, sizes)


@given(budgets())
def test_what_is_left_of_the_budget_buys_nothing_more(
    case: tuple[list[float], list[int], tuple[int, ...], float],
) -> None:
    """No layer can be raised by one choice without breaking the budget or the order."""
    rates, sizes, choices, mean = case
    bits = under_budget(rates, sizes, choices, mean)
    order = sorted(range(len(rates)), key=lambda i: (-rates[i], i))
    for position, i in enumerate(order):
        wider = [choice for choice in choices if choice > bits[i]]
        above = bits[order[position - 1]] if position else 8
        if wider and wider[0] <= above:
            raised = [*bits[:i], wider[0], *bits[i + 1 :]]
            assert spent(raised, sizes) > mean * sum(sizes)


@given(st.lists(st.floats(0, 6), min_size=1, max_size=6), st.sampled_from(CHOICES))
@example([1.0, 1.0, 1.0], 4)
def test_equal_rates_get_equal_bits_where_the_budget_allows(rates: list[float], mean: int) -> None:
    sizes = [100 * (i + 1) for i in range(len(rates))]
    equal = [rates[0]] * len(rates)
    assert under_budget(equal, sizes, CHOICES, mean) == [mean] * len(rates)


def test_rates_decide() -> None:
    """One bit of rate is one bit of width."""
    assert under_budget([3.0, 1.0, 2.0], [10, 10, 10], CHOICES, 4) == [5, 3, 4]
    assert under_budget([9.0, 1.0, 1.0], [10, 10, 10], CHOICES, 4) == [8, 2, 2]
    assert under_budget([3.0, 1.0], [10, 10], (4, 8), 4) == [4, 4]
    assert under_budget([3.0, 1.0], [10, 10], (4, 8), 6) == [8, 4]
    assert under_budget([3.0, 1.0], [10, 10], (4, 8), 8) == [8, 8]


# --- the least error under a budget -----------------------------------------------------

Errors = list[dict[int, float]]


@st.composite
def priced(draw: st.DrawFn) -> tuple[Errors, list[int], tuple[int, ...], float]:
    """Layers whose errors may do anything between the widths."""
    _, sizes, choices, mean = draw(budgets())
    errors = [{choice: draw(st.floats(0, 10)) for choice in choices} for _ in sizes]
    return errors, sizes, choices, mean


def total(errors: Errors, bits: list[int]) -> float:
    return math.fsum(of_layer[width] for of_layer, width in zip(errors, bits, strict=True))


@given(priced())
def test_least_error_keeps_to_budget_and_choices(
    case: tuple[Errors, list[int], tuple[int, ...], float],
) -> None:
    errors, sizes, choices, mean = case
    bits = least_error(*case)
    assert set(bits) <= set(choices)
    assert spent(bits, sizes) <= mean * sum(sizes)
    assert total(errors, bits) <= total(errors, [choices[0]] * len(sizes))
    assert bits == least_error(*case)


@given(priced(), st.floats(0, 2))
def test_a_larger_budget_never_ends_with_more_error(
    case: tuple[Errors, list[int], tuple[int, ...], float], more: float
) -> None:
    errors, sizes, choices, mean = case
    small, large = (least_error(errors, sizes, choices, b) for b in (mean, mean + more))
    assert spent(small, sizes) <= spent(large, sizes)
    assert total(errors, large) <= total(errors, small) + 1e-9


@given(priced())
def test_no_other_bits_of_the_same_size_have_less_error(
    case: tuple[Errors, list[int], tuple[int, ...], float],
) -> None:
    """Of all assignments, where they are few enough: what the steps spend, they spend best.

    Bits along convex hulls are optimal for their own size up to the first step
    that does not fit; from there on the budget is filled.
    """
    errors, sizes, choices, mean = case
    if len(choices) ** len(sizes) > 2000:
        return
    bits = least_error(*case)
    every = itertools.product(choices, repeat=len(sizes))
    within = [list(b) for b in every if spent(list(b), sizes) <= mean * sum(sizes)]
    least = min(total(errors, candidate) for candidate in within)
    dearest = max(
        (of_layer[low] - of_layer[high] for of_layer in errors
         for low in choices for high in choices if low < high), default=0.0
    )  # fmt: skip
    assert total(errors, bits) <= least + max(dearest, 0.0) + 1e-9


def test_errors_decide_by_what_a_bit_of_size_saves() -> None:
    halves = {2: 16.0, 3: 4.0, 4: 1.0, 5: 0.25, 6: 0.0625, 8: 0.004}
    tenfold = {bits: 10 * error for bits, error in halves.items()}
    assert least_error([halves, halves], [10, 10], CHOICES, 4) == [4, 4]
    assert least_error([tenfold, halves], [10, 10], CHOICES, 4) == [5, 3]
    assert least_error([halves, halves], [10, 160], CHOICES, 4) == [8, 3]
    assert least_error([halves, {**halves, 3: 15.9}], [10, 10], CHOICES, 3) == [4, 2]
    assert least_error([halves, {**halves, 3: 15.9}], [10, 10], CHOICES, 3.5) == [3, 4]
    assert least_error([{2: 0.0, 8: 0.0}, {2: 1.0, 8: 0.0}], [10, 10], (2, 8), 5) == [2, 8]


# --- the allocation of a model ----------------------------------------------------------


def layer(name: str, outputs: int, depth: int, *, end: bool = False) -> LayerPlan:
    return LayerPlan(
        node=name,
        op_type="Gemm",
        x="x",
        y="y",
        weight=f"{name}/w",
        bias=None,
        weight_shape=(outputs, depth),
        weight_spec=QuantSpec(bits=8, signed=True, symmetric=True, axis=0),
        attributes={"transB": 1},
        first_or_last=end,
    )


LAYERS = (
    layer("first", 8, 4, end=True),
    layer("block.0/rich", 16, 32),
    layer("block.1/poor", 16, 32),
    layer("last", 10, 16, end=True),
)
MATRICES = {
    "first": normal(8, 4)[None],
    "block.0/rich": normal(16, 32)[None],
    "block.1/poor": (normal(16, 1) @ normal(1, 32))[None] + 0.01 * normal(16, 32)[None],
    "last": normal(10, 16)[None],
}


matrix = MATRICES.__getitem__


def allocation(**options: object) -> BitAllocation:
    return allocate(LAYERS, matrix, QuantConfig.parse(options))


def test_without_a_budget_all_free_layers_get_the_same() -> None:
    result = allocation(weight_bits=3)
    assert result.bits == {"first": 8, "block.0/rich": 3, "block.1/poor": 3, "last": 8}
    assert result.mean_bits == 3.0


def test_first_and_last_never_get_less_than_the_others() -> None:
    assert set(allocation(weight_bits=6, first_last_bits=4).bits.values()) == {6}
    assert allocation(weight_bits=3, first_last_bits=4).bits["last"] == 4


def test_under_a_budget_first_and_last_have_what_is_asked_for_them() -> None:
    bits = allocation(mean_bits=4.0, first_last_bits=5).bits
    assert bits["first"] == bits["last"] == 5


def test_layer_bits_go_before_all_else_the_first_match_first() -> None:
    result = allocation(
        weight_bits=4, layer_bits={"*rich": 6, "block.*": 3, "last": 5}, first_last_bits=8
    )
    assert result.bits == {"first": 8, "block.0/rich": 6, "block.1/poor": 3, "last": 5}


def test_the_budget_is_that_of_the_layers_left_free() -> None:
    result = allocation(mean_bits=4.5)
    assert result.bits["first"] == result.bits["last"] == 8
    assert result.bits["block.0/rich"] > result.bits["block.1/poor"]
    assert result.mean_bits <= 4.5
    free = [result.bits[name] for name in ("block.0/rich", "block.1/poor")]
    assert result.mean_bits == sum(free) / 2
    pinned = allocation(mean_bits=4.0, layer_bits={"*rich": 2})
    assert pinned.bits["block.1/poor"] == 4
    assert pinned.mean_bits == 4.0


def test_allowed_widths_alone_are_used() -> None:
    result = allocation(mean_bits=5.0, bit_choices=[4, 8])
    assert {result.bits[name] for name in ("block.0/rich", "block.1/poor")} <= {4, 8}


def test_with_every_layer_pinned_there_is_no_mean() -> None:
    result = allocation(mean_bits=4.0, layer_bits={"*": 3})
    assert set(result.bits.values()) == {3}
    assert math.isnan(result.mean_bits)


def test_the_coding_length_of_every_layer_is_told_where_a_mean_is_asked_for() -> None:
    assert allocation(weight_bits=8).coding_length == {}  # it takes long, and is not needed
    lengths = allocation(mean_bits=8).coding_length
    assert list(lengths) == [one.node for one in LAYERS]
    usual = sum(one.parameters for one in LAYERS) / len(LAYERS)
    for one in LAYERS:
        expected = naive(MATRICES[one.node][0], DISTORTION * one.parameters / usual)
        assert lengths[one.node] == pytest.approx(expected, rel=1e-9)
    assert lengths["block.0/rich"] > lengths["block.1/poor"]


def test_rescaled_weights_get_the_same_bits() -> None:
    config = QuantConfig(mean_bits=4.0)
    scaled = {name: matrix * np.float32(1000) for name, matrix in MATRICES.items()}
    assert allocate(LAYERS, scaled.__getitem__, config).bits == allocation(mean_bits=4.0).bits


def test_a_budget_below_the_narrowest_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`mean_bits` 3\.5") as caught:
        allocation(mean_bits=3.5, bit_choices=[4, 8])
    assert caught.value.exit_code == 2
    assert allocation(mean_bits=4, bit_choices=[4, 8]).mean_bits == 4.0


# --- any allocator ----------------------------------------------------------------------

COSTS = {
    "first": dict.fromkeys(range(2, 9), 1.0),
    "block.0/rich": {bits: 4.0**-bits for bits in range(2, 9)},
    "block.1/poor": {bits: 9 * 4.0**-bits for bits in range(2, 9)},
    "last": dict.fromkeys(range(2, 9), 1.0),
}


@pytest.mark.parametrize("name", ALLOCATORS)
@given(st.floats(2, 8), st.floats(0, 3), st.sets(st.integers(3, 8)))
def test_an_allocator_keeps_budget_choices_and_pins(
    name: str, mean: float, more: float, wider: set[int]
) -> None:
    choices = [2, *sorted(wider)]
    small, large = (
        allocate(
            LAYERS,
            matrix,
            QuantConfig(allocator=name, mean_bits=min(b, 8), bit_choices=choices),
            COSTS,
        )
        for b in (mean, mean + more)
    )
    assert list(small.bits) == [one.node for one in LAYERS]
    assert small.bits["first"] == small.bits["last"] == 8
    assert {small.bits[one] for one in ("block.0/rich", "block.1/poor")} <= set(choices)
    assert small.mean_bits <= mean
    assert small.mean_bits <= large.mean_bits


def test_config_and_allocators_agree() -> None:
    key = QuantConfig.model_fields["allocator"]
    assert get_args(key.annotation) == tuple(ALLOCATORS)
    assert set(ALLOCATORS) > MEASURING


def test_measured_errors_decide_for_gram() -> None:
    """The poor layer costs more there, and has the shorter coding length."""
    bits = allocate(LAYERS, matrix, QuantConfig(mean_bits=4, allocator="gram"), COSTS).bits
    assert bits == {"first": 8, "block.0/rich": 3, "block.1/poor": 5, "last": 8}
    other = allocation(mean_bits=4.5).bits
    assert other["block.0/rich"] > other["block.1/poor"]


def test_the_layers_that_cost_most_are_wide_in_place_of_the_first_and_last() -> None:
    """The room of these two is 192 weights; the layers between have 512 each, or 96 to 128."""
    narrow = (layer("block.2/a", 8, 12), layer("block.2/b", 8, 16))
    assert LAYERS[0].parameters + LAYERS[-1].parameters == 192

    def wide(costs: dict[str, float], **options: object) -> set[str]:
        errors = {node: {4: cost} for node, cost in costs.items()}
        config = QuantConfig.parse({"weight_bits": 4, **options})
        bits = allocate((*LAYERS, *narrow), matrix, config, errors).bits
        return {node for node, width in bits.items() if width == 8}

    costs = {"first": 2.0, "block.0/rich": 99.0, "block.1/poor": 1.0, "last": 1.0,
             "block.2/a": 9.0, "block.2/b": 4.0}  # fmt: skip
    assert wide(costs) == {"block.2/a", "first"}
    assert wide(costs, layer_bits={"*/a": 3}) == {"first", "block.2/b"}
    assert wide({**costs, "last": 99.0}) == {"last", "first"}
    assert wide(costs, act_bits=4) == {"first", "last"}
    assert wide(costs, first_last_bits=4) == set()


def test_nothing_is_measured_where_no_other_layer_could_be_wide() -> None:
    narrow = layer("block.2/a", 8, 12)
    assert moves_wide((*LAYERS, narrow), QuantConfig(weight_bits=4))
    assert not moves_wide(LAYERS, QuantConfig(weight_bits=4))
    for options in ({}, {"weight_bits": 4, "act_bits": 4}, {"mean_bits": 4}):
        assert not moves_wide((*LAYERS, narrow), QuantConfig.parse(options))


def test_bits_that_only_a_run_can_tell_are_left_out() -> None:
    result = allocation(mean_bits=4, allocator="gram", layer_bits={"*rich": 6})
    assert result.bits == {"first": 8, "block.0/rich": 6, "last": 8}
    assert math.isnan(result.mean_bits)
    assert allocation(weight_bits=4, allocator="gram").mean_bits == 4.0
    assert not measures(QuantConfig(allocator="gram"))
    assert not measures(QuantConfig(mean_bits=4))


# --- from the smallest file to the most accurate ------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_each_step_to_a_larger_file_saves_less_error_for_what_it_takes(
    sizes: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    errors = [{b: float(4.0**-b * random.uniform(0.1, 10)) for b in CHOICES} for _ in sizes]
    costs = [{b: size * (4 if b <= 4 else 8) for b in CHOICES} for size in sizes]
    row = list(by_error_saved(errors, costs))
    taken = [sum(of[b] for of, b in zip(costs, widths, strict=True)) for widths in row]
    caused = [sum(of[b] for of, b in zip(errors, widths, strict=True)) for widths in row]
    assert taken[0] == 4 * sum(sizes)
    assert taken == sorted(taken) and caused == sorted(caused, reverse=True)
    rates = -np.diff(caused) / np.diff(taken)
    assert (np.diff(rates) <= 1e-9).all()
    for widths, of in itertools.product(row, range(len(sizes))):  # the best of what costs the same
        alike = [b for b in CHOICES if costs[of][b] == costs[of][widths[of]]]
        assert errors[of][widths[of]] == min(errors[of][b] for b in alike)
