"""How much of what a layer can learn from its samples holds on others: chosen out of fold.

Few samples are many patches only in a convolution: a matrix product has one row for a
sample or token, often fewer than it has inputs. What is fitted on one half of the samples is
therefore judged on the other, and the other way round:

- the *correction*, the change of the real-valued weight that makes up for the error of the
  quantised prefix. It is the ridge regression ``L (G + r I)^-1`` with ``L = W D``, times a share
  for each output row;
- the ridge of the Gram matrix that the rounding minimises its error by, or nearest rounding;
- the share of the mean error that the bias takes up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from onnx_attnround.numerics import TINY
from onnx_attnround.rounding.gram import Gram
from onnx_attnround.rounding.methods import descend
from onnx_attnround.rounding.moments import Moments
from onnx_attnround.rounding.objective import Objective, search_scale

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The ridges that are tried: white noise on the inputs, as a share of their mean power."""

UNCORRELATED = 100.0
"""A ridge beside which the inputs are as good as uncorrelated: rounding is to nearest."""

TRIAL_ROWS = 32
"""So many rows of a layer are rounded on trial, to choose the ridge of all."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Changes ``[g, o, d]`` of the real-valued weight: of all samples, and of each fold.

    The latter are what regression on that fold alone finds, for others to be judged by.
    """

    whole: torch.Tensor
    folds: tuple[torch.Tensor, ...]


def no_correction(moments: Moments) -> Correction:
    """The correction that leaves the weight as it is."""
    zero = torch.zeros_like(moments.linear)
    return Correction(zero, (zero,) * len(moments.folds))


def correct(moments: Moments) -> Correction:
    """The correction with the ridge, and in each row the share, of the least error out of fold.

    With the fit ``F`` of one fold and ``L``, ``G`` of the other, the share ``c`` of a row saves
    ``2 c F L' - c^2 F G F'``; the share is halfway between what is best for the row and for the
    layer, since a row alone tells little. Ridge and share are kept for the fit of all samples.
    Twice as many samples would do with less ridge; but the prefix has been fitted to these
    samples, so that whatever is judged on them looks better than it is.
    """
    best: tuple[float, torch.Tensor, list[torch.Tensor]] | None = None
    most = 0.0
    for ridge in RIDGES if moments.folds else ():
        fits = [fold.gram.ridged(ridge).solve(fold.linear) for fold in moments.folds]
        pull, power = _judged(fits, moments.folds)
        own, common = pull / power.clamp_min(TINY), pull.sum() / power.sum().clamp_min(TINY)
        share = ((own + common) / 2).clamp(0.0, 1.0)
        saved = float((share * (2 * pull - share * power)).sum())
        if saved > most:
            most, best = saved, (ridge, share[..., None], fits)
    if best is None:
        return no_correction(moments)
    ridge, shares, fits = best
    whole = moments.gram.ridged(ridge).solve(moments.linear)
    return Correction(whole * shares, tuple(fit * shares for fit in fits))


def _judged(
    fits: Sequence[torch.Tensor], folds: Sequence[Moments]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``F L'`` and ``F G F'`` of each row ``[g, o]``, summed over the fits of the other fold."""
    pull = power = torch.zeros(())
    for fit, fold in zip(fits, reversed(folds), strict=True):
        pull = pull + (fit * fold.linear).sum(-1)
        power = power + (fold.gram.times(fit) * fit).sum(-1)
    return pull, power


def choose_ridge(problem: Objective, moments: Moments, correction: Correction) -> float | None:
    """The ridge whose rounding has the least error out of fold; ``None`` if nearest has.

    Some rows are rounded by greedy descent on each fold. The largest ridge rounds the
    corrected weight to nearest.
    """
    if not moments.folds:
        return None
    outputs = problem.weight.shape[1]
    rows = slice(None) if problem.shared_axes else slice(None, None, -(-outputs // TRIAL_ROWS))
    trial = problem.rows(rows)
    scale = search_scale(trial)
    nearest = trial.nearest(scale)
    least = sum(
        _error(nearest * scale - trial.weight, fold, rows) for fold in moments.folds
    )
    chosen = None
    for ridge in (*RIDGES, UNCORRELATED):
        error = 0.0
        for codes, fold in _rounded(trial, nearest, scale, moments, correction, ridge, rows):
            error += _error(codes * scale - trial.weight, fold, rows)
        if error < least:
            least, chosen = error, ridge
    return chosen


def _rounded(
    trial: Objective,
    nearest: torch.Tensor,
    scale: torch.Tensor,
    moments: Moments,
    correction: Correction,
    ridge: float,
    rows: slice,
) -> Iterator[tuple[torch.Tensor, Moments]]:
    """The codes of each fold, and the other fold to judge them by."""
    for fit, fold, other in zip(
        correction.folds, moments.folds, reversed(moments.folds), strict=True
    ):
        problem = towards(trial, fold.gram.ridged(ridge), fit[:, rows])
        yield descend(problem, nearest, scale), other


def towards(problem: Objective, gram: Gram, correction: torch.Tensor) -> Objective:
    """The objective with ``gram`` whose best real-valued weight is ``W`` plus ``correction``."""
    return replace(problem, gram=gram, linear=gram.times(correction))


def _error(delta: torch.Tensor, fold: Moments, rows: slice) -> float:
    """The error power of a change of the weight on a fold, less the part that no change alters."""
    return float((delta * (fold.gram.times(delta) - 2 * fold.linear[:, rows])).sum())


def mean_error(weight: torch.Tensor, delta: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The part of the output's mean error ``[g, o]`` that is sure, for the bias to take up.

    Of a mean ``m`` that is uncertain by ``n`` the share ``1 - n / m^2`` is kept (James and
    Stein). The two folds tell ``n`` as a share of the variance, for all rows together.
    """
    mean = _mean_error(weight, delta, moments)
    if not moments.folds:
        return mean
    first, second = (_mean_error(weight, delta, fold) for fold in moments.folds)
    variance = moments.error(delta).clamp_min(TINY)
    uncertainty = ((first - second).square() / (4 * variance)).mean() * variance
    return mean * (1 - uncertainty / mean.square().clamp_min(TINY)).clamp_min(0.0)


def _mean_error(weight: torch.Tensor, delta: torch.Tensor, moments: Moments) -> torch.Tensor:
    error: torch.Tensor = weight @ moments.mean_e[..., None] - delta @ moments.mean_v[..., None]
    return error[..., 0]
