"""What was measured on the float and the quantised model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onnx_attnround.numerics import SURE

Matched = Literal["name", "weights", "order"]
"""How a layer of a quantised file was found in the float model."""

Basis = Literal["evaluation", "held out", "calibration"]
"""The samples that figures are measured on.

They are given for evaluation, or kept apart from those for calibration, or they are the
calibration samples themselves, to which ranges and weights were fitted.
"""

QUARTILES = 1.349
"""The distance between the quartiles of a normal distribution of deviation 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstSlice:
    """The part of an output at ``index`` of ``axis``, and its SQNR in dB."""

    axis: int
    index: int
    sqnr_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Extreme:
    """The largest or least value of a slice in the float and the quantised model.

    ``kept`` is the share of its distance from the float model's mean that is left.
    ``axis`` is ``None`` for an output as a whole.
    """

    axis: int | None
    index: int
    kept: float
    expected: float
    got: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputComparison:
    """One tensor of the quantised model against the float model's.

    ``sqnr_db`` is ``10 log10(Σ float² / Σ (float - quantised)²)`` over all
    elements that are finite in the float model: ``inf`` if they are equal,
    ``None`` for an output of integers, and ``sqnr_error_db`` its standard error: by so much
    that of other samples may differ. ``judged`` counts what ``agreeing`` was
    counted over: samples of an output that looks like class scores (float, rank
    2, more than one column; top-1), elements of an output of integers
    (equality), and 0 for any other.

    The rest is told of float outputs. ``worst_slices`` has a slice for each axis of
    moderate length, but for that of the samples. ``correlation`` is that of all values in
    both models; ``frozen`` the share of a sample's elements that vary from sample to
    sample in the float model alone; ``lost_extreme`` the slice, or whole, whose largest or
    least value is cut off most. ``collapsed`` is the reason why the output is of no use.
    """

    name: str
    sqnr_db: float | None
    sqnr_error_db: float | None = None
    max_abs_error: float
    agreeing: int = 0
    judged: int = 0
    worst_slices: tuple[WorstSlice, ...] = ()
    correlation: float | None = None
    frozen: float | None = None
    lost_extreme: Extreme | None = None
    collapsed: str | None = None

    @property
    def agreement(self) -> float | None:
        """The share that agrees, 0 to 1; ``None`` where nothing could be judged."""
        return self.agreeing / self.judged if self.judged else None

    @property
    def worst_slice(self) -> WorstSlice | None:
        """The slice of the lowest SQNR along any axis."""
        return min(self.worst_slices, key=lambda each: each.sqnr_db, default=None)

    @property
    def disagreement_points(self) -> float | None:
        """The share that disagrees, in points (percent); ``None`` if nothing was judged."""
        return 100 * (self.judged - self.agreeing) / self.judged if self.judged else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Labelled samples that each model's top-1 gets right, and those that one of them does."""

    samples: int
    float_correct: int
    quantised_correct: int
    flipped: int = 0

    @property
    def float_top1(self) -> float:
        """Top-1 of the float model, 0 to 1."""
        return self.float_correct / self.samples

    @property
    def quantised_top1(self) -> float:
        """Top-1 of the quantised model, 0 to 1."""
        return self.quantised_correct / self.samples

    @property
    def drop_points(self) -> float:
        """What quantisation costs in points of top-1; negative for a gain."""
        return 100 * (self.float_correct - self.quantised_correct) / self.samples

    @property
    def drop_error(self) -> float:
        """Standard error of ``drop_points``, of the differences sample by sample."""
        mean = self.drop_points / 100
        return 100 * math.sqrt(max(self.flipped / self.samples - mean**2, 0.0) / self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Medians of interleaved runs on one thread, in milliseconds per batch of ``batch``.

    ``speedup`` is the median of float time over quantised time of the ``pairs`` of
    runs: above 1, the quantised model is faster. ``spread`` are its quartiles.
    """

    batch: int
    pairs: int
    float_ms: float
    quantised_ms: float
    speedup: float
    spread: tuple[float, float]

    @property
    def error(self) -> float:
        """The standard error of ``speedup``, as that of a median of values of a normal spread.

        It is sqrt(pi / 2) of that of a mean, whose deviation is taken from the quartiles.
        """
        deviation = (self.spread[1] - self.spread[0]) / QUARTILES
        return math.sqrt(math.pi / 2 / self.pairs) * deviation

    @property
    def slower(self) -> bool:
        """Whether the quantised model is slower, beyond what noise makes of equal speeds."""
        return self.speedup + SURE * self.error < 1

    def faster_than(self, bound: float) -> bool:
        """Whether ``speedup`` is above ``bound``, beyond noise."""
        return self.speedup - SURE * self.error > bound


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """Milliseconds that all nodes of a kind take in one run of each model, 0 where it has none.

    ``op_type`` is that of the nodes that ONNX Runtime runs, fused as they are.
    """

    op_type: str
    float_ms: float
    quantised_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was measured on the two models.

    ``outputs`` were compared over ``samples`` samples, from where ``basis`` says;
    ``layer_sqnr`` maps a planned layer's node name to the SQNR of its output in dB,
    ``not_compared`` names the layers and graph outputs that could not be. Layers are compared
    on what the float model chooses and draws, and so are outputs that could not be compared
    otherwise, of which ``notes`` tell. ``kernels`` tells where the time of both goes, most first.
    Sizes are those of the serialised models, in bytes.
    """

    samples: int
    basis: Basis
    outputs: tuple[OutputComparison, ...]
    accuracy: Accuracy | None
    layer_sqnr: Mapping[str, float]
    not_compared: tuple[str, ...]
    notes: tuple[str, ...] = ()
    latency: Latency
    kernels: tuple[KernelTime, ...] = ()
    float_bytes: int
    quantised_bytes: int

    @property
    def held_out(self) -> bool:
        """Whether nothing was fitted to the samples compared on."""
        return self.basis != "calibration"

    @property
    def collapsed(self) -> list[str]:
        """A phrase for each output that is of no use."""
        return [
            f"output '{output.name}' has collapsed: {output.collapsed}"
            for output in self.outputs
            if output.collapsed
        ]

    @property
    def worst_output(self) -> OutputComparison | None:
        """The float output of the lowest SQNR; ``None`` if no output is float."""
        scored = [output for output in self.outputs if output.sqnr_db is not None]
        return min(scored, key=lambda output: output.sqnr_db or 0.0, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPair:
    """A layer of a quantised file beside the same one of the float model.

    All figures are signal over error in dB, ``inf`` without any error. ``sqnr_db`` is that of the
    layer's output in the two models, ``inherited_db`` what would be left of it if only what it
    reads were off, ``own_db`` if only what the layer adds to that were; ``expected_db`` is what
    rounding its weights to nearest would add. ``input_db`` is what the codes of its input make
    of the float model's values, ``None`` where it is float or has a range of each run.
    ``parts`` says what is wrong, if the two part here beyond what surroundings and widths
    explain, and ``mend`` what helps.
    """

    node: str
    float_node: str
    matched: Matched
    bits: int | None
    sqnr_db: float
    inherited_db: float
    own_db: float
    expected_db: float | None
    input_db: float | None
    parts: str | None = None
    mend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairComparison:
    """A float model and a quantised file of any make: as wholes, and layer by layer.

    ``layers`` are in the order of the file. ``alone`` names layers of either that have no
    partner, or whose values have another shape there.
    """

    verification: Verification
    layers: tuple[LayerPair, ...]
    alone: tuple[str, ...]

    @property
    def first(self) -> LayerPair | None:
        """The first layer where the two part beyond what its surroundings explain."""
        return next((layer for layer in self.layers if layer.parts), None)
