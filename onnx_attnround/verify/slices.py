"""What the SQNR of a whole output hides: its slices, lost extremes, values that no longer move.

A slice is all that an output holds at one index of one of its axes, over all
samples: a class, a coordinate of boxes, a channel.
"""

from __future__ import annotations

import numpy as np

from onnx_attnround.calibrate.output_slices import FAINT, LENGTHS, OTHER_KIND
from onnx_attnround.records import Array
from onnx_attnround.verify.results import Extreme, WorstSlice

KEPT = 0.5
"""An output whose extreme keeps less than this share of its distance from the mean is of no use."""

MINOR = 0.1
"""Slices of classes that never come up stay below this share of an output's largest magnitude."""

CHUNK = 1 << 20
"""The elements that are looked at together, in float64."""

X, E, XX, EE, XE = range(5)  # rows of the sums, of what is expected (x) and of the error (e)
HIGH, LOW, GOT_HIGH, GOT_LOW = range(4)  # rows of the extremes, of what is expected and got


class Details:
    """Streaming figures of one output, over batches ``[n, ...]`` of finite numbers.

    Its slices are all of ``one_kind``, or of kinds that their sizes tell.
    """

    def __init__(self, *, one_kind: bool = False) -> None:
        self._one_kind = one_kind
        self.whole = Along()
        self.axes: dict[int, Along] | None = None
        self.moving: Moving | None = None
        self._tail: tuple[int, ...] | None = None

    def add(self, expected: Array, got: Array) -> None:
        """Add one batch; axes whose length changes from batch to batch are left out."""
        if not expected.size:
            return
        self._keep_common_axes(expected.shape)
        rows = expected.shape[0] if expected.ndim else 1
        step = max(1, CHUNK * rows // expected.size)
        for start in range(0, rows, step):
            block = np.atleast_1d(expected)[start : start + step].astype(np.float64)
            other = np.atleast_1d(got)[start : start + step].astype(np.float64)
            self._add(block, other)

    def _add(self, expected: Array, got: Array) -> None:
        error = got - expected
        self.whole.add(expected.reshape(1, 1, -1), error.reshape(1, 1, -1))
        for axis, along in (self.axes or {}).items():
            shape = int(np.prod(expected.shape[:axis])), expected.shape[axis], -1
            along.add(expected.reshape(shape), error.reshape(shape))
        if self.moving is not None:
            self.moving.add(expected, got)

    def _keep_common_axes(self, shape: tuple[int, ...]) -> None:
        tail = shape[1:]
        if self.axes is None:
            self.axes = {
                axis: Along(length)
                for axis, length in enumerate(tail, start=1)
                if length in LENGTHS
            }
            self.moving = Moving()
        elif tail != self._tail:
            self.moving = None
            same = len(tail) == len(self._tail or ())
            self.axes = {
                axis: along
                for axis, along in self.axes.items()
                if same and tail[axis - 1] == along.length
            }
        self._tail = tail

    @property
    def frozen(self) -> float | None:
        """The share of an output's elements that vary with the samples in the float model alone."""
        return (
            None if self.moving is None else self.moving.frozen(FAINT * float(self.whole.peak[0]))
        )

    @property
    def correlation(self) -> float | None:
        """The correlation of all values with the float model's; ``None`` where these are equal."""
        found = float(self.whole.correlation[0])
        return None if np.isnan(found) else found

    def worst_slices(self) -> tuple[WorstSlice, ...]:
        """Along each axis the slice of the lowest SQNR, of those that count."""
        found = []
        for axis, along in (self.axes or {}).items():
            sqnr = np.where(self._counted(along), along.sqnr_db, np.inf)
            index = int(np.argmin(sqnr))
            found.append(WorstSlice(axis=axis, index=index, sqnr_db=float(sqnr[index])))
        return tuple(found)

    def lost_extreme(self) -> Extreme | None:
        """The slice that keeps the least of its extreme, if that is lost; or the whole output.

        Small slices beside large ones may be beneath the resolution of 8 bits for both.
        That is no loss where larger ones of their kind are kept: the probabilities of
        classes that never come up. It is one where none is: scores beside boxes in pixels.
        """
        found = []
        for axis, along in ((None, self.whole), *(self.axes or {}).items()):
            reach, kept = along.reach
            fine = self._excused(along, kept >= KEPT) & (reach < MINOR * self.whole.peak)
            lost = self._counted(along) & (kept < KEPT) & ~fine
            found += [along.extreme(axis, int(index)) for index in np.flatnonzero(lost)]
        return min(found, key=lambda each: each.kept, default=None)

    def drowned_slice(self, least_db: float) -> WorstSlice | None:
        """The worst slice below ``least_db``, of those without a larger better one of their kind.

        With such a one, a slice may be of a class that is rare in the samples.
        """
        found = []
        for axis, along in (self.axes or {}).items():
            sqnr = along.sqnr_db
            poor = self._counted(along) & (sqnr < least_db)
            poor &= ~self._excused(along, sqnr >= least_db)
            found += [
                WorstSlice(axis=axis, index=int(index), sqnr_db=float(sqnr[index]))
                for index in np.flatnonzero(poor)
            ]
        return min(found, key=lambda each: each.sqnr_db, default=None)

    def _counted(self, along: Along) -> Array:
        counted: Array = along.peak > FAINT * self.whole.peak
        return counted

    def _excused(self, along: Along, sound: Array) -> Array:
        """Slices with a larger one of their kind that is ``sound``; booleans ``[length]``.

        Slices are of one kind where that is known, and where, sorted by their extremes, none
        is much smaller than the one before.
        """
        reach, _ = along.reach
        excused = np.zeros(along.length, bool)
        last, has_sound = np.inf, False
        for index in np.argsort(-reach, kind="stable"):
            has_sound &= self._one_kind or bool(reach[index] * OTHER_KIND >= last)
            excused[index] = has_sound
            has_sound |= bool(sound[index])
            last = reach[index]
        return excused


class Along:
    """Sums and extremes of the slices along one axis of an output; a whole output is one slice."""

    def __init__(self, length: int = 1) -> None:
        self.length = length
        self.count = 0  # elements in a slice so far
        self.sums = np.zeros((5, length))
        self.ends = np.tile([[-np.inf], [np.inf], [-np.inf], [np.inf]], length)

    def add(self, expected: Array, error: Array) -> None:
        """Add elements ``[before, length, behind]``, float64."""
        self.count += expected.size // self.length
        got = expected + error
        self.sums[X] += expected.sum((0, 2))
        self.sums[E] += error.sum((0, 2))
        self.sums[XX] += np.einsum("bsa,bsa->s", expected, expected)
        self.sums[EE] += np.einsum("bsa,bsa->s", error, error)
        self.sums[XE] += np.einsum("bsa,bsa->s", expected, error)
        for row, array in ((HIGH, expected), (GOT_HIGH, got)):
            np.maximum(self.ends[row], array.max((0, 2)), out=self.ends[row])
        for row, array in ((LOW, expected), (GOT_LOW, got)):
            np.minimum(self.ends[row], array.min((0, 2)), out=self.ends[row])

    @property
    def peak(self) -> Array:
        """The largest magnitude expected, ``[length]``."""
        peak: Array = np.maximum(self.ends[HIGH], -self.ends[LOW])
        return peak

    @property
    def sqnr_db(self) -> Array:
        """``[length]``; ``inf`` where there is no error, ``-inf`` where there is nothing else."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = 10 * np.log10(self.sums[XX] / self.sums[EE])
        return np.where(self.sums[EE] == 0, np.inf, ratio)

    @property
    def correlation(self) -> Array:
        """The correlation with the values expected, ``[length]``; NaN where these are constant."""
        count = max(self.count, 1)
        x, e, xx, ee, xe = self.sums
        signal, noise, common = xx - x * x / count, ee - e * e / count, xe - x * e / count
        got = signal + 2 * common + noise
        least = 1e-12 * (xx + ee)  # what is below is left of rounding
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (signal + common) / np.sqrt(signal * got)
        return np.where(signal > least, np.where(got > least, found, 0.0), np.nan)

    @property
    def reach(self) -> tuple[Array, Array]:
        """The distance of the expected extreme from the mean, and the share of it that is kept.

        Each ``[length]``; of the two extremes the one that lies farther away.
        """
        mean = self.sums[X] / max(self.count, 1)
        up, down = self.ends[HIGH] - mean, mean - self.ends[LOW]
        got = np.where(up >= down, self.ends[GOT_HIGH] - mean, mean - self.ends[GOT_LOW])
        reach = np.maximum(up, down)
        least = np.maximum(reach, np.finfo(np.float64).tiny)
        return reach, np.where(reach > 0, got / least, 1.0)

    def extreme(self, axis: int | None, index: int) -> Extreme:
        """The extreme of one slice in both models."""
        mean = self.sums[X, index] / max(self.count, 1)
        high, low, got_high, got_low = self.ends[:, index]
        upper = high - mean >= mean - low
        return Extreme(
            axis=axis,
            index=index,
            kept=max(float(self.reach[1][index]), 0.0),
            expected=float(high if upper else low),
            got=float(got_high if upper else got_low),
        )


class Moving:
    """Which elements of a sample's output vary from sample to sample."""

    def __init__(self) -> None:
        self._first: Array | None = None  # sample of what is got, [...]
        self._moved: Array = np.zeros((), bool)
        self._high: Array = np.zeros(())
        self._low: Array = np.zeros(())

    def add(self, expected: Array, got: Array) -> None:
        """Add samples ``[n, ...]``."""
        high, low = expected.max(0), expected.min(0)
        if self._first is None:
            self._first, self._high, self._low = got[0].copy(), high, low
            self._moved = (got != got[0]).any(0)
            return
        self._moved = self._moved | (got != self._first).any(0)
        self._high, self._low = np.maximum(self._high, high), np.minimum(self._low, low)

    def frozen(self, least: float) -> float | None:
        """The share of elements that vary by more than ``least``, but in one model alone."""
        varying = self._high - self._low > least
        if not varying.any():
            return None
        return float(np.count_nonzero(varying & ~self._moved) / np.count_nonzero(varying))
