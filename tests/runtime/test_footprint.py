"""How many samples to run at a time is told by what one of them takes."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import build

from onnx_attnround import graph
from onnx_attnround.runtime import footprint
from onnx_attnround.runtime.footprint import NODES, affordable_batch
from onnx_attnround.samples import open_samples

WIDE = """g (float[N,64] x) => (float[N,8] y) <float[64,256] a, float[256,8] b>
    { p = MatMul(x, a)  y = MatMul(p, b) }"""
LARGEST = NODES * 4 * (64 + 256)
"""Bytes of a sample: what the larger node reads and makes, as often as such are held."""


@pytest.mark.parametrize(
    ("room", "batch"), [(3 * LARGEST, 3), (7 * LARGEST - 1, 6), (LARGEST - 1, 1)]
)
def test_as_many_samples_as_there_is_room_for_and_one_at_least(
    room: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(WIDE)
    samples = open_samples(np.ones((12, 64), np.float32), graph.input_specs(model))
    monkeypatch.setattr(footprint, "ROOM", room)
    assert affordable_batch(model, samples) == batch
