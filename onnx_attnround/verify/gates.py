"""Gates: figures that the quantised model must reach."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A figure of the config that the quantised model must reach, and whether it does.

    ``missed`` says in a phrase how it was missed, and is ``None`` where it was reached.
    """

    name: str
    demand: str
    missed: str | None


def missed_gates(verification: Verification, config: QuantConfig) -> str:
    """The gates of ``config`` that were missed, each with its figure; empty if there are none."""
    return "; ".join(gate.missed for gate in gates(verification, config) if gate.missed)


def gates(verification: Verification, config: QuantConfig) -> tuple[Gate, ...]:
    """The gates of ``config``, each judged."""
    found = []
    if config.min_sqnr is not None:
        demand = f"SQNR of the worst output at least {config.min_sqnr:g} dB"
        missed = _missed_sqnr(verification, config.min_sqnr)
        found.append(Gate(name="min_sqnr", demand=demand, missed=missed))
    if config.max_drop is not None:
        drop, what = _drop(verification)
        demand = f"{what} at most {config.max_drop:g} points"
        found.append(
            Gate(name="max_drop", demand=demand, missed=_missed_drop(drop, what, config.max_drop))
        )
    if config.strict:
        collapsed = "; ".join(verification.collapsed) or None
        found.append(Gate(name="strict", demand="no output collapses", missed=collapsed))
    return tuple(found)


def _missed_sqnr(verification: Verification, least: float) -> str | None:
    worst = verification.worst_output
    if worst is None or worst.sqnr_db is None:
        return f"`min_sqnr` {least:g} cannot be judged, no output is float"
    if worst.sqnr_db >= least:
        return None
    return f"SQNR of output '{worst.name}' is {worst.sqnr_db:.2f} dB, below `min_sqnr` {least:g}"


def _missed_drop(drop: float | None, what: str, most: float) -> str | None:
    if drop is None:
        return f"`max_drop` {most:g} cannot be judged, no output holds class scores"
    return f"{what} is {drop:.2f} points, above `max_drop` {most:g}" if drop > most else None


def _drop(verification: Verification) -> tuple[float | None, str]:
    if verification.accuracy is not None:
        return verification.accuracy.drop_points, "loss of top-1"
    points = [output.disagreement_points for output in verification.outputs]
    return max((p for p in points if p is not None), default=None), "disagreement with float"
