"""Rounding: what every method promises, and what makes Attention Round itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_attnround.records import QuantSpec
from onnx_attnround.rounding import methods
from onnx_attnround.rounding import objective as objective_module
from onnx_attnround.rounding.gram import dense, identity
from onnx_attnround.rounding.methods import ROUNDERS, TAU, Solution, attention_codes, descend, solve
from onnx_attnround.rounding.moments import Moments
from onnx_attnround.rounding.objective import (
    RIDGE,
    Objective,
    objective,
    plain_objective,
    refit_scale,
    search_scale,
)

TINY = torch.finfo(torch.float32).tiny


@dataclass
class Problem:
    """An objective and the samples that it stands for: ``x`` and ``v`` are ``[g, n, d]``."""

    objective: Objective
    x: torch.Tensor
    v: torch.Tensor

    def direct(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The loss from its definition: ``mean |W x - Q v|^2`` and the ridge, in float64."""
        weight, quantised = self.objective.weight.double(), (codes * scale).double()
        errors = self.x @ weight.mT - self.v @ quantised.mT
        power = self.v.square().mean((1, 2)).clamp_min(1e-12)
        ridge = RIDGE * power[:, None] * (quantised - weight).square().sum(-1)
        return errors.square().mean(1) + ridge

    def unit(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What rounding errors of the loss are measured by: the terms that it is made of."""
        ridge = RIDGE * self.v.square().mean((1, 2)).clamp_min(1e-12)[:, None]
        powers = [
            (rows.abs() @ matrix.abs().mT).square().mean(1) + ridge * matrix.square().sum(-1)
            for rows in (self.x, self.v)
            for matrix in (self.objective.weight.double(), (codes * scale).double())
        ]
        return sum(powers, torch.full_like(powers[0], 1e-30))


def problem_of(
    weight: torch.Tensor,
    x: torch.Tensor,
    v: torch.Tensor,
    spec: QuantSpec,
    *,
    floor: float = TINY,
    shared: tuple[int, ...] = (),
) -> Problem:
    """The uncentred objective of ``weight [g, o, d]`` on samples ``[g, n, d]``."""
    x, v = x.double(), v.double()
    e, count = x - v, x.shape[1]
    moments = Moments(
        gram=dense((v.mT @ v / count).float()),
        linear=(weight.double() @ (e.mT @ v) / count).float(),
        mean_v=v.mean(1).float(),
        mean_e=e.mean(1).float(),
        power=(e @ weight.double().mT).square().mean(1).float(),
        signal=(x @ weight.double().mT).var(1, correction=0).float(),
    )
    floors = torch.full(weight.shape[:2], floor)
    problem = objective(weight, moments, spec, scale_floor=floors, shared_axes=shared)
    return Problem(problem, x, v)


def spec_of(bits: int, *, limit: int | None = None, block: int | None = None) -> QuantSpec:
    return QuantSpec(
        bits=bits, signed=True, symmetric=True, limit=limit, axis=0, block_size=block
    )


def inputs(kind: str, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    """Samples ``[g, n, d]`` of one kind."""
    noise = torch.randn(shape, generator=generator)
    if kind == "correlated":
        return noise.cumsum(-1) + 1.0
    if kind == "constant":
        return noise[:, :1].expand(shape).clone()
    if kind == "rank 1":
        return noise[..., :1] * noise[:, :1]
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "relu":
        return noise.clamp_min(0.0) * (torch.rand(shape[-1], generator=generator) > 0.3)
    return noise


@st.composite
def problems(draw: st.DrawFn, max_depth: int = 12) -> Problem:
    groups, outputs = draw(st.sampled_from([(1, 4), (1, 1), (3, 2), (6, 1)]))
    depth, count = draw(st.integers(1, max_depth)), draw(st.sampled_from([1, 5, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(groups, outputs, depth, generator=generator)
    if draw(st.booleans()):
        weight[0, 0] = 0.0
    if draw(st.booleans()):
        weight[-1, -1, -1] = 40.0
    if draw(st.integers(0, 9)) == 0:
        weight.zero_()
    weight *= 10.0 ** draw(st.integers(-9, 9))
    kinds = st.sampled_from(["normal", "correlated", "constant", "rank 1", "zero", "relu"])
    x = inputs(draw(kinds), (groups, count, depth), generator)
    v = x + draw(st.sampled_from([0.0, 0.05, 1.0])) * torch.randn(x.shape, generator=generator)
    factor = 10.0 ** draw(st.integers(-6, 6))
    floor = draw(st.sampled_from([TINY, TINY, 0.01, 10.0])) * float(weight.abs().max())
    block = draw(st.sampled_from([None, None, 1, 3, 4, 16]))  # whether it divides or not
    spec = spec_of(draw(st.integers(2, 8)), limit=draw(st.sampled_from([None, 3, 64])), block=block)
    shared = () if block else draw(st.sampled_from([(), (0,), (0, 1)]))
    return problem_of(weight, x * factor, v * factor, spec, floor=max(floor, TINY), shared=shared)


def assert_sound(problem: Objective, codes: torch.Tensor, scale: torch.Tensor) -> None:
    assert codes.shape == problem.weight.shape
    assert torch.equal(codes, codes.round())
    assert problem.qmin <= int(codes.min())
    assert int(codes.max()) <= problem.qmax
    assert bool(scale.isfinite().all())
    assert bool((scale >= problem.scale_floor[..., None]).all())
    assert scale.shape == (problem.weight if problem.block_size else scale[..., :1]).shape
    for block in problem.blocks() if problem.block_size else ():
        shared = scale[..., block]
        assert torch.equal(shared, shared[..., :1].expand_as(shared))
    for axis in problem.shared_axes:
        assert torch.equal(scale, scale.narrow(axis, 0, 1).expand_as(scale))


def losses(target: Objective, solution: Solution) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss ``[g, o]`` of a solution, and that of rounding to nearest."""
    one = torch.ones_like(solution.scale)
    return target.loss(solution.codes, solution.scale), target.loss(solution.nearest, one)


# --- what every method promises ---------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(problems(), st.sampled_from(sorted(ROUNDERS)), st.sampled_from([0, 1, 15]))
def test_sound_and_never_worse_than_nearest(problem: Problem, method: str, steps: int) -> None:
    solution = solve(problem.objective, method, steps=steps, seed=0)
    assert_sound(problem.objective, solution.codes, solution.scale)
    scale = search_scale(problem.objective)
    nearest = problem.objective.nearest(scale)
    assert_sound(problem.objective, nearest, scale)
    assert 0.0 <= solution.changed <= 1.0
    assert solution.changed == float((solution.codes != nearest).float().mean())
    pool = problem.objective.pool
    unit = pool(problem.unit(nearest, scale))
    loss, loss_nearest = losses(problem.objective, solution)
    assert bool((pool(loss) <= pool(loss_nearest) + 1e-6 * unit).all())
    if method == "nearest":
        assert torch.equal(solution.codes, nearest)
        assert torch.equal(solution.scale, scale)
        assert solution.changed == 0.0


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(sorted(ROUNDERS)))
def test_loss_is_the_error_of_the_layers_output(problem: Problem, method: str) -> None:
    solution = solve(problem.objective, method, steps=10, seed=1)
    scale = search_scale(problem.objective)
    nearest = problem.objective.nearest(scale)
    for codes, step in ((solution.codes, solution.scale), (nearest, scale)):
        loss = problem.objective.loss(codes, step)
        difference = (loss - problem.direct(codes, step)).abs()
        assert bool((difference <= 3e-5 * problem.unit(codes, step)).all())


@settings(deadline=None, max_examples=40)
@given(problems(), st.integers(0, 2**20))
def test_refitting_the_scale_never_costs(problem: Problem, seed: int) -> None:
    """Whatever the codes, and down to the floor at most."""
    target = problem.objective
    scale = search_scale(target)
    noise = torch.randn(target.weight.shape, generator=torch.Generator().manual_seed(seed))
    for codes in (target.nearest(scale), target.clip_round(target.weight / scale + 2 * noise)):
        refitted = refit_scale(target, codes, scale)
        assert_sound(target, codes, refitted)
        before, after = (target.pool(target.loss(codes, s)) for s in (scale, refitted))
        unit = target.pool(problem.unit(codes, scale) + problem.unit(codes, refitted))
        assert bool((after <= before + 1e-6 * unit).all())


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_method_makes_worse_is_nearest_again(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, or for all rows of a scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 6, generator=generator)
    target = problem_of(torch.randn(2, 3, 6, generator=generator), x, x, spec_of(3),
                        shared=(0,) if shared else ()).objective  # fmt: skip
    scale = search_scale(target)
    nearest, good = target.nearest(scale), descend(target, target.nearest(scale), scale)
    back = torch.zeros(2, 3, 1, dtype=torch.bool)
    back[0, 1], back[1, 1] = True, shared
    bad, coarse = good.clone(), torch.where(back, 2 * scale, scale)
    bad[0, 1] = -nearest[0, 1]
    monkeypatch.setitem(ROUNDERS, "bad", lambda *_: (bad, coarse))
    solution = solve(target, "bad", steps=1, seed=0)
    assert torch.equal(solution.codes, torch.where(back, nearest, good))
    assert torch.equal(solution.scale, scale)


def test_a_refitted_scale_is_the_least_squares_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = inputs("correlated", (2, 50, 6), generator)
    weight = torch.randn(2, 3, 6, generator=generator)
    for shared in ((), (0,), (0, 1)):
        target = problem_of(weight, x, x + 0.1, spec_of(3), shared=shared).objective
        scale = search_scale(target)
        codes = target.nearest(scale)
        fitted = refit_scale(target, codes, scale)
        assert not torch.equal(fitted, scale)
        least = target.pool(target.loss(codes, fitted))
        for factor in (0.98, 1.02):
            assert bool((target.pool(target.loss(codes, fitted * factor)) > least).all())


@settings(deadline=None, max_examples=40)
@given(problems(max_depth=7), st.integers(0, 2**20))
def test_descent_never_costs_and_ends_where_no_move_gains(problem: Problem, seed: int) -> None:
    target = problem.objective
    scale = search_scale(target)
    generator = torch.Generator().manual_seed(seed)
    start = target.clip_round(
        target.weight / scale + torch.randn(target.weight.shape, generator=generator)
    )
    codes = descend(target, start, scale)
    assert_sound(target, codes, scale)
    unit = problem.unit(start, scale) + problem.unit(codes, scale)
    loss = problem.direct(codes, scale)
    assert bool((loss <= problem.direct(start, scale) + 3e-5 * unit).all())
    for _ in range(50):  # the number of moves is bounded: strongly correlated inputs need more
        codes, last = descend(target, codes, scale), codes
        if torch.equal(codes, last):
            break
    loss = problem.direct(codes, scale)
    stiffness = (target.gram.diagonal[:, None] * scale.square()).mean(-1)
    for at, level in itertools.product(
        range(codes.shape[-1]), range(target.qmin, target.qmax + 1, 1 if target.qmax < 8 else 5)
    ):
        moved = codes.clone()
        moved[..., at] = level
        slack = 3e-5 * (unit + problem.unit(moved, scale)) + 1e-6 * stiffness
        assert bool((problem.direct(moved, scale) >= loss - slack).all())


@pytest.mark.parametrize("size", [None, 3])
def test_descent_in_blocks_ends_where_no_move_gains(
    size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "WHOLE", 10)
    monkeypatch.setattr(methods, "PANEL", 5)
    generator = torch.Generator().manual_seed(0)
    x = inputs("correlated", (2, 200, 17), generator)
    weight = torch.randn(2, 4, 17, generator=generator)
    problem = problem_of(weight, x, x, spec_of(4, block=size))
    target = problem.objective
    scale = search_scale(target)
    start = target.nearest(scale)
    codes = descend(target, start, scale)
    loss = problem.direct(codes, scale)
    assert bool((loss <= problem.direct(start, scale)).all())
    assert float(loss.sum()) < 0.5 * float(problem.direct(start, scale).sum())
    for at, step in itertools.product(range(17), (-2, -1, 1, 2)):
        moved = codes.clone()
        moved[..., at] = (moved[..., at] + step).clamp(target.qmin, target.qmax)
        assert bool((problem.direct(moved, scale) >= loss * (1 - 1e-4)).all())


@pytest.mark.parametrize("method", sorted(ROUNDERS))
def test_the_same_seed_gives_the_same_bytes(method: str) -> None:
    target = correlated(0).objective
    first, again = (solve(target, method, steps=20, seed=7) for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scale, again.scale)
    torch.manual_seed(5)
    third = solve(target, method, steps=20, seed=7)
    assert torch.equal(first.codes, third.codes)


def test_another_seed_starts_elsewhere() -> None:
    target = correlated(0).objective
    scale = search_scale(target)
    found = {
        attention_codes(target, scale, 3, torch.Generator().manual_seed(seed)).numpy().tobytes()
        for seed in range(4)
    }
    assert len(found) == 4


@pytest.mark.parametrize("method", sorted(ROUNDERS))
@pytest.mark.parametrize("factor", [1e-38, 1e-25, 1e25])
def test_weights_of_absurd_size_still_give_codes(method: str, factor: float) -> None:
    problem = correlated(0)
    weight = problem.objective.weight * factor
    target = problem_of(weight, problem.x, problem.v, spec_of(4)).objective
    solution = solve(target, method, steps=5, seed=0)
    assert_sound(target, solution.codes, solution.scale)


@pytest.mark.parametrize("block", [None, 4])
def test_without_calibration_the_error_of_the_weight_counts(block: int | None) -> None:
    weight = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    floor = torch.full((2, 3), TINY)
    target = plain_objective(weight, spec_of(3, block=block), scale_floor=floor)
    solution = solve(target, "nearest", steps=0, seed=0)
    error = (solution.codes * solution.scale - weight).square().sum(-1)
    torch.testing.assert_close(target.loss(solution.codes, solution.scale), error)


@pytest.mark.parametrize("method", sorted(ROUNDERS))
@pytest.mark.parametrize("block", [None, 4])
def test_rows_a_part_at_a_time_are_as_good(
    method: str, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = correlated(0)
    target = replace(problem.objective, block_size=block)
    whole = solve(target, method, steps=20, seed=0)
    monkeypatch.setattr(methods, "MOST_WEIGHTS", 3 * 24)  # three rows, of eight
    parts = solve(target, method, steps=20, seed=0)
    assert_sound(target, parts.codes, parts.scale)
    torch.testing.assert_close(parts.nearest, whole.nearest)
    assert float(losses(target, parts)[0].sum()) < 1.1 * float(losses(target, whole)[0].sum())
    assert parts.changed == pytest.approx(whole.changed, abs=0.1)


def test_the_searched_scale_beats_the_widest() -> None:
    """With an outlier at 3 bits, clipping it is worth its cost."""
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    floor = torch.full((1, 8), TINY)
    target = plain_objective(weight, spec_of(3), scale_floor=floor)
    widest = weight.abs().amax(-1, keepdim=True) / target.qmax
    scale = search_scale(target)
    assert bool((scale < widest).any())
    before, after = (target.loss(target.nearest(s), s) for s in (widest, scale))
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.9 * float(before.sum())


# --- Attention Round --------------------------------------------------------------------


def phi(z: float) -> float:
    """The Gaussian distribution function."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def first_codes(position: float, count: int, bits: int = 4) -> torch.Tensor:
    """Where the first offsets send ``count`` weights that stand at ``position`` on the grid."""
    seen: list[torch.Tensor] = []

    class Recorder(Objective):
        __slots__ = ()

        def clip_round(self, position: torch.Tensor) -> torch.Tensor:
            seen.append(Objective.clip_round(self, position))
            return seen[-1]

    spec = spec_of(bits)
    target = Recorder(
        weight=torch.full((1, 1, count), position),
        gram=identity(torch.zeros(1, 1, count)),
        linear=torch.zeros(1, 1, count),
        constant=torch.zeros(1, 1),
        scale_floor=torch.full((1, 1), TINY),
        qmin=spec.qmin,
        qmax=spec.qmax,
    )
    attention_codes(target, torch.ones(1, 1, 1), 1, torch.Generator().manual_seed(3))
    return seen[1]  # the first call rounds to nearest


@pytest.mark.parametrize("position", [0.0, 0.3, -1.5, 2.49])
def test_first_codes_are_drawn_from_the_gaussian_of_their_distance(position: float) -> None:
    """``P(q = k) = Phi((k + 1/2 - z) / tau) - Phi((k - 1/2 - z) / tau)``, by chi-square."""
    count = 4000
    codes = first_codes(position, count).flatten().numpy()
    chi, cells = 0.0, 0
    for level in range(-8, 8):
        share = phi((level + 0.5 - position) / TAU) - phi((level - 0.5 - position) / TAU)
        found = int((codes == level).sum())
        if share * count < 5:
            assert found < 25
            continue
        chi += (found - share * count) ** 2 / (share * count)
        cells += 1
    assert cells >= 2
    assert chi < cells + 5 * math.sqrt(2 * cells)
    levels, counts = np.unique(codes, return_counts=True)
    assert abs(levels[counts.argmax()] - position) <= 0.51


def test_every_level_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wider the offsets, the farther the levels: nothing but the Gaussian forbids one."""
    monkeypatch.setattr(methods, "TAU", 4.0)
    codes = first_codes(0.2, 4000).flatten()
    assert sorted(set(codes.int().tolist())) == list(range(-8, 8))
    inner = [int((codes == level).sum()) for level in range(7)]
    assert inner[0] > inner[3] > inner[6]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_moves_back_pass_and_moves_away_fade(sign: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that reaches the offsets, against its formula."""
    problem = correlated(1)
    target = problem.objective
    scale = search_scale(target)
    offsets, gradients = [], []

    def record(parameter: torch.Tensor, gradient: torch.Tensor, *rest: object) -> None:
        offsets.append(parameter.clone())
        gradients.append(gradient.clone())

    monkeypatch.setattr(methods, "_adam", record)
    attention_codes(target, scale, 1, torch.Generator().manual_seed(0))
    offset, got = offsets[0], gradients[0]
    plain = target.slope(target.clip_round(target.weight / scale + offset), scale) * scale
    erf = torch.erf(offset / (TAU * math.sqrt(2)))
    wanted = plain * (0.5 + 0.5 * torch.where(plain >= 0, erf, -erf))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    # A step goes against the gradient: with offset and gradient of one sign, it leads back.
    back = (offset * plain > 0) & (offset * sign > 0)
    away = (offset * plain < 0) & (offset * sign > 0)
    weight = got / plain
    assert float(weight[back].min()) >= 0.5
    assert float(weight[away].min()) > 0.0
    assert float(weight[away].max()) <= 0.5


def correlated(seed: int, bits: int = 3) -> Problem:
    """A layer as a quantised prefix feeds it: correlated inputs, a little off the float ones."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=generator) * torch.logspace(0, -1.5, 24)
    x = (torch.randn(1, 400, 24, generator=generator) @ mixing.T + 0.3).clamp_min(0.0)
    v = x + 0.03 * torch.randn(x.shape, generator=generator)
    weight = torch.randn(1, 8, 24, generator=generator)
    return problem_of(weight, x, v, spec_of(bits))


def decibels(method: str, bits: int) -> float:
    """Mean gain over nearest rounding on some layers, in dB; lower is better."""
    gains = []
    for seed in range(3):
        target = correlated(seed, bits).objective
        loss, loss_nearest = losses(target, solve(target, method, steps=30, seed=seed))
        gains.append(10 * math.log10(float(loss.sum() / loss_nearest.sum())))
    return sum(gains) / len(gains)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_attention_round_earns_decibels(bits: int) -> None:
    attention = decibels("attention", bits)
    assert attention < -3.0
    assert attention <= decibels("adaround", bits)
    assert decibels("nearest", bits) == 0.0


def test_learning_earns_something_beyond_the_descent() -> None:
    """Attention Round then descent, against descent from nearest alone (no steps)."""
    targets = [correlated(seed, 2).objective for seed in range(8)]
    learned, greedy = (
        sum(math.log10(float(losses(t, solve(t, "attention", steps=steps, seed=0))[0].sum()))
            for t in targets)
        for steps in (100, 0)
    )  # fmt: skip
    assert learned < greedy


def test_the_least_loss_is_that_of_the_best_real_valued_weight() -> None:
    target = correlated(0).objective
    gram, linear = target.gram.part(slice(None)).double(), target.linear.double()
    best = target.weight.double() + torch.linalg.solve(gram, linear.mT).mT
    one, least = torch.ones(1, 8, 1), target.least_loss()
    torch.testing.assert_close(least, target.loss(best.float(), one), rtol=1e-3, atol=1e-6)
    assert bool((least <= losses(target, solve(target, "attention", steps=30, seed=0))[0]).all())


@pytest.mark.parametrize(("input_error", "draws"), [(0.0, 1), (100.0, 0)])
def test_draws_are_made_only_where_rounding_matters(
    input_error: float, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []

    def record(problem: Objective, codes: torch.Tensor, *rest: object) -> torch.Tensor:
        made.append(codes)
        return codes

    monkeypatch.setattr(methods, "resample", record)
    target = correlated(0).objective
    nearest = target.loss(target.nearest(search_scale(target)), search_scale(target))
    target = replace(target, constant=target.constant + input_error * nearest)
    solve(target, "attention", steps=10, seed=0)
    assert len(made) == draws


@pytest.mark.parametrize(("input_error", "learned"), [(0.0, True), (100.0, False)])
def test_offsets_are_learned_only_where_rounding_matters(
    input_error: float, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[torch.Tensor] = []
    usual = methods.attention_codes

    def record(problem: Objective, scale: torch.Tensor, *rest: object) -> torch.Tensor:
        starts.append(scale)
        return usual(problem, scale, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(methods, "attention_codes", record)
    target = correlated(0).objective
    scale = search_scale(target)
    constant = target.constant + input_error * target.loss(target.nearest(scale), scale)
    target = replace(target, constant=constant)
    found = solve(target, "attention", steps=10, seed=0)
    assert bool(starts) == learned
    best = descend(target, target.nearest(scale), scale)
    gained = bool((target.loss(found.codes, found.scale) < target.loss(best, scale)).any())
    assert gained == learned


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_are_searched_until_smaller_ones_are_hopeless(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = correlated(3, bits).objective
    quick = search_scale(target)
    monkeypatch.setattr(objective_module, "HOPELESS", math.inf)
    torch.testing.assert_close(quick, search_scale(target), rtol=0, atol=0)


def test_a_floor_holds_the_scale_up() -> None:
    problem = correlated(0)
    free = solve(problem.objective, "attention", steps=10, seed=0)
    floor = free.scale[..., 0] * torch.tensor([0.5, 1.5] * 4)
    target = replace(problem.objective, scale_floor=floor)
    for method in ROUNDERS:
        solution = solve(target, method, steps=10, seed=0)
        assert_sound(target, solution.codes, solution.scale)
