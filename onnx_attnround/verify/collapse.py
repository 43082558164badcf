"""When an output of the quantised model is of no use, whatever its other figures say."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx_attnround.verify.results import Extreme, OutputComparison, WorstSlice

LEAST_DB = 10.0
"""The least SQNR, in dB, of an output, or of a slice without a larger, better one of its kind.

At 10 dB a tenth of the power is error.
"""

LEAST_CORRELATION = 0.9
"""The least correlation with the float model's values: an error of a fifth of their variance."""

LEAST_AGREEMENT = 0.5
"""The least share of samples whose largest value is at the same place in both models."""


def collapse(output: OutputComparison, drowned: WorstSlice | None) -> str | None:
    """Why ``output`` has collapsed, in a phrase; ``None`` if it has not.

    ``drowned`` is its worst slice below ``LEAST_DB`` without a larger better one of its kind.
    """
    return next(_reasons(output, drowned), None)


def _reasons(output: OutputComparison, drowned: WorstSlice | None) -> Iterator[str]:
    if output.sqnr_db is None:
        return
    if -math.inf < output.sqnr_db < LEAST_DB:
        yield f"its SQNR is {output.sqnr_db:.1f} dB"
    if output.lost_extreme is not None:
        yield _lost(output.lost_extreme)
    if drowned is not None:
        yield f"the SQNR of {slice_name(drowned)} is {drowned.sqnr_db:.1f} dB"
    if output.correlation is not None and output.correlation < LEAST_CORRELATION:
        yield f"its correlation with the float model's is {output.correlation:.2f}"
    if output.agreement is not None and output.agreement < LEAST_AGREEMENT:
        yield f"its largest value is where the float model has it in {output.agreement:.0%} only"


def slice_name(part: WorstSlice | Extreme) -> str:
    """A slice in words."""
    return "the whole" if part.axis is None else f"slice {part.index} of axis {part.axis}"


def _lost(extreme: Extreme) -> str:
    end = f"goes to {extreme.expected:.3g} in the float model, and to {extreme.got:.3g} only"
    return f"{slice_name(extreme)} {end}"
