"""How sure it is that one of two models is slower."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_attnround.verify import Latency


def latency(speedup: float, low: float, high: float, pairs: int) -> Latency:
    return Latency(
        batch=1, pairs=pairs, float_ms=1.0, quantised_ms=1.0, speedup=speedup, spread=(low, high)
    )


def test_the_error_is_the_deviation_of_medians() -> None:
    drawn = np.random.default_rng(0).normal(1.0, 0.1, size=(4000, 25))
    low, high = np.percentile(drawn, [25, 75])
    found = latency(1.0, float(low), float(high), 25).error
    assert found == pytest.approx(np.median(drawn, axis=1).std(), rel=0.05)


@pytest.mark.parametrize(
    ("speedup", "pairs", "slower"),
    [
        (0.95, 25, True),  # the quartiles hold 1, but the median of so many runs does not
        (0.95, 3, False),
        (1.02, 25, False),
        (0.5, 3, True),
    ],
)
def test_many_runs_tell_what_few_do_not(speedup: float, pairs: int, slower: bool) -> None:
    assert latency(speedup, speedup - 0.06, speedup + 0.06, pairs).slower is slower
