"""Where the marks of a chart lie, in percent of its width and height; the templates draw them.

What is stretched to the width of a page keeps its text out of the drawing, so that this
stays readable at any width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_attnround.records import Array

BINS = 64
"""Bars of a histogram, at most."""
_TICKS = 4
"""About how many ticks an axis has between its ends."""
_HEADROOM = 0.04
"""The share of the height that is left free above and below the marks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A label of an axis, and where it stands."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values along an axis, ``None`` where there is none.

    ``style`` is ``line``, ``dot``, ``ring`` or ``bar``.
    """

    label: str
    style: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A series as paths of SVG: one that is stroked or filled, as its style says."""

    label: str
    style: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A part of the width, and what is told of it to who points there."""

    x: float
    width: float
    told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart in percent of its width and height, from the upper left corner."""

    unit: str
    drawn: Sequence[Drawn]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_unit: str = ""
    links: str = ""
    slots: Sequence[Slot] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """The outline of the bars, and the part of the width that the codes can hold.

    Heights are logarithms of counts, so that what is seldom is seen.
    """

    path: str
    start: float
    width: float
    told: str


def along(names: Sequence[str], series: Sequence[Series], unit: str, digits: int = 1) -> Chart:
    """Series along the layers of a network; the first two rings and dots of a layer are linked."""
    count = len(names)
    place = [100 * (index + 0.5) / count for index in range(count)]
    bars = any(each.style == "bar" for each in series)
    scale = _Scale([value for each in series for value in each.values], bars)
    return Chart(
        unit=unit,
        drawn=[_draw(each, place, scale, 70 / count) for each in series],
        links=_links(series, place, scale),
        x_ticks=[Tick(at=place[i], label=str(i + 1)) for i in _numbered(count)],
        y_ticks=scale.ticks(),
        slots=[
            Slot(x=100 * i / count, width=100 / count, told=_told(i, name, series, unit, digits))
            for i, name in enumerate(names)
        ],
    )


def scatter(
    x: Sequence[float], series: Sequence[Series], names: Sequence[str], units: tuple[str, str]
) -> Chart:
    """Series over ``x``, ascending; ``units`` are those of both axes."""
    across, up = _Scale(x, False), _Scale([v for each in series for v in each.values], False)
    place = [100 - across.at(value) for value in x]
    return Chart(
        unit=units[1],
        x_unit=units[0],
        drawn=[_draw(each, place, up, 0) for each in series],
        x_ticks=[Tick(at=100 - tick.at, label=tick.label) for tick in across.ticks()],
        y_ticks=up.ticks(),
        slots=[
            Slot(x=max(at - 2, 0), width=4, told=name)
            for at, name in zip(place, names, strict=True)
        ],
    )


def histogram(counts: Array, edges: Array, held: tuple[float, float]) -> Histogram:
    """``counts`` between ``edges`` (one more), with the range that the codes hold."""
    low, high = min(float(edges[0]), held[0]), max(float(edges[-1]), held[1])
    span = (high - low) or 1.0
    middles = (edges[:-1] + edges[1:]) / 2
    bars = np.histogram(middles, bins=BINS, range=(low, low + span), weights=counts)[0]
    return Histogram(
        path=_outline(bars),
        start=100 * (held[0] - low) / span,
        width=100 * (held[1] - held[0]) / span,
        told=f"holds {held[0]:.3g} to {held[1]:.3g}",
    )


def code_histogram(codes: Array, qmin: int, qmax: int) -> Histogram:
    """How often each code from ``qmin`` to ``qmax`` is used."""
    counts = np.bincount(codes.ravel().astype(np.int64) - qmin, minlength=qmax - qmin + 1)
    share = -(-len(counts) // BINS)
    padded = np.pad(counts, (0, -len(counts) % share)).reshape(-1, share).sum(1)
    unused = int(np.count_nonzero(counts == 0))
    return Histogram(
        path=_outline(padded),
        start=0,
        width=100,
        told=f"codes {qmin} to {qmax}" + (f", {unused} of them unused" if unused else ""),
    )


class _Scale:
    """From values to percent of a height, 0 at the top."""

    def __init__(self, values: Sequence[float | None], from_zero: bool) -> None:
        known = [v for v in values if v is not None and math.isfinite(v)] or [0.0]
        low, high = (0.0 if from_zero else min(known)), max(known)
        if high <= low:
            low, high = (low, low + 1) if from_zero else (low - 1, high + 1)
        room = _HEADROOM * (high - low)
        self.low, self.high = (low if from_zero else low - room), high + room

    def at(self, value: float) -> float:
        """From the top."""
        share = (value - self.low) / (self.high - self.low)
        return 100 * (1 - min(max(share, 0.0), 1.0))

    def ticks(self) -> list[Tick]:
        """At round numbers."""
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * each for each in (1, 2, 5, 10) if power * each >= 0.75 * rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [
            Tick(at=self.at(n * step), label=f"{round(n * step, 9):g}")
            for n in range(first, last + 1)
        ]


def _draw(series: Series, place: Sequence[float], scale: _Scale, width: float) -> Drawn:
    known = [
        (x, scale.at(value))
        for x, value in zip(place, series.values, strict=True)
        if value is not None and not math.isnan(value)
    ]
    if series.style == "bar":
        path = "".join(f"M{x - width / 2:.2f} 100V{y:.2f}h{width:.2f}V100z" for x, y in known)
    elif series.style == "line":
        path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in known) if known else ""
    else:  # the round ends of a line without length are dots, however the drawing is stretched
        path = "".join(f"M{x:.2f} {y:.2f}h.001" for x, y in known)
    return Drawn(label=series.label, style=series.style, path=path)


def _links(series: Sequence[Series], place: Sequence[float], scale: _Scale) -> str:
    """Lines from each ring to its dot."""
    by_style = {each.style: each.values for each in series}
    if not {"ring", "dot"} <= by_style.keys():
        return ""
    return "".join(
        f"M{x:.2f} {scale.at(one):.2f}V{scale.at(other):.2f}"
        for x, one, other in zip(place, by_style["ring"], by_style["dot"], strict=True)
        if one is not None and other is not None
    )


def _numbered(count: int) -> range:
    """Which of so many places have their number below them."""
    step = next(each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if count / each <= 12)
    return range(step - 1, count, step)


def _told(index: int, name: str, series: Sequence[Series], unit: str, digits: int) -> str:
    lines = [f"{index + 1}. {name}"]
    for each in series:
        if (value := each.values[index]) is not None:
            lines.append(f"{each.label}: {value:.{digits}f} {unit}")
    return "\n".join(lines)


def _outline(bars: Array) -> str:
    """The outline of bars of equal width, of the height that the logarithm of a count takes."""
    heights = 100 * np.log1p(bars) / max(float(np.log1p(bars).max(initial=0)), 1e-9)
    width = 100 / len(bars)
    steps = "".join(f"V{100 - height:.1f}h{width:.3f}" for height in heights)
    return f"M0 100{steps}V100z"
