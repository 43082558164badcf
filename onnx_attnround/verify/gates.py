"""Gates: figures that the quantised model must reach."""

from __future__ import annotations

from collections.abc import Iterator

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import GateError
from onnx_attnround.verify.results import Verification

REMEDY = (
    "allow more bits (`weight_bits`, `act_bits`, `mean_bits`), give more calibration samples, or "
    "move the gate"
)


def check_gates(verification: Verification, config: QuantConfig) -> None:
    """Raise ``GateError`` that names every gate of ``config`` that was missed, with its figure.

    ``min_sqnr`` is held against the worst float output (dB); ``max_drop``
    against the points of top-1 lost where labels were given, else against the
    points of disagreement with the float model. ``strict`` lets no output collapse.
    A gate that cannot be judged counts as missed.
    """
    if missed := missed_gates(verification, config):
        raise GateError(f"gate missed: {missed}; {REMEDY}")


def missed_gates(verification: Verification, config: QuantConfig) -> str:
    """The gates of ``config`` that were missed, each with its figure; empty if there are none."""
    return "; ".join(_missed(verification, config))


def _missed(verification: Verification, config: QuantConfig) -> Iterator[str]:
    """A phrase for each gate that was missed, with the figure and the gate."""
    worst, (drop, what) = verification.worst_output, _drop(verification)
    sqnr = None if worst is None else worst.sqnr_db
    if config.min_sqnr is not None and sqnr is None:
        yield f"`min_sqnr` {config.min_sqnr:g} cannot be judged, no output is float"
    elif config.min_sqnr is not None and worst and sqnr is not None and sqnr < config.min_sqnr:
        yield (
            f"SQNR of output '{worst.name}' is {sqnr:.2f} dB, below `min_sqnr` {config.min_sqnr:g}"
        )
    if config.max_drop is not None and drop is None:
        yield f"`max_drop` {config.max_drop:g} cannot be judged, no output holds class scores"
    elif config.max_drop is not None and drop is not None and drop > config.max_drop:
        yield f"{what} is {drop:.2f} points, above `max_drop` {config.max_drop:g}"
    if config.strict:
        yield from verification.collapsed


def _drop(verification: Verification) -> tuple[float | None, str]:
    if verification.accuracy is not None:
        return verification.accuracy.drop_points, "loss of top-1"
    points = [output.disagreement_points for output in verification.outputs]
    return max((p for p in points if p is not None), default=None), "disagreement with float"
