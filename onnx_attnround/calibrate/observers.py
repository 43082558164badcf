"""Observers: streaming statistics of one activation tensor, and the range to quantise.

Every observer keeps bounded memory and gives exactly the same result however
the samples are split into batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from onnx_attnround.errors import CalibrationError
from onnx_attnround.numerics import golden_places
from onnx_attnround.qdq.arithmetic import params_from_range
from onnx_attnround.records import Array, QuantParams, QuantSpec, TensorStats

BINS = 2048
"""Histogram bins on each side of zero."""

PER_SAMPLE = 1021
"""Elements per sample that enter a histogram: prime, so that no channel is missed."""

PERCENTILE = 0.9999
"""The share of elements within the range of the percentile observer."""

_LEAST_EXPONENT = -1000
"""The least exponent of a bin's width, so that float64 holds the width and its inverse."""


Range = tuple[float, float]
Ends = tuple[bool, bool]
Candidate = tuple[float, float, float]
"""A range that is tried: its error, lower and upper end."""

LOWER, UPPER, BOTH = (True, False), (False, True), (True, True)


class Observer(Protocol):
    """Streaming statistics of one tensor, in memory that does not grow."""

    def update(self, x: Array) -> None:
        """Take in a float tensor, samples on axis 0; raises ``CalibrationError`` on NaN or Inf."""

    def range(self, spec: QuantSpec) -> Range:
        """The range to quantise, within the observed one and 0 included."""

    def stats(self, name: str) -> TensorStats:
        """The statistics of all that has been observed."""


class MinMax:
    """The exact extrema."""

    def __init__(self) -> None:
        self.count = 0
        self.lo = math.inf
        self.hi = -math.inf

    def update(self, x: Array) -> None:
        """Widen the extrema by all elements of ``x``."""
        if not x.size:
            return
        lo, hi = float(x.min()) + 0.0, float(x.max()) + 0.0  # -0.0 becomes 0.0
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise CalibrationError("holds NaN or Inf")
        self.count += x.size
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)

    def range(self, spec: QuantSpec) -> Range:
        """The extrema and 0."""
        return min(self.lo, 0.0), max(self.hi, 0.0)

    def stats(self, name: str) -> TensorStats:
        """Count and extrema; both are 0 where nothing was observed."""
        lo, hi = (self.lo, self.hi) if self.count else (0.0, 0.0)
        return TensorStats(name=name, count=self.count, lo=lo, hi=hi)


class Histogram(MinMax):
    """Extrema and a histogram of a fixed subset of elements per sample.

    Bin ``i`` holds ``[i, i + 1) * 2**exponent`` for ``-BINS <= i < BINS``. When a
    larger value arrives, neighbours merge pairwise, which is exact: the result
    depends on the largest magnitude alone, not on order or batches. Exact zeros
    are counted apart, since every range represents them without error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.samples = 0
        self.zeros = 0
        self.exponent: int | None = None
        self.bins = np.zeros(2 * BINS, np.int64)

    def update(self, x: Array) -> None:
        """Widen the extrema by all elements, and count the subset."""
        super().update(x)
        count = x.shape[0] if x.ndim else 1
        if x.size:
            self._grow(max(-self.lo, self.hi))
            self._add(_subset(x.reshape(count, -1), self.samples).astype(np.float64))
        self.samples += count

    def edges(self) -> Array:
        """The ``2 * BINS + 1`` edges of the bins, float64."""
        return np.ldexp(np.arange(-BINS, BINS + 1, dtype=np.float64), self.exponent or 0)

    def stats(self, name: str) -> TensorStats:
        """Count, extrema and the occupied part of the histogram, zeros included."""
        plain = super().stats(name)
        hist = self.bins.copy()
        hist[BINS] += self.zeros
        used = np.flatnonzero(hist)
        if not used.size:
            return plain
        start, stop = used[0], used[-1] + 1
        return TensorStats(
            name=name,
            count=plain.count,
            lo=plain.lo,
            hi=plain.hi,
            hist=hist[start:stop],
            edges=self.edges()[start : stop + 1],
        )

    def _grow(self, largest: float) -> None:
        if largest == 0:
            return
        exponent = max(math.frexp(largest)[1] - BINS.bit_length() + 1, _LEAST_EXPONENT)
        if self.exponent is None:
            self.exponent = exponent
        # Once all is in the two bins at zero, further merging changes nothing.
        for _ in range(min(exponent - self.exponent, BINS.bit_length())):
            merged = self.bins.reshape(-1, 2).sum(1)
            self.bins[:] = 0
            self.bins[BINS // 2 : BINS // 2 + BINS] = merged
        self.exponent = max(exponent, self.exponent)

    def _add(self, values: Array) -> None:
        zeros = values.size - int(np.count_nonzero(values))
        self.zeros += zeros
        if self.exponent is not None:
            index = np.floor(values * math.ldexp(1.0, -self.exponent)).astype(np.int64) + BINS
            self.bins += np.bincount(index, minlength=2 * BINS)
            self.bins[BINS] -= zeros


class Percentile(Histogram):
    """The range that holds ``PERCENTILE`` of the elements, the rest cut equally at both ends."""

    def range(self, spec: QuantSpec) -> Range:
        """Upper and lower quantile, at the outer edges of their bins."""
        lo, hi = super().range(spec)
        hist = self.bins.copy()
        hist[BINS] += self.zeros
        cut = (1 - PERCENTILE) / 2 * hist.sum()
        edges = self.edges()
        kept = np.flatnonzero((np.cumsum(hist) > cut) & (np.cumsum(hist[::-1])[::-1] > cut))
        if not kept.size:
            return lo, hi
        low, high = float(edges[kept[0]]), float(edges[kept[-1] + 1])
        return max(lo, min(low, 0.0)), min(hi, max(high, 0.0))


class Entropy(Histogram):
    """Least Kullback-Leibler divergence between the clipped and the quantised distribution.

    The method of S. Migacz, "8-bit inference with TensorRT" (2017): for each
    candidate, the elements beyond it join the outermost bin, the bins are merged
    into as many levels as the grid has, and each level is spread over its
    occupied bins again. Symmetric grids see the distribution of magnitudes;
    asymmetric ones shrink both ends alike. Exact zeros are left out.
    """

    CANDIDATES = 128
    """The ranges that are tried."""

    def range(self, spec: QuantSpec) -> Range:
        """The range of least divergence; the full one where the grid is finer than the bins."""
        lo, hi = super().range(spec)
        levels = (spec.qmax - spec.qmin + 1) // (2 if spec.symmetric else 1)
        hist = self.bins[BINS:] + self.bins[BINS - 1 :: -1] if spec.symmetric else self.bins
        used = np.flatnonzero(hist)
        if not used.size or used[-1] + 1 - used[0] <= levels:
            return lo, hi
        zero = 0 if spec.symmetric else BINS
        below, above = max(zero - int(used[0]), 0), max(int(used[-1]) + 1 - zero, 0)
        best, best_share = math.inf, 1.0
        for share in np.linspace(1.0, levels / (below + above), self.CANDIDATES):
            start, stop = zero - math.ceil(below * share), zero + math.ceil(above * share)
            divergence = _divergence(hist, start, stop, levels)
            if divergence < best:
                best, best_share = divergence, float(share)
        width = math.ldexp(1.0, self.exponent or 0)
        bottom = above if spec.symmetric else below
        return (
            max(lo, -math.ceil(bottom * best_share) * width),
            min(hi, math.ceil(above * best_share) * width),
        )


class MeanSquare(Histogram):
    """Least mean squared quantisation error over the histogram, on the grid of the spec.

    Shrinks both ends alike first, then (asymmetric grids) each end on its own.
    """

    SHARES = np.geomspace(1.0, 2.0**-9, 56)
    """The shares of the full range that are tried: a search of its own follows around the best."""
    SWEEPS = 2
    """How often each end is searched for while the other stays."""

    def range(self, spec: QuantSpec) -> Range:
        """The range of least error; never worse on the histogram than the extrema."""
        lo, hi = super().range(spec)
        best = (self.error(spec, lo, hi), lo, hi)
        if spec.symmetric:
            limit = max(-lo, hi)
            return self._search(spec, best, (-limit, limit), BOTH)[1:]
        best = self._search(spec, best, (lo, hi), BOTH)
        if lo < 0 < hi:
            for ends in (UPPER, LOWER) * self.SWEEPS:
                best = self._search(spec, best, (lo, hi), ends)
        return best[1:]

    def error(self, spec: QuantSpec, lo: float, hi: float) -> float:
        """The mean squared error over the histogram with the grid that ``[lo, hi]`` gives."""
        return float(self._errors([params_from_range(spec, lo, hi)])[0])

    def _search(self, spec: QuantSpec, best: Candidate, full: Range, ends: Ends) -> Candidate:
        """Shrink the ``ends`` of ``full``, on a coarse grid and then on a fine one; the rest stays.

        Returns ``best`` unless a candidate has less error.
        """
        lo, hi = super().range(spec)
        centre, step = 1.0, self.SHARES[0] / self.SHARES[1]
        for grid in (self.SHARES, np.geomspace(step, 1 / step, 15)):
            shares = np.minimum(grid * centre, 1.0)
            lows = np.maximum(shares * full[0], lo) if ends[0] else np.full(len(shares), best[1])
            highs = np.minimum(shares * full[1], hi) if ends[1] else np.full(len(shares), best[2])
            grids = [params_from_range(spec, *pair) for pair in zip(lows, highs, strict=True)]
            errors = self._errors(grids)
            index = int(np.argmin(errors))
            centre = float(shares[index])
            if errors[index] < best[0]:
                best = (float(errors[index]), float(lows[index]), float(highs[index]))
        return best

    def _errors(self, grids: list[QuantParams]) -> Array:
        """The mean squared error of each grid, exact for elements uniform within each bin."""
        total = int(self.bins.sum()) + self.zeros
        used = np.flatnonzero(self.bins)
        if not used.size:
            return np.zeros(len(grids))
        start, stop = used[0], used[-1] + 1
        hist = self.bins[start:stop]
        integral = _error_integral(self.edges()[start : stop + 1], grids)
        width = math.ldexp(1.0, self.exponent or 0)
        errors: Array = np.diff(integral, axis=1) @ hist / (width * total)
        return errors


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MeanSquare,
}


def _subset(rows: Array, first: int) -> Array:
    """At most ``PER_SAMPLE`` elements of each row, spread evenly, shifted by the sample's index."""
    count = rows.shape[1]
    if count <= PER_SAMPLE:
        return rows.ravel()
    # Of each sample other elements are counted, so that over many all positions have a share.
    start = np.arange(PER_SAMPLE) * count // PER_SAMPLE
    phase = golden_places(first, len(rows))
    shift = (phase * (count // PER_SAMPLE)).astype(np.int64) + np.arange(len(rows)) * count
    subset: Array = rows.ravel()[start + shift[:, None]].ravel()
    return subset


def _divergence(hist: Array, start: int, stop: int, levels: int) -> float:
    """KL divergence of ``hist`` clipped to ``[start, stop)`` from its merge into ``levels``."""
    inner = hist[start:stop].astype(np.float64)
    clipped = inner.copy()
    clipped[0] += hist[:start].sum()
    clipped[-1] += hist[stop:].sum()
    level = np.arange(len(inner)) * levels // len(inner)
    occupied = np.bincount(level, inner > 0, levels)
    mean = np.bincount(level, inner, levels) / np.maximum(occupied, 1)
    merged = np.where(inner > 0, mean[level], 0.0)
    if not merged.any():
        return math.inf
    seen = clipped > 0
    p = clipped[seen] / clipped.sum()
    # An outermost bin that holds outliers alone has no mass in the merge: a floor keeps it finite.
    q = np.maximum(merged[seen] / merged.sum(), 1e-12)
    return float(np.sum(p * np.log(p / q)))


def _error_integral(x: Array, grids: list[QuantParams]) -> Array:
    """The integral from 0 to ``x`` of the squared quantisation error, for each grid.

    With ``n`` the level nearest ``x`` and ``s`` the scale, ``n s³/12 + (x - n s)³/3``:
    whole cells contribute ``s³/12`` each, and beyond the grid ``n`` stays at its end.
    """
    scale = np.array([[float(grid.scale)] for grid in grids])
    zero = np.array([[int(grid.zero_point)] for grid in grids])
    spec = grids[0].spec
    level = np.clip(np.rint(x / scale), spec.qmin - zero, spec.qmax - zero)
    rest = x - level * scale
    integral: Array = level * (scale**3 / 12) + rest * rest * (rest / 3)
    return integral
