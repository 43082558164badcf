"""Notes: layers are judged by the rows that their weight multiplies, not by samples."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import build

from onnx_attnround import QuantConfig, quantize
from onnx_attnround.records import Array

RNG = np.random.default_rng(3)
POOLED = """net (float[N, 3, 12, 12] x) => (float[N, 5] y)
<float[8, 3, 3, 3] k, float[800, 5] w> {
    [conv] c = Conv(x, k)
    r = Relu(c)
    f = Flatten(r)
    [head] y = Gemm(f, w)
}"""
TOKENS = """net (float[N, T, 48] x) => (float[N, T, 8] y) <float[48, 48] v, float[48, 8] w> {
    [first] a = MatMul(x, v)
    r = Relu(a)
    [second] y = MatMul(r, w)
}"""


def notes(text: str, x: Array, **changes: object) -> list[str]:
    """What a run says of rows."""
    config = QuantConfig(**{"steps": 2, "holdout": 0.0, **changes})
    found = quantize(build(text), x.astype(np.float32), config).notes
    return [note for note in found if "rows" in note]


def test_a_layer_that_sees_a_row_a_sample_is_named_with_its_rows() -> None:
    (note,) = notes(POOLED, RNG.normal(size=(40, 3, 12, 12)))
    assert note.startswith("a layer is fitted on fewer rows")
    assert "'head', 40 rows for 800 inputs" in note
    assert notes(POOLED, RNG.normal(size=(40, 3, 12, 12)), method="nearest") == []


@pytest.mark.parametrize(("samples", "length", "told"), [(4, 40, 0), (8, 3, 2)])
def test_tokens_count_and_not_sentences(samples: int, length: int, told: int) -> None:
    found = notes(TOKENS, RNG.normal(size=(samples, length, 48)))
    assert len(found) == min(told, 1)
    assert all(note.startswith("2 layers are") and "24 rows for 48" in note for note in found)


def test_a_file_that_grows_says_what_grew() -> None:
    """A weight of one number costs more in names than it saves."""
    tiny = """net (float[N, 1, 8, 8] x) => (float[N, 1, 8, 8] y) <float[1, 1, 1, 1] w>
    { y = Conv(x, w) }"""
    x = RNG.normal(size=(8, 1, 8, 8)).astype(np.float32)
    result = quantize(build(tiny), x, method="nearest")
    (note,) = [note for note in result.notes if "larger than the float model" in note]
    found = result.verification
    assert f"{found.quantised_bytes:,} bytes of {found.float_bytes:,}: nodes, and names" in note


def test_a_file_that_shrinks_says_nothing_of_it() -> None:
    x = RNG.normal(size=(8, 3, 12, 12)).astype(np.float32)
    result = quantize(build(POOLED), x, method="nearest")
    assert result.verification.quantised_bytes < result.verification.float_bytes
    assert not [note for note in result.notes if "larger than" in note]
