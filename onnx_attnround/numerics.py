"""Numbers that several rooms share: a power that is none, decibels, places without a period."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

TINY = 1e-30
"""The least divisor, and argument of a logarithm, where a power or a range may be zero.

A normal float32, as is its inverse; float32 activations of any use have larger powers.
"""

SURE = 2.0
"""The standard errors beyond which a difference counts."""

GOLDEN = (math.sqrt(5) - 1) / 2


def decibels(share: float) -> float:
    """An error power as a share of the signal's, in dB; -300 dB where there is no error."""
    return 10 * math.log10(max(share, TINY))


def golden_places(first: int, count: int) -> NDArray[np.float64]:
    """Places in [0, 1) of the items ``first`` to ``first + count``, each of its number alone.

    Steps by the golden ratio spread any run of items evenly, and fall in with no period that
    the items may have: every second one rotated, ten of each class.
    """
    places: NDArray[Any] = (np.arange(first, first + count, dtype=np.float64) * GOLDEN) % 1.0
    return places
