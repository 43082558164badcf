"""Second moments of a layer's input: all that the rounding of its weight needs to know.

With ``x`` the float input patches, ``v`` those of the quantised prefix and
``e = x - v``, the output error of codes ``q`` is, per output row and exactly,

    E |W x - Q v|^2 = E |W e|^2 - 2 (W D)·delta + delta G delta',   delta = Q - W,
    G = E[v v'],  D = E[e v'],

so that a step of the optimiser costs ``o d^2`` and no activations. Where the
layer has a bias, moments are centred: the best bias for any ``Q`` is then
implied, and is ``b + W E[x] - Q E[v]``.

The sums are kept apart for two folds of the samples, so that what is fitted on one
can be judged on the other (``cross_validation.py``); those of all samples are their sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from onnx_attnround.numerics import golden_places
from onnx_attnround.ops import input_grid
from onnx_attnround.records import LayerPlan, QuantParams
from onnx_attnround.rounding.gram import Gram, dense, diagonal, factored

FOLDS = 2
"""The parts of the samples, by turns, of which each judges what is fitted on the other."""

NEIGHBOURS = 16
"""So many samples in a row go to one fold at most: neighbours, as in a recording, are alike."""

LEAST_RUNS = 8
"""Few samples are dealt out in at least so many runs, so that both folds have some of all."""

PER_INPUT = 512
"""The patches that are looked at for each entry of a patch, up to ``ENOUGH`` in all."""

ENOUGH = 16384
"""Patches of a layer that are enough, unless ``LEAST_PER_INPUT`` asks for more."""

LEAST_PER_INPUT = 32
"""The patches that are looked at for each entry of a patch, at least."""

WIDE = 8192
"""The most inputs whose ``G`` is summed up; of more, ``WIDE_PATCHES`` patches are kept instead."""

WIDE_PATCHES = 8192
"""The patches that are kept of a layer with more than ``WIDE`` inputs."""

MANY_INPUTS = 128
"""From so many inputs on, products take so long that bfloat16 is worth its error."""

PIECE = 4 << 20
"""The numbers in patches of one stream that are looked at together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Means over sampled patches; torch tensors, float32.

    ``gram`` is ``G``, ``linear`` ``W D`` ``[g, o, d]``; ``mean_v`` and ``mean_e`` ``[g, d]``;
    ``power`` is ``E |W e|^2`` and ``signal`` the variance of ``W x``, both ``[g, o]``.
    ``folds`` are the moments of two halves of the samples; a single sample has none.
    """

    gram: Gram
    linear: torch.Tensor
    mean_v: torch.Tensor
    mean_e: torch.Tensor
    power: torch.Tensor
    signal: torch.Tensor
    folds: tuple[Moments, ...] = ()

    def error(self, change: torch.Tensor) -> torch.Tensor:
        """The error power ``[g, o]`` of the output for a ``change [g, o, d]`` of the weight."""
        linear = 2 * self.linear
        found = (change * (self.gram.times(change) - linear)).sum(-1) + self.power
        return found.clamp_min(0.0)

    @property
    def finite(self) -> bool:
        """Whether no sum overflowed, as squares of inputs beyond some 1e18 do."""
        means = (self.linear, self.mean_v, self.mean_e, self.power, self.signal)
        return self.gram.finite and all(bool(mean.isfinite().all()) for mean in means)

    def mixed(self, other: Moments, share: float) -> Moments:
        """The mean of these and ``other``, which another reader has of the same weight.

        ``share`` is what the latter count in it.
        """
        return Moments(
            gram=self.gram.mixed(other.gram, share),
            linear=torch.lerp(self.linear, other.linear, share),
            mean_v=torch.lerp(self.mean_v, other.mean_v, share),
            mean_e=torch.lerp(self.mean_e, other.mean_e, share),
            power=torch.lerp(self.power, other.power, share),
            signal=torch.lerp(self.signal, other.signal, share),
            folds=tuple(
                one.mixed(another, share)
                for one, another in zip(self.folds, other.folds, strict=False)
            ),
        )


def collect(
    layer: LayerPlan,
    weight: torch.Tensor,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    count: int,
    params: QuantParams | None,
    *,
    centred: bool,
    correlations: bool = True,
) -> Moments:
    """Moments of ``layer`` from ``(x, v)`` batches of ``count`` samples in all.

    Without ``correlations`` the Gram matrix has its diagonal alone, and ``W D`` is zero: rounding
    to nearest needs no more, and the products take most of the time.
    ``weight`` is ``[g, o, d]``, on the device of the batches. ``v`` are codes where
    ``params`` is given. Which patches are sampled depends on a sample's running index
    alone, not on the batch that it comes in; those that are not finite,
    as masked positions are in some models, are left out.
    """
    depth, scale = weight.shape[-1], 1.0 if params is None else float(params.scale)
    codes = params is not None and params.spec.bits <= 8
    kind = _Products if depth <= WIDE else _Patches
    short = codes and depth >= MANY_INPUTS
    folds = [kind(weight, short) if correlations else _Powers(weight) for _ in range(FOLDS)]
    seen, wanted = 0, wanted_patches(depth, correlations=correlations)
    each = -(-wanted // max(count, 1))
    for x, v in batches:
        # Judged once for the batch, since to look at each patch takes longer.
        finite = bool(x.isfinite().all()) and bool(v.isfinite().all())
        for samples, rows_x, rows_v in _rows(layer, x, v, params, seen, each, depth):
            e = torch.sub(rows_x, rows_v, alpha=scale)
            for fold, part in _fold_slices(seen, samples, count, rows_v.shape[1]):
                kept = slice(None) if finite else e[:, part].isfinite().all(-1).all(0)
                folds[fold].add(rows_v[:, part][:, kept], e[:, part][:, kept], scale)
            seen += samples
    if not seen:
        raise ValueError("no batches")
    return _moments([fold for fold in folds if fold.total] or folds[:1], centred=centred)


def _fold_slices(
    seen: int, samples: int, count: int, rows: int
) -> Iterator[tuple[int, slice]]:
    """The fold of each run of neighbours in a batch, and where its patches lie among ``rows``.

    ``seen`` samples came before. The fold of a sample depends on its running index alone.
    """
    run = max(min(NEIGHBOURS, count // LEAST_RUNS), 1)
    start, end = seen, seen + samples
    while start < end:
        stop = min(start - start % run + run, end)
        part = slice(*((at - seen) * rows // samples for at in (start, stop)))
        if part.start < part.stop:
            yield start // run % FOLDS, part
        start = stop


def _moments(folds: Sequence[_Sums], *, centred: bool) -> Moments:
    """The moments over all folds, with those of each if there are several."""
    means = [sum_ / folds[0].total for sum_ in folds[0].sums]
    parts: tuple[Moments, ...] = ()
    if len(folds) > 1:
        parts = tuple(_moments([fold], centred=centred) for fold in folds)
        total = sum(fold.total for fold in folds)
        means = [sum(sums) / total for sums in zip(*(fold.sums for fold in folds), strict=True)]
    mean_v, mean_e, power = means[:3]
    gram, linear, signal = folds[0].second(folds, means)
    out_e = (folds[0].weight @ mean_e[..., None])[..., 0]
    if centred:
        gram = gram.centred(mean_v)
        linear = torch.baddbmm(linear, out_e[:, :, None], mean_v[:, None, :], alpha=-1)
        power = power - out_e.square()
    return Moments(
        gram=gram,
        linear=linear,
        mean_v=mean_v,
        mean_e=mean_e,
        power=power.clamp_min(0.0),
        signal=signal.clamp_min(0.0),
        folds=parts,
    )


def _rows(
    layer: LayerPlan,
    x: torch.Tensor,
    v: torch.Tensor,
    params: QuantParams | None,
    seen: int,
    each: int,
    depth: int,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """How many samples, and their sampled patches in both streams, ``[g, n, d]``, piece by piece.

    ``each`` are wanted of a sample. Those of ``v`` are in steps of their scale, from zero: small
    integers, they stay exact in bfloat16 (:func:`_short_products`); the sums are scaled later.
    """
    zero = 0.0 if params is None else float(params.zero_point)
    grid_x, grid_v = (input_grid(layer, _plain(values)) for values in (x, v))
    width = max(min(each, grid_x.count) * depth * grid_x.groups, 1)
    step = max(PIECE // width, 1)
    for start in range(0, len(grid_x.x), step):
        piece_x, piece_v = (
            replace(grid, x=grid.x[start : start + step]) for grid in (grid_x, grid_v)
        )
        samples = len(piece_x.x)
        sources = piece_x.sources(_positions(samples, piece_x.count, seen + start, each))
        rows_v = piece_v.rows(sources, zero).float()
        yield samples, piece_x.rows(sources), rows_v if params is None else rows_v.sub_(zero)


def _plain(values: torch.Tensor) -> torch.Tensor:
    """The values in a type that torch has all kernels for."""
    return values.int() if values.dtype == torch.uint16 else values


def wanted_patches(depth: int, *, correlations: bool = True) -> int:
    """How many patches of ``depth`` entries are looked at, where there are as many.

    Powers alone need no more of them the more entries there are.
    """
    if depth > WIDE:
        return WIDE_PATCHES
    enough = min(PER_INPUT * depth, ENOUGH)
    return max(enough, LEAST_PER_INPUT * depth) if correlations else enough


def _positions(samples: int, positions: int, seen: int, each: int) -> torch.Tensor:
    """Flat positions ``[samples, p]``: all of them, or a low-discrepancy subset of ``each``."""
    if each >= positions:
        return torch.arange(positions).expand(samples, positions)
    places = golden_places(seen * each, samples * each)
    chosen = np.floor(places * positions).astype(np.int64)
    return torch.from_numpy(chosen.reshape(samples, each))


class _Sums(ABC):
    """Running sums over the patches of one fold: means first, then what the kind adds."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.sums: list[torch.Tensor] = []
        self.total = 0

    def add(self, v: torch.Tensor, e: torch.Tensor, scale: float) -> None:
        """Take in patches ``v``, in steps of ``scale``, and their errors ``e``, ``[g, n, d]``."""
        out_e = e @ self.weight.transpose(1, 2)
        products = self.products(v, e, out_e, scale)
        parts = [v.sum(1).mul_(scale), e.sum(1), out_e.square_().sum(1), *products]
        if self.sums:
            parts = [a.add_(b) for a, b in zip(self.sums, parts, strict=True)]
        self.sums = parts
        self.total += v.shape[1]

    @abstractmethod
    def products(
        self, v: torch.Tensor, e: torch.Tensor, out_e: torch.Tensor, scale: float
    ) -> list[torch.Tensor]:
        """Sums of products over the patches of a batch."""

    @abstractmethod
    def second(
        self, folds: Sequence[_Sums], means: Sequence[torch.Tensor]
    ) -> tuple[Gram, torch.Tensor, torch.Tensor]:
        """``G``, ``W D`` and the variance of ``W x`` of all ``folds``, from ``means`` of sums."""

    def variance(
        self, gram: Gram, linear: torch.Tensor, means: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The variance of ``W x = W v + W e``, ``[g, o]``."""
        mean = (self.weight @ (means[0] + means[1])[..., None])[..., 0]
        power = ((gram.times(self.weight) + 2 * linear) * self.weight).sum(-1) + means[2]
        return power - mean.square()


class _Products(_Sums):
    """``G`` from ``v v'``, and ``W D`` from ``W e v'`` or ``e v'``, whichever is smaller."""

    def __init__(self, weight: torch.Tensor, short: bool) -> None:
        super().__init__(weight)
        self._short = short
        self._is_narrow = weight.shape[1] <= weight.shape[2]

    def products(
        self, v: torch.Tensor, e: torch.Tensor, out_e: torch.Tensor, scale: float
    ) -> list[torch.Tensor]:
        with _short_products(self._short):
            gram, cross = _product(v, v), _product(out_e if self._is_narrow else e, v)
        return [gram.mul_(scale * scale), cross.mul_(scale)]

    def second(
        self, folds: Sequence[_Sums], means: Sequence[torch.Tensor]
    ) -> tuple[Gram, torch.Tensor, torch.Tensor]:
        gram = dense(means[3])
        linear = means[4] if self._is_narrow else self.weight @ means[4]
        return gram, linear, self.variance(gram, linear, means)


class _Patches(_Sums):
    """``G`` from the patches ``v`` themselves, ``W D`` from ``W e v'``."""

    def __init__(self, weight: torch.Tensor, short: bool) -> None:
        super().__init__(weight)
        self.rows: list[torch.Tensor] = []

    def products(
        self, v: torch.Tensor, e: torch.Tensor, out_e: torch.Tensor, scale: float
    ) -> list[torch.Tensor]:
        self.rows.append(v * scale)
        return [out_e.transpose(1, 2) @ self.rows[-1]]

    def second(
        self, folds: Sequence[_Sums], means: Sequence[torch.Tensor]
    ) -> tuple[Gram, torch.Tensor, torch.Tensor]:
        kept = [rows for fold in folds if isinstance(fold, _Patches) for rows in fold.rows]
        gram = factored(torch.cat(kept, 1))
        return gram, means[3], self.variance(gram, means[3], means)


class _Powers(_Sums):
    """The diagonal of ``G`` alone, and the variance of ``W x`` from the outputs."""

    def products(
        self, v: torch.Tensor, e: torch.Tensor, out_e: torch.Tensor, scale: float
    ) -> list[torch.Tensor]:
        out_x = out_e.add(v @ self.weight.transpose(1, 2), alpha=scale)
        return [v.square().sum(1).mul_(scale * scale), out_x.square().sum(1)]

    def second(
        self, folds: Sequence[_Sums], means: Sequence[torch.Tensor]
    ) -> tuple[Gram, torch.Tensor, torch.Tensor]:
        mean = (self.weight @ (means[0] + means[1])[..., None])[..., 0]
        return diagonal(means[3]), torch.zeros_like(self.weight), means[4] - mean.square()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a' b`` for each group, ``[g, d, d]``; torch is slower on a batch of one."""
    return (a[0].T @ b[0])[None] if len(a) == 1 else a.transpose(1, 2) @ b


@contextmanager
def _short_products(allowed: bool) -> Iterator[None]:
    """Where ``allowed``, multiply in bfloat16 and add in float32, if the hardware is faster so.

    Exact for products of two 8-bit codes, which bfloat16 holds; of a product with
    ``e`` each term is within 2^-9 of its value, at random. GPUs take TF32, within 2^-11.
    """
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else usual)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)
