"""Layers that some releases compute wrongly on CPUs with AMX are named, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_saturation import product

from onnx_attnround.check import check
from onnx_attnround.targets import TARGETS


def noted(*shape: int, op: str = "MatMul", target: str = "ort", **options: Any) -> list[str]:
    codes = np.ones(shape, np.int64)
    found = check(product(codes, op, **options), TARGETS[target]).findings
    return [finding.why for finding in found if finding.rule == "half-full-tiles"]


@pytest.mark.parametrize("outputs", [17, 24, 31, 56, 120])
def test_a_tile_more_than_half_full_is_named(outputs: int) -> None:
    [why] = noted(8, outputs)
    assert "ONNX Runtime 1.21 to 1.24 computes" in why and "use 1.25" in why
    assert noted(outputs, 8, op="Gemm", transB=1) == noted(8, outputs, op="Gemm")
    assert noted(8, outputs, dtype="UINT8")
    assert noted(outputs, 3, 3, 3, op="Conv")


@pytest.mark.parametrize("outputs", [1, 8, 16, 32, 33, 48, 64, 96])
def test_full_tiles_and_halves_are_not(outputs: int) -> None:
    assert not noted(8, outputs)
    assert not noted(outputs, 3, 3, 3, op="Conv")


def test_groups_count_for_themselves_and_channels_alone_are_no_product() -> None:
    assert not noted(24, 3, 3, 3, op="Conv", group=2)  # 12 outputs each
    assert noted(48, 3, 3, 3, op="Conv", group=2)
    assert not noted(24, 1, 3, 3, op="Conv", group=24)


def test_arm_has_no_such_tiles() -> None:
    assert not noted(8, 24, target="ort-arm")
