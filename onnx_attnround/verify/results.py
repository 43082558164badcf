"""What was measured on the float and the quantised model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputComparison:
    """One tensor of the quantised model against the float model's.

    ``sqnr_db`` is ``10 log10(Σ float² / Σ (float - quantised)²)`` over all
    elements that are finite in the float model: ``inf`` if they are equal,
    ``None`` for an output of integers. ``judged`` counts what ``agreeing`` was
    counted over: samples of an output that looks like class scores (float, rank
    2, more than one column; top-1), elements of an output of integers
    (equality), and 0 for any other.
    """

    name: str
    sqnr_db: float | None
    max_abs_error: float
    agreeing: int = 0
    judged: int = 0

    @property
    def agreement(self) -> float | None:
        """The share that agrees, 0 to 1; ``None`` where nothing could be judged."""
        return self.agreeing / self.judged if self.judged else None

    @property
    def disagreement_points(self) -> float | None:
        """The share that disagrees, in points (percent); ``None`` if nothing was judged."""
        return 100 * (self.judged - self.agreeing) / self.judged if self.judged else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Labelled samples that each model's top-1 gets right."""

    samples: int
    float_correct: int
    quantised_correct: int

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was measured on the two models.

    ``outputs`` were compared over ``samples`` samples, which are those that the model
    was calibrated on unless ``held_out``; ``layer_sqnr`` maps a
    planned layer's node name to the SQNR of its output in dB, ``not_compared``
    names the layers and graph outputs that could not be. Layers are compared on what the
    float model chooses and draws, and so are outputs that could not be compared otherwise,
    of which ``notes`` tell. Sizes are those of the serialised models, in bytes.
    """

    samples: int
    held_out: bool
    outputs: tuple[OutputComparison, ...]
    accuracy: Accuracy | None
    layer_sqnr: Mapping[str, float]
    not_compared: tuple[str, ...]
    notes: tuple[str, ...] = ()
    latency: Latency
    float_bytes: int
    quantised_bytes: int

    @property
    def worst_output(self) -> OutputComparison | None:
        """The float output of the lowest SQNR; ``None`` if no output is float."""
        scored = [output for output in self.outputs if output.sqnr_db is not None]
        return min(scored, key=lambda output: output.sqnr_db or 0.0, default=None)
