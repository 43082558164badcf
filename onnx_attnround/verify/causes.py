"""Why a layer of a quantised file parts from the float model, from sums over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnx_attnround.records import Array
from onnx_attnround.verify.pairs import Pair
from onnx_attnround.verify.results import LayerPair
from onnx_attnround.verify.sites import Codes
from onnx_attnround.verify.slices import EE, XE, XX, Along, E, X

BIT = 4.0
"""Squared error of codes with one bit less."""

LEAP = 10.0
"""By how much the error may grow between two layers, where nodes without weights lie."""

FLOAT = 1e-9
"""Squared error, relative, that sums of floats in another order leave, at most."""

MOST = 0.9
"""Share of an error from which on a cause is taken to be that of the whole."""


class LayerSums:
    """Sums over the batches of one pair of layers; errors are squared."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.signal = self.noise = self.inherited = self.nearest = 0.0
        self.x_signal = self.x_noise = self.x_rounding = 0.0
        self.x_low, self.x_high = math.inf, -math.inf
        self.x_count = self.x_outside = 0
        self.channels: Along | None = None

    def add_input(self, expected: Array, got: Array) -> None:
        """What the layer reads in the float model and in the quantised file."""
        x = np.asarray(expected, np.float64)
        self.x_signal += float(np.sum(x * x))
        self.x_noise += float(np.sum((got - x) ** 2))
        self.x_count += x.size
        self.x_low, self.x_high = min(self.x_low, float(x.min())), max(self.x_high, float(x.max()))
        codes = Codes.of_range(x) if self.pair.quantised.dynamic else self.pair.quantised.input
        if codes is not None:
            low, high = codes.range
            self.x_rounding += float(np.sum((codes.rounded(x) - x) ** 2))
            self.x_outside += int(np.count_nonzero((x < low) | (x > high)))

    def add_output(self, expected: Array, got: Array, alone: Array, nearest: Array) -> None:
        """What it makes: in both models, and of what it reads in the file, float and rounded."""
        y, z, t, r = (np.asarray(each, np.float64) for each in (expected, got, alone, nearest))
        self.signal += float(np.sum(y * y))
        self.noise += float(np.sum((z - y) ** 2))
        self.inherited += float(np.sum((t - y) ** 2))
        self.nearest += float(np.sum((r - t) ** 2))
        if (codes := self.pair.quantised.output) is not None:
            self.nearest += float(np.sum((codes.rounded(t) - t) ** 2))
        axis = self.pair.quantised.channel_axis % y.ndim
        shape = math.prod(y.shape[:axis]), y.shape[axis], -1
        if self.channels is None:
            self.channels = Along(y.shape[axis])
        self.channels.add(t.reshape(shape), (z - t).reshape(shape))

    @property
    def own(self) -> float:
        """What the layer adds to the error that it inherits; learned rounding may take from it."""
        return max(self.noise - self.inherited, 0.0)

    @property
    def bits(self) -> int | None:
        """The width that the codes of the weights need."""
        levels = self.pair.quantised.levels
        return None if levels is None else round(math.log2(levels)) + 1

    @property
    def local(self) -> float:
        """What is added here, by codes of the input and by the layer, as shares of their power."""
        return _share(self.x_rounding, self.x_signal) + _share(self.own, self.signal)

    def told(self, parts: str | None, mend: str | None) -> LayerPair:
        """The figures."""
        site = self.pair.quantised
        known = site.dynamic or site.input is not None
        return LayerPair(
            node=site.node,
            float_node=self.pair.float.node,
            matched=self.pair.matched,
            bits=self.bits,
            sqnr_db=_decibels(self.signal, self.noise),
            inherited_db=_decibels(self.signal, self.inherited),
            own_db=_decibels(self.signal, self.own),
            expected_db=None if self.bits is None else _decibels(self.signal, self.nearest),
            input_db=_decibels(self.x_signal, self.x_rounding) if known else None,
            parts=parts,
            mend=mend,
        )


def diagnosed(sums: Sequence[LayerSums]) -> tuple[LayerPair, ...]:
    """The layers, with a cause where one adds more than surroundings and widths explain.

    What is less than a layer adds in the mean is passed over.
    """
    least = max(sum(each.local for each in sums) / max(len(sums), 1), FLOAT)
    found, so_far, before = [], 0.0, ""
    for each in sums:
        cause = _cause(each, least, so_far, before)
        found.append(each.told(*(cause or (None, None))))
        so_far = max(so_far, _share(each.noise, each.signal))
        before = each.pair.quantised.node
    return tuple(found)


def _cause(
    sums: LayerSums, least: float, so_far: float, before: str
) -> tuple[str, str] | None:
    """What is wrong in front of a layer, at its input or in it, and what helps."""
    arriving = _share(max(sums.x_noise - sums.x_rounding, 0.0), sums.x_signal)
    if before and arriving >= max(least, LEAP * so_far) and so_far:
        return (
            f"what it reads is {_ratio(arriving / so_far)} as far off as anything that the layers "
            f"before make, up to '{before}'",
            "look at the nodes between the two: a range among them cuts off, or is far too wide",
        )
    rounding = _share(sums.x_rounding, sums.x_signal)
    if rounding >= max(least, BIT * _expected(sums)):
        return _input_cause(sums)
    own = _share(sums.own, sums.signal)
    if own >= least and sums.own >= BIT * sums.nearest:
        return _weight_cause(sums)
    return None


def _expected(sums: LayerSums) -> float:
    """The relative error of codes that reach as far as the values: steps squared, over twelve."""
    codes = sums.pair.quantised.input
    if codes is None or not sums.x_signal:
        return math.inf
    span = max(sums.x_high, 0.0) - min(sums.x_low, 0.0)
    step = span / (codes.high - codes.low)
    return step * step / 12 * sums.x_count / sums.x_signal


def _input_cause(sums: LayerSums) -> tuple[str, str]:
    codes, tensor = sums.pair.quantised.input, sums.pair.float.x
    low, high = (0.0, 0.0) if codes is None else codes.range
    reach = (
        f"the codes of its input '{tensor}' reach from {low:.3g} to {high:.3g}, the float model "
        f"from {sums.x_low:.3g} to {sums.x_high:.3g}"
    )
    if not sums.x_outside:
        mend = "calibrate it on samples like these, or give it more bits"
        return f"{reach}: their steps are too wide", mend
    share = sums.x_outside / sums.x_count
    return f"{reach}: {share:.2%} of the values are cut off", (
        "calibrate it on samples like these, with an observer that keeps extremes, or leave it "
        f"float: 32 in `activation_bits` for '{tensor}'"
    )


def _weight_cause(sums: LayerSums) -> tuple[str, str]:
    """The first of: offsets, factors, one scale for unequal rows, too few bits, other weights."""
    site = sums.pair.quantised
    offset, both, where = _shapes(sums)
    if offset >= MOST:
        return (
            "what it makes is off by a constant in each channel, as of another bias",
            "correct its bias, or take the biases of the float model again",
        )
    if both >= MOST:
        return (
            f"what it makes is {where} what it should be, as of a wrong scale",
            "correct the scales of its weight and of its bias, or write the layer again",
        )
    told = "its weights are not those of the float model"
    if sums.nearest:
        times = _ratio(sums.own / sums.nearest)
        told = f"it adds {times} the error that rounding to {sums.bits} bits explains"
    if site.scales == 1 and (spread := _unequal(site.weight)) >= BIT:
        return (
            f"{told}: its weight has one scale, and rows {math.sqrt(spread):.3g} times smaller, in "
            "the mean, than the largest",
            "give each of its channels a scale (quantise weights per channel)",
        )
    return told, (
        "write the layer again from this float model, with more bits (`layer_bits`), or leave it "
        "float (`exclude`)"
    )


def _shapes(sums: LayerSums) -> tuple[float, float, str]:
    """The share of the own error that an offset for each channel explains, and with a factor too.

    And that factor in words, where it matters most: by linear regression of the error on what is
    expected.
    """
    if (found := sums.channels) is None or not found.sums[EE].sum():
        return 0.0, 0.0, ""
    x, e, xx, ee, xe = (found.sums[row] for row in (X, E, XX, EE, XE))
    total, count = float(ee.sum()), found.count
    varied, common = xx - x * x / count, xe - x * e / count
    slopes = np.where(varied > 0, common / np.maximum(varied, np.finfo(np.float64).tiny), 0.0)
    offsets = e * e / count
    factors = slopes * common
    both = float((offsets + factors).sum()) / total
    most = int(np.argmax(factors))
    share = int(np.count_nonzero(factors >= factors[most] / 10))
    some = "" if share == len(factors) else f", in {share} of {len(factors)} channels,"
    factor = round(float(1 + slopes[most]), 9) or 0.0  # a last bit is no factor, nor is -0
    return float(offsets.sum()) / total, both, f"{factor:.3g} times{some}"


def _unequal(weight: Array | None) -> float:
    """The mean over rows of the squared ratio of the largest range to their own."""
    if weight is None:
        return 1.0
    widest = np.abs(weight).max(1)
    used = widest[widest > 0]
    return float(np.mean((used.max() / used) ** 2)) if used.size else 1.0


def _ratio(value: float) -> str:
    return f"{value:.0f} times" if value < 1e6 else "a million times"


def _share(noise: float, signal: float) -> float:
    return noise / signal if signal else (math.inf if noise else 0.0)


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
