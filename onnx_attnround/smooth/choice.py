"""The scales and the range of a tensor: of least error on samples that they do not come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from onnx_attnround.calibrate import OBSERVERS
from onnx_attnround.numerics import TINY
from onnx_attnround.qdq.arithmetic import params_from_range
from onnx_attnround.records import Array, LayerPlan, QuantParams, QuantSpec, Smoothing
from onnx_attnround.smooth.statistics import FOLDS, Statistics

Form = tuple[str, float]

NONE: Form = ("peak", 0.0)
FORMS: tuple[Form, ...] = (NONE, *product(("rms", "peak"), (0.25, 0.5, 0.75, 1.0)))
"""Scales that are tried: powers of a channel's root mean square or peak; 1 makes all alike."""
WORTH = 0.8
"""The share of the error that may remain on either fold; a smaller gain may be chance."""
WORTH_A_NODE = 0.5
"""The share of the error that may remain where a Mul must do it: a gain of half a bit."""
LEAST_OUTPUTS = 128
"""The products that each factor of a Mul must serve, so that it adds less than a hundredth."""
LEAST = 2.0**-8
"""Smaller channels count as this share of the largest: they lie within one of its steps."""
CLIPPED = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""The shares of the full range that are tried for an observer that clips."""
FITTED = 1 << 14
"""The activations that such a share is fitted to."""


@dataclass(frozen=True, slots=True)
class JudgedLayer:
    """A layer of the group: weight ``[g, o, d]``, and the channel of each input ``[g, d]``.

    ``spec`` is what the weight is to be rounded to.
    """

    plan: LayerPlan
    spec: QuantSpec
    weight: torch.Tensor
    channels: torch.Tensor


def choose(statistics: Statistics, layers: Sequence[JudgedLayer], observer: str) -> Smoothing:
    """The scale per channel, if any, and the observer of the range.

    What the samples of one fold suggest is judged on those of the other, and a scale must be
    better on both. Where the observer is the default, the full range is another choice.
    """
    judged = [_Outputs.of(statistics, layer) for layer in layers]

    def errors(form: Form, watches: Sequence[str]) -> dict[str, Array]:
        """Of each observer, by fold."""
        found = [_errors(statistics, judged, form, watches, fold) for fold in range(FOLDS)]
        return dict(zip(watches, np.stack(found, 1), strict=True))

    quick = ("minmax",) if observer == "minmax" else ("minmax", "clipped")
    tried = {form: min(errors(form, quick).values(), key=np.sum) for form in FORMS}
    worth = tried[NONE] * (WORTH if statistics.group.folds else _worth_a_node(layers))
    better = [form for form, error in tried.items() if (error < worth).all()]
    form = min(better, key=lambda form: float(tried[form].sum()), default=NONE)
    observers = ("minmax", "mse") if observer in ("auto", "mse") else (observer,)
    found = errors(form, observers)
    watch = min(observers, key=lambda watch: float(found[watch].sum()))
    scale = None if form == NONE else scale_of(statistics, form, range(FOLDS))
    return Smoothing(scale=scale, observer=watch)


def _worth_a_node(layers: Sequence[JudgedLayer]) -> float:
    """The share of the error that may remain if a Mul does it; 0 where that takes too long."""
    matrices = all(layer.plan.is_matrix for layer in layers)
    outputs = sum(layer.plan.parameters // layer.weight.shape[-1] for layer in layers)
    return WORTH_A_NODE if matrices and outputs >= LEAST_OUTPUTS else 0.0


def scale_of(statistics: Statistics, form: Form, folds: Sequence[int]) -> Array:
    """The scales that ``folds`` suggest, their geometric mean 1."""
    kind, strength = form
    size = statistics.peak(folds) if kind == "peak" else statistics.root_mean_square(folds)
    scale: Array = np.maximum(size, LEAST * size.max()) ** strength
    scale /= np.exp(np.log(scale).mean())
    return scale


@dataclass(frozen=True, slots=True)
class _Outputs:
    """By fold, rows of a layer's inputs ``[g, n, d]`` and what it makes of them, ``[g, n, o]``."""

    layer: JudgedLayer
    rows: Sequence[torch.Tensor]
    wanted: Sequence[torch.Tensor]

    @classmethod
    def of(cls, statistics: Statistics, layer: JudgedLayer) -> _Outputs:
        """What no scale changes, computed once."""
        rows = [statistics.rows(layer.plan, fold) for fold in range(FOLDS)]
        return cls(layer, rows, [each @ layer.weight.transpose(1, 2) for each in rows])


def _errors(
    statistics: Statistics,
    judged: Sequence[_Outputs],
    form: Form,
    observers: Sequence[str],
    fold: int,
) -> Array:
    """The error of the layers' outputs on the rows of ``fold``, relative to their power.

    One with each of ``observers``.
    """
    others = [other for other in range(FOLDS) if other != fold]
    scale = scale_of(statistics, form, others)
    low, high = statistics.ends(others)
    ends = float((low / scale).min()), float((high / scale).max())
    factors = torch.from_numpy(scale)
    totals = np.zeros(len(observers))
    for each in judged:
        layer, wanted = each.layer, each.wanted[fold]
        by_input = factors[layer.channels][:, None]
        learned, rows = (each.rows[f] / by_input for f in (others[0], fold))
        rounded = _nearest(layer.weight * by_input, layer.spec).transpose(1, 2)
        power = max(float(wanted.square().sum()), TINY)
        for index, observer in enumerate(observers):
            x = _activations(rows, learned, ends, statistics.group.spec, observer)
            totals[index] += float((x @ rounded).sub_(wanted).square_().sum()) / power
    return totals


def _activations(
    x: torch.Tensor,
    learned: torch.Tensor,
    ends: tuple[float, float],
    spec: QuantSpec | None,
    observer: str,
) -> torch.Tensor:
    """``x`` on the grid that ``observer`` would find for ``learned``, of the full range ``ends``.

    ``clipped`` stands for those that clip: of some shares of the range, the one of least error.
    """
    if spec is None:
        return x
    if observer not in ("minmax", "clipped"):
        watch = OBSERVERS[observer]()
        watch.update(learned.flatten(0, 1).numpy())
        return _on_grid(x, params_from_range(spec, *watch.range(spec)))
    shares = (1.0,) if observer == "minmax" else CLIPPED
    some = learned.flatten()[:: max(learned.numel() // FITTED, 1)]
    grids = [params_from_range(spec, ends[0] * share, ends[1] * share) for share in shares]
    errors = [float((_on_grid(some, grid) - some).square().sum()) for grid in grids]
    return _on_grid(x, grids[int(np.argmin(errors))])


def _on_grid(x: torch.Tensor, params: QuantParams) -> torch.Tensor:
    spec, scale, zero = params.spec, float(params.scale), float(params.zero_point)
    codes = (x / scale).round_().add_(zero).clamp_(spec.qmin, spec.qmax)
    return codes.sub_(zero).mul_(scale)


def _nearest(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The weight on its grid, a scale for each row, block or, per tensor, in all."""
    if spec.block_size is not None:
        depth = weight.shape[-1]
        padded = torch.nn.functional.pad(weight, (0, -depth % spec.block_size))
        blocks = _rounded(padded.reshape(*weight.shape[:-1], -1, spec.block_size), spec)
        return blocks.flatten(-2)[..., :depth]
    rows = weight.flatten() if spec.axis is None else weight
    return _rounded(rows, spec).reshape(weight.shape)


def _rounded(rows: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Scales by the largest magnitude, or by a share of it where few bits gain by that."""
    peak = rows.abs().amax(-1, keepdim=True).clamp_min(TINY) / spec.qmax
    best = (rows / peak).round_().clamp_(spec.qmin, spec.qmax).mul_(peak)
    if spec.bits > 6:
        return best
    least = (best - rows).square().sum(-1, keepdim=True)
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):
        scale = peak * share
        tried = (rows / scale).round_().clamp_(spec.qmin, spec.qmax).mul_(scale)
        error = (tried - rows).square().sum(-1, keepdim=True)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best
