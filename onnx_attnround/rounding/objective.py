"""The error of a layer's output as a function of codes and scales, and scales that make it small.

All is exact and per output row (``moments.py``): with ``delta = s*q - W``,

    loss(q, s) = delta G delta' - 2 (W D) delta' + E |W e|^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from onnx_attnround.records import QuantSpec
from onnx_attnround.rounding.gram import Gram, identity
from onnx_attnround.rounding.moments import Moments

RIDGE = 1e-4
"""White noise on the inputs, as a share of their mean power, which keeps ``G`` well-conditioned."""

SCALE_CANDIDATES = torch.linspace(1.1, 0.3, 33)
"""Scales that are tried, as shares of the one that just holds a row's largest weight."""

HOPELESS = 2.0
"""An error so many times the least one: with smaller scales, more is cut off than that one has.

A smaller scale cuts off more, and rounds finer. What is cut off here is the error less what
rounding makes of it, which is about the least error at most.
"""


@dataclass(frozen=True, slots=True)
class Objective:
    """The layer's output error as a function of codes and scale.

    ``weight`` and ``linear`` (``W D``) are ``[g, o, d]``, ``gram`` has the ridge on
    its diagonal, ``constant`` and ``scale_floor`` are ``[g, o]``.
    Each ``block_size`` inputs have a scale of their own; without, a row is one block.
    A scale is ``[g, o, 1]``, or with blocks ``[g, o, d]``, the same all over a block.
    Rows along ``shared_axes`` (0 groups, 1 outputs) have one scale.
    """

    weight: torch.Tensor
    gram: Gram
    linear: torch.Tensor
    constant: torch.Tensor
    scale_floor: torch.Tensor
    qmin: int
    qmax: int
    shared_axes: tuple[int, ...] = ()
    block_size: int | None = None

    def loss(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Error power per output row, ``[g, o]``."""
        delta = codes * scale - self.weight
        return (delta * (self.gram.times(delta) - 2 * self.linear)).sum(-1) + self.constant

    def slope(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Half the gradient of the loss by the dequantised weight, ``[g, o, d]``."""
        return self.gram.times(codes * scale - self.weight) - self.linear

    def least_loss(self) -> torch.Tensor:
        """The loss of the best real-valued weight, ``[g, o]``: ``delta G = W D``."""
        return self.constant - (self.gram.solve(self.linear) * self.linear).sum(-1)

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        """Codes of rounding to nearest."""
        return self.clip_round(self.weight / scale)

    def clip_round(self, position: torch.Tensor) -> torch.Tensor:
        """The nearest code to a position on the grid."""
        return position.round().clamp_(self.qmin, self.qmax)

    def rows(self, part: slice) -> Objective:
        """The problem of some of the outputs."""
        return replace(
            self,
            weight=self.weight[:, part],
            linear=self.linear[:, part],
            constant=self.constant[:, part],
            scale_floor=self.scale_floor[:, part],
        )

    def pool(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum ``[g, o, ...]`` over the rows that share a scale."""
        axes = self.shared_axes
        return rows.sum(axes, keepdim=True).expand_as(rows) if axes else rows

    def blocks(self) -> Iterator[slice]:
        """The inputs that share a scale."""
        depth = self.weight.shape[-1]
        width = self.block_size or depth
        return (slice(start, min(start + width, depth)) for start in range(0, depth, width))

    def per_block(self, values: torch.Tensor) -> torch.Tensor:
        """``[g, o, d]`` as ``[g, o, blocks, inputs of a block]``, filled up with zeros."""
        if self.block_size is None:
            return values[..., None, :]
        missing = -values.shape[-1] % self.block_size
        filled = torch.nn.functional.pad(values, (0, missing))
        return filled.reshape(*values.shape[:-1], -1, self.block_size)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """One scale a block, ``[g, o, blocks]``, as codes are multiplied by it."""
        if self.block_size is None:
            return scale
        return scale.repeat_interleave(self.block_size, -1)[..., : self.weight.shape[-1]]


def objective(
    weight: torch.Tensor,
    moments: Moments,
    spec: QuantSpec,
    *,
    scale_floor: torch.Tensor,
    shared_axes: tuple[int, ...] = (),
) -> Objective:
    """The objective of a layer with weight ``[g, o, d]`` from the moments of its input."""
    return Objective(
        weight=weight,
        gram=moments.gram.ridged(RIDGE),
        linear=moments.linear,
        constant=moments.power,
        scale_floor=scale_floor,
        qmin=spec.qmin,
        qmax=spec.qmax,
        shared_axes=shared_axes,
        block_size=spec.block_size,
    )


def plain_objective(
    weight: torch.Tensor,
    spec: QuantSpec,
    *,
    scale_floor: torch.Tensor,
    shared_axes: tuple[int, ...] = (),
) -> Objective:
    """Without calibration, for nearest rounding: the error of the weight itself."""
    return Objective(
        weight=weight,
        gram=identity(weight),
        linear=weight.new_zeros(()).expand_as(weight),
        constant=weight.new_zeros(weight.shape[:2]),
        scale_floor=scale_floor,
        qmin=spec.qmin,
        qmax=spec.qmax,
        shared_axes=shared_axes,
        block_size=spec.block_size,
    )


def search_scale(problem: Objective) -> torch.Tensor:
    """The scales with the least nearest-rounding error, inputs taken uncorrelated.

    Correlations are left to the rounding: scales that the full Gram matrix picks
    for nearest rounding serve the learned rounding less well (docs/experiments.md).
    """
    widest = _widest_scale(problem)
    importance = problem.gram.diagonal[:, None, :]
    best, best_error = widest, torch.full_like(widest, math.inf)
    for factor in SCALE_CANDIDATES.tolist():
        scale = torch.maximum(widest * factor, problem.scale_floor[..., None])
        spread = problem.spread(scale)
        residue = problem.nearest(spread) * spread - problem.weight
        error = problem.pool(problem.per_block(residue.square() * importance).sum(-1))
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
        if bool((error >= HOPELESS * best_error).all()):
            break
    return problem.spread(best)


def _widest_scale(problem: Objective) -> torch.Tensor:
    """The scale of each block that just holds its largest weight, ``[g, o, blocks]``.

    Blocks of zeros take the mean of the others: their scale is free, but must be a number.
    """
    peak = problem.per_block(problem.weight.abs()).amax(-1)
    if problem.shared_axes:
        peak = peak.amax(problem.shared_axes, keepdim=True).expand_as(peak)
    scale = peak / problem.qmax
    alive = scale > torch.finfo(torch.float32).tiny
    # The weight is zero as a whole: any scale does.
    usual = scale[alive].mean() if bool(alive.any()) else scale.new_tensor(2.0**-12)
    return torch.maximum(torch.where(alive, scale, usual), problem.scale_floor[..., None])


def refit_scale(
    problem: Objective, codes: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The least-squares scale for given codes: ``(q G W' + q (W D)') / (q G q')``.

    Several blocks are fitted one after the other, each to what the rest leaves of ``W``.
    A block keeps its scale where the fit is undefined or leaves ``[s/3, 3s]``.
    """
    rest = problem.weight - codes * scale
    fitted = scale.clone()
    for block in problem.blocks():
        here = block if problem.block_size else slice(None)  # a row of one block has one scale
        held = codes[..., block]
        rest[..., block] = problem.weight[..., block]
        fitted[..., here] = _fit(problem, block, held, rest, scale[..., here])
        rest[..., block] -= held * fitted[..., here]
    return fitted


def _fit(
    problem: Objective, block: slice, codes: torch.Tensor, rest: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The scale of the codes ``[g, o, b]`` of one block that is to make up for ``rest``."""
    projected = problem.gram.times_part(codes, block)
    power = problem.pool((projected[..., block] * codes).sum(-1))
    wanted = projected.mul_(rest)
    wanted[..., block] += codes * problem.linear[..., block]
    fitted = problem.pool(wanted.sum(-1)) / power.clamp_min(torch.finfo(torch.float32).tiny)
    floor = torch.maximum(scale / 3, problem.scale_floor[..., None])
    fit = fitted[..., None]
    sound = (power[..., None] > 0) & (fit >= floor) & (fit <= 3 * scale)
    return torch.where(sound, fit, scale)
