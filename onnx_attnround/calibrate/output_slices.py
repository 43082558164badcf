"""Outputs of the float model in slices: how far others are from them, and what is lost.

Boxes beside scores, or classes that come up seldom, count for nothing in an output as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_attnround.numerics import TINY
from onnx_attnround.records import Array

FAINT = 1e-4
"""Slices and values that stay below this share of an output's largest magnitude do not count."""

LENGTHS = range(2, 513)
"""The lengths of axes that are compared slice by slice: of classes, coordinates, channels."""

KEPT = 0.8
"""An extreme that keeps less than this share of its distance from its slice's mean is lost.

A score above a threshold may be below it with a fifth less, and then what it is of is not found.
"""

OTHER_KIND = 10.0
"""Slices whose extreme is so many times smaller than the next larger one are of another kind."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What was found of one output in a batch: the error and weight of each sample ``[n]``.

    ``lost`` is how many extremes of slices are lost.
    """

    errors: Array
    weights: Array
    lost: int


class Slices:
    """The slices of one output along each axis of moderate length, as the float model gives them.

    An output has one slice, itself, if it has no such axis or its shape changes. All are of
    ``one_kind``, or of those that :func:`kinds_of` finds.
    """

    def __init__(self, batches: Sequence[Array], *, one_kind: bool = False) -> None:
        self._fixed = len({values.shape[1:] for values in batches}) == 1
        self.expected = [self._rows(values) for values in batches]
        self._first = np.cumsum([0, *(len(rows) for rows in self.expected)])
        lengths = self.expected[0].shape[1:] if self._fixed else ()
        self._axes = [axis for axis, length in enumerate(lengths, 1) if length in LENGTHS] or [0]
        joined = np.concatenate(self.expected)
        largest = float(np.abs(joined).max(initial=0.0))
        self._along = [
            _Along.of(self._sliced(joined, axis), largest, one_kind) for axis in self._axes
        ]
        self.weights = [self._weights(rows) for rows in self.expected]

    def compare(self, batch: int, values: Array) -> Compared:
        """What is found in a batch; where the shape is another, each sample has the error 1."""
        wanted, got, weights = self.expected[batch], self._rows(values), self.weights[batch]
        if got.shape != wanted.shape:
            return Compared(np.ones(len(wanted)), weights, 0)
        if not wanted.size:
            return Compared(np.zeros(len(wanted)), weights, 0)
        errors, lost = [], 0
        for axis, along in zip(self._axes, self._along, strict=True):
            expected, other = self._sliced(wanted, axis), self._sliced(got, axis)
            errors.append(along.errors(expected, other))
            lost += along.lost(other, int(self._first[batch]))
        return Compared(np.mean(errors, 0), weights, lost)

    def _weights(self, rows: Array) -> Array:
        """The share of each sample ``[n]`` of the signal, times their number: mean over slices.

        Samples of a detector with nothing on them tell little of its scores.
        """
        if not rows.size:
            return np.zeros(len(rows))
        along = zip(self._axes, self._along, strict=True)
        weights: Array = np.mean([each.weights(self._sliced(rows, at)) for at, each in along], 0)
        return weights

    def _rows(self, values: Array) -> Array:
        """Samples ``[n, ...]``, float64; where shapes change, all elements in a row."""
        finite = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
        return np.atleast_1d(finite) if self._fixed else finite.ravel()

    def _sliced(self, values: Array, axis: int) -> Array:
        """``[n, slices, elements]``."""
        if axis == 0:
            return values.reshape(len(values), 1, -1)
        moved = np.moveaxis(values, axis, 1)
        return moved.reshape(*moved.shape[:2], -1)


@dataclass(frozen=True, slots=True)
class _Along:
    """The yardstick for errors of the slices along one axis.

    ``powers`` and ``squares`` are the means over samples, and over slices of one kind, of sums
    of squares and of fourth powers; ``counted`` are the slices that count. ``extremes`` are
    where each slice has its highest and its lowest value, counted over all samples, and these
    values; they are measured from ``means``. All are ``[slices]``.
    """

    powers: Array
    squares: Array
    counted: Array
    means: Array
    extremes: tuple[tuple[Array, Array], ...]

    @classmethod
    def of(cls, expected: Array, largest: float, one_kind: bool) -> _Along:
        flat = expected.swapaxes(0, 1).reshape(expected.shape[1], -1)
        found = [flat.argmax(1), flat.argmin(1)]
        at = np.arange(len(flat))
        reach = np.abs(flat).max(1)
        counted = reach > FAINT * largest
        kinds = np.zeros(len(reach), np.int64) if one_kind else kinds_of(reach)
        return cls(
            powers=_mean_of_kind(np.square(expected).sum(2).mean(0), kinds, counted),
            squares=_mean_of_kind((expected**4).sum(2).mean(0), kinds, counted),
            counted=counted,
            means=flat.mean(1),
            extremes=tuple((place, flat[at, place]) for place in found),
        )

    def errors(self, expected: Array, got: Array) -> Array:
        """The error of each sample ``[n]``: mean over the slices that count."""
        noise = np.square(got - expected)
        shares = noise.sum(2) / self.powers + (noise * expected**2).sum(2) / self.squares
        errors: Array = shares[:, self.counted].sum(1) / (2 * max(int(self.counted.sum()), 1))
        return errors

    def weights(self, expected: Array) -> Array:
        """The power of each sample ``[n]`` over the mean: mean over the slices that count."""
        shares = np.square(expected).sum(2) / self.powers
        weights: Array = shares[:, self.counted].sum(1) / max(int(self.counted.sum()), 1)
        return weights

    def lost(self, got: Array, first: int) -> int:
        """How many extremes keep less than ``KEPT`` of their distance from the mean.

        Of those in the samples ``got``, before which there are ``first`` others.
        """
        flat = got.swapaxes(0, 1).reshape(got.shape[1], -1)
        at, lost = np.arange(len(flat)), 0
        for place, value in self.extremes:
            here = place - first * got.shape[2]
            inside = (here >= 0) & (here < flat.shape[1])
            distance = value - self.means
            found = flat[at, np.where(inside, here, 0)] - self.means
            kept = found / np.where(distance == 0, 1.0, distance)
            lost += int(((kept < KEPT) & (distance != 0) & self.counted & inside).sum())
        return lost


def kinds_of(reach: Array) -> Array:
    """A number for the kind of each slice, from their extremes ``[slices]``.

    Slices are of one kind where, sorted by their extremes, none is much smaller than the one
    before: rows of a picture, classes that come up often and seldom; boxes in pixels and scores
    are two.
    """
    order = np.argsort(-reach, kind="stable")
    apart = reach[order][:-1] > OTHER_KIND * reach[order][1:]
    kinds = np.empty(len(reach), np.int64)
    kinds[order] = np.concatenate([[0], np.cumsum(apart)])
    return kinds


def _mean_of_kind(values: Array, kinds: Array, counted: Array) -> Array:
    """For each slice the mean over those of its kind that count."""
    sums = np.bincount(kinds, values * counted)
    means: Array = np.maximum(sums / np.maximum(np.bincount(kinds, counted), 1), TINY)
    return means[kinds]
