"""How weights are rounded: Attention Round and the methods that it is measured against.

All methods minimise one objective, that of ``objective.py``.

Attention Round follows Diao et al., "Attention Round for Post-Training
Quantization", arXiv 2207.03088, as far as its abstract tells: a weight may go
to any level, with a probability that decays as a Gaussian of the distance. The
formulas below are our own derivation of that idea.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from onnx_attnround.rounding.objective import Objective, refit_scale, search_scale

TAU = 0.5
"""The standard deviation of the first offsets, in steps of the grid."""

LEARNING_RATE = 0.2
"""The first learning rate of Adam, in steps of the grid."""

WHOLE = 640
"""Up to so many inputs, greedy descent looks at a row as a whole; else at panels of it."""

PANEL = 128
"""The inputs of a panel: adjacent columns of the weight that descend together."""

SWEEPS = 8
"""The passes over all panels at most."""

REFITS = 3
"""How often a least-squares scale and a descent follow each other."""

RESAMPLES = 20
"""The draws around the solution, for layers of up to ``WHOLE`` inputs."""

RESAMPLE_TAU = 0.25
"""The standard deviation of these draws, in steps of the grid."""

WORTH_STEPS = 0.1
"""Offsets are learned if rounding by descent alone causes this share of the error, ..."""

WORTH_DRAWS = 0.03
"""... and draws are made if it causes this share in the end: they save a fifth of it at best."""

MOST_WEIGHTS = 1 << 23
"""The weights that are rounded together at most: a dozen tensors of that size are alive."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Codes ``[g, o, d]`` of one layer, and their scale as in ``Objective``.

    ``nearest`` is the weight ``[g, o, d]`` that rounding to nearest gives; ``changed`` is the share
    of codes that differ from its codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    nearest: torch.Tensor
    changed: float


def solve(problem: Objective, method: str, *, steps: int, seed: int) -> Solution:
    """Round one layer; never worse than nearest rounding, row by row, on the objective.

    The rows of a large layer are taken a part at a time, to bound the memory.
    """
    found = [_solve(part, method, steps, seed) for part in _parts(problem)]
    if len(found) == 1:
        return found[0]
    rows = [part.codes.shape[1] for part in found]
    return Solution(
        codes=torch.cat([part.codes for part in found], 1),
        scale=torch.cat([part.scale for part in found], 1),
        nearest=torch.cat([part.nearest for part in found], 1),
        changed=sum(n * part.changed for n, part in zip(rows, found, strict=True)) / sum(rows),
    )


def _parts(problem: Objective) -> Iterator[Objective]:
    """The problem, or problems of some of its rows each, with up to ``MOST_WEIGHTS`` weights."""
    groups, outputs, depth = problem.weight.shape
    size = max(MOST_WEIGHTS // (groups * depth), 1)
    if problem.shared_axes or size >= outputs:
        yield problem
        return
    for start in range(0, outputs, size):
        yield problem.rows(slice(start, start + size))


def _solve(problem: Objective, method: str, steps: int, seed: int) -> Solution:
    scale = search_scale(problem)
    nearest = problem.nearest(scale)
    generator = torch.Generator().manual_seed(seed)
    codes, final_scale = ROUNDERS[method](problem, scale, steps, generator)
    loss, loss_nearest = problem.loss(codes, final_scale), problem.loss(nearest, scale)
    # Rows that share a scale must change it together.
    worse = problem.pool(loss) > problem.pool(loss_nearest)
    codes = torch.where(worse[..., None], nearest, codes)
    final_scale = torch.where(worse[..., None], scale, final_scale)
    return Solution(
        codes=codes,
        scale=final_scale,
        nearest=nearest * scale,
        changed=float((codes != nearest).float().mean()),
    )


# --- methods ----------------------------------------------------------------------------

Rounder = Callable[
    [Objective, torch.Tensor, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]
]


def round_nearest(
    problem: Objective, scale: torch.Tensor, steps: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounding to nearest."""
    return problem.nearest(scale), scale


def round_attention(
    problem: Objective, scale: torch.Tensor, steps: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention Round, greedy descent and least-squares scales in turn, then resampling.

    Where little is left to gain, greedy descent from nearest rounding is all.
    """
    codes = descend(problem, problem.nearest(scale), scale)
    if not _matters(problem, codes, scale, WORTH_STEPS):
        return codes, scale
    if steps:
        codes = descend(problem, attention_codes(problem, scale, steps, generator), scale)
    for _ in range(REFITS):
        scale = refit_scale(problem, codes, scale)
        codes = descend(problem, codes, scale)
    if steps and codes.shape[-1] <= WHOLE and _matters(problem, codes, scale, WORTH_DRAWS):
        codes = resample(problem, codes, scale, generator)
        scale = refit_scale(problem, codes, scale)
        codes = descend(problem, codes, scale)
    return codes, scale


def _matters(
    problem: Objective, codes: torch.Tensor, scale: torch.Tensor, share: float
) -> bool:
    """Whether the error is above that of real-valued weights by more than a ``share`` of it.

    At 8 bits it rarely is: there most of the error comes in with the layer's input, and no
    rounding takes it away.
    """
    loss = problem.loss(codes, scale).sum()
    return not bool(loss - problem.least_loss().sum() < share * loss)


def resample(
    problem: Objective, codes: torch.Tensor, scale: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Draw Gaussian offsets around the codes anew, descend from there, keep rows that gain.

    Leaves the local minimum that greedy descent ends in; about one weight in
    twenty moves each time.
    """
    best, best_loss = codes, problem.loss(codes, scale)
    for _ in range(RESAMPLES):
        offset = _normal(codes, generator).mul_(RESAMPLE_TAU)
        drawn = descend(problem, problem.clip_round(best + offset), scale)
        loss = problem.loss(drawn, scale)
        better = loss < best_loss
        best = torch.where(better[..., None], drawn, best)
        best_loss = torch.where(better, loss, best_loss)
    return best


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal draws in the shape of a tensor, the same on each device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def attention_codes(
    problem: Objective, scale: torch.Tensor, steps: int, generator: torch.Generator
) -> torch.Tensor:
    """Learn an offset for each weight, and keep the best codes seen in each row.

    Forward ``q = clip(round(W/s + a))`` with ``a ~ N(0, tau^2)`` at the start, so
    that ``P(q = k) = Phi((k+1/2-z)/tau) - Phi((k-1/2-z)/tau)``. Backward, the
    straight-through gradient ``g`` is weighted by the Gaussian attention of where
    ``a`` stands, ``1/2 + sign(g) erf(a / (tau sqrt 2)) / 2``: moves back toward the
    weight pass, moves further away fade, yet never to zero.
    """
    position = problem.weight / scale
    # The gradient is known in closed form, so Adam is written out on bare tensors, in place:
    # there is no graph of operations to build and to keep.
    offset = _normal(position, generator) * TAU
    momentum, variance = torch.zeros_like(offset), torch.zeros_like(offset)
    best = problem.nearest(scale)
    best_loss = problem.loss(best, scale)
    for step in range(1, steps + 1):
        codes = problem.clip_round(position + offset)
        slope = problem.slope(codes, scale)
        # ``problem.loss`` once more, by way of the slope, which is needed anyway.
        loss = ((codes * scale - problem.weight) * (slope - problem.linear)).sum(-1)
        loss += problem.constant
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best[better] = codes[better]
        gradient = slope.mul_(scale)
        attention = torch.erf(offset / (TAU * math.sqrt(2)))
        gradient.mul_(torch.where(gradient >= 0, attention, -attention).add_(1.0).mul_(0.5))
        _adam(offset, gradient, momentum, variance, step, steps)
    return best


def _adam(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    momentum: torch.Tensor,
    variance: torch.Tensor,
    step: int,
    steps: int,
) -> None:
    """One step of Adam, in place, with a cosine decay of the learning rate."""
    momentum.lerp_(gradient, 0.1)
    variance.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
    rate *= math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    tiny = torch.finfo(torch.float32).tiny
    parameter.addcdiv_(momentum, variance.sqrt().add_(tiny), value=-rate)


def descend(problem: Objective, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Greedy coordinate descent: in each row the weight moves that gains most, to any level.

    Up to ``WHOLE`` inputs are looked at together, until no move of a single weight
    gains. More are taken in panels, so that a move costs the width of a panel; how the
    moves in a panel change the slope of the other inputs is made up by one product after
    it, for the rows that moved. ``SWEEPS`` bounds the passes, of which later ones look at those
    rows alone that the one before has moved.
    """
    depth = codes.shape[-1]
    slope = problem.slope(codes, scale)
    if depth <= WHOLE:
        return _descend_panel(problem, codes, slope, scale, slice(None))
    codes = codes.clone()
    rows = torch.arange(codes.shape[1], device=codes.device)
    for _ in range(SWEEPS):
        moved = torch.zeros_like(rows, dtype=torch.bool)
        state, excess, steps = codes[:, rows], slope[:, rows], scale[:, rows]
        for start in range(0, depth, PANEL):
            panel = slice(start, min(start + PANEL, depth))
            step = steps[..., panel] if problem.block_size else steps
            better = _descend_panel(problem, state, excess, step, panel)
            change = (better - state[..., panel]).mul_(step)
            changed = change.any(-1).any(0)
            if bool(changed.any()):
                state[..., panel] = better
                excess[:, changed] += problem.gram.times_part(change[:, changed], panel)
                moved |= changed
        codes[:, rows], slope[:, rows] = state, excess
        rows = rows[moved]
        if not len(rows):
            break
    return codes


def _descend_panel(
    problem: Objective,
    codes: torch.Tensor,
    slope: torch.Tensor,
    scale: torch.Tensor,
    panel: slice,
) -> torch.Tensor:
    """Codes ``[g, o, b]`` of one panel of inputs, from which no single move gains.

    With the excess ``u_j = h_j / (s_j G_jj)`` of the slope ``h``, in steps of the
    grid, the best move of code ``j`` is ``k = round(q_j - u_j) - q_j``, within the
    range, and changes the loss by ``s_j^2 G_jj k (2 u_j + k)``. A move of ``i`` adds
    ``k s_i G_ij / (s_j G_jj)`` to the excess of ``j``. Rows that are done drop out.
    """
    groups, outputs, _ = codes.shape
    # Rows of all groups are flattened into one batch, so that each step is a few large operations.
    group = torch.arange(groups, device=codes.device).repeat_interleave(outputs)
    gram = problem.gram.part(panel)
    diagonal = gram.diagonal(dim1=1, dim2=2)[group]
    pull = gram / gram.diagonal(dim1=1, dim2=2)[:, None, :]  # of input i on the excess of j
    pull, first = pull.flatten(0, 1), group * pull.shape[1]
    result = codes[..., panel].reshape(len(group), -1).clone()
    step = scale.reshape(len(group), -1)
    excess = slope[..., panel].reshape(result.shape) / (diagonal * step)
    step = (step / step.amax(1, keepdim=True)).expand_as(excess)  # all 1 without blocks
    # Gains are compared within a row alone: relative to its mean, one threshold fits all rows.
    weight = diagonal * step.square()
    weight = weight / weight.mean(1, keepdim=True)
    state, active = result.clone(), torch.arange(len(result), device=codes.device)
    for _ in range(8 * result.shape[1] + 256):  # a bound; rows are done long before
        move = torch.sub(state, excess).round_().clamp_(problem.qmin, problem.qmax).sub_(state)
        gain, where = torch.add(move, excess, alpha=2).mul_(move).mul_(weight).min(1)
        gains = gain < -1e-6  # smaller ones are rounding errors of float32, and would never end
        left = int(gains.sum())
        taken = move.gather(1, where[:, None]).mul_(gains[:, None])
        state.scatter_add_(1, where[:, None], taken)
        push = pull.index_select(0, first + where).mul_(taken)
        if problem.block_size:
            push.mul_(step.gather(1, where[:, None])).div_(step)
        excess += push
        # To pick out the rows that go on costs a copy of all, so it is done when it pays.
        if left < 0.75 * len(active):
            result[active] = state
            if not left:
                break
            active, state, excess = active[gains], state[gains], excess[gains]
            weight, first, step = weight[gains], first[gains], step[gains]
    result[active] = state
    return result.reshape(groups, outputs, -1)


@torch.enable_grad()
def round_adaround(
    problem: Objective, scale: torch.Tensor, steps: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """AdaRound: up or down, by a rectified sigmoid that a regulariser drives to 0 or 1.

    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization",
    arXiv 2004.10568: stretch (-0.1, 1.1), beta annealed 20 to 2 after a fifth of
    the steps, Adam on the exact objective. It is given ten steps for each of
    Attention Round's; learning rate and weight of the regulariser are the best of
    those tried for 500 steps (docs/experiments.md).
    """
    steps *= 10
    position = problem.weight / scale
    floor = position.floor()
    fraction = (position - floor).clamp(0.01, 0.99)
    logits = torch.logit((fraction + 0.1) / 1.2).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    unit = problem.gram.diagonal.mean() * scale.square().mean()
    for step in range(steps):
        upness = (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1)
        soft = (floor + upness).clamp(problem.qmin, problem.qmax)
        loss = problem.loss(soft, scale).sum() / unit
        done = step / steps
        if done > 0.2:
            beta = 2 + 18 * 0.5 * (1 + math.cos(math.pi * (done - 0.2) / 0.8))
            loss = loss + (1 - (2 * upness - 1).abs().pow(beta)).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    up = (logits.detach() > 0).to(floor.dtype)
    return (floor + up).clamp(problem.qmin, problem.qmax), scale


ROUNDERS: dict[str, Rounder] = {
    "attention": round_attention,
    "adaround": round_adaround,
    "nearest": round_nearest,
}
