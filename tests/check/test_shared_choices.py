"""Files that choose rows or draw numbers: runtime and nodes need not choose and draw alike."""

from __future__ import annotations

import pytest
from choosing_models import choosing
from layered_models import noise

from onnx_attnround import quantize


@pytest.mark.parametrize("name", ["suppressed", "noise", "noise from nothing"])
def test_openvino_may_choose_and_draw_otherwise(name: str) -> None:
    pytest.importorskip("openvino")
    model = choosing(name)
    result = quantize(model, noise(model, 20), {"target": "openvino", "threads": 1})
    assert result.checked.findings == ()


@pytest.mark.parametrize("name", ["suppressed", "as long as it says", "coins"])
@pytest.mark.parametrize(
    "options",
    [{}, {"act_bits": 32}, pytest.param({"reconstruct": "block"}, marks=pytest.mark.slow)],
)
def test_models_that_choose_and_draw_are_converted(name: str, options: dict[str, object]) -> None:
    """Draws are others in each process, and a rare one lies beyond the ranges of few samples."""
    model = choosing(name)
    result = quantize(model, noise(model, 80), {"threads": 1, **options})
    assert result.verification is not None
    (output,) = result.verification.outputs
    assert output.sqnr_db is not None
    assert output.sqnr_db > 10
    assert any("not comparable row by row" in note for note in result.notes)
