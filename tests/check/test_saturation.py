"""Layers that some CPUs compute wrongly are named, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from qdq_builder import Builder

from onnx_attnround.check import check
from onnx_attnround.targets import TARGETS


def product(
    codes: Any, op: str = "MatMul", *, dtype: str = "INT8", x: str = "UINT8", **options: Any
) -> ir.Model:
    """Q/DQ and a layer whose weight has these codes; ``highest`` puts a Clip on those of ``x``."""
    made, array = Builder(), np.asarray(codes)
    highest, conv = options.pop("highest", None), op == "Conv"
    params = [made.constant("s", 0.05), made.constant("z", 0, x)]
    read = made.node("QuantizeLinear", ["x", *params], "q")
    if highest is not None:
        bounds = [made.constant("low", -highest if x == "INT8" else 0, x),
                  made.constant("high", highest, x)]  # fmt: skip
        read = made.node("Clip", [read, *bounds], "clip")
    inputs = [made.node("DequantizeLinear", [read, *params], "dq")]
    scale = [made.constant("ws", 0.01), made.constant("wz", 0, dtype)]
    weight = [made.constant("w", array, dtype), *scale]
    inputs.append(made.node("DequantizeLinear", weight, "wdq"))
    made.node(op, inputs, "y", **options)
    rows = array.shape[1 if options.get("transB") else 0]
    channels = array.shape[1] * options.get("group", 1) if conv else rows
    return made.build("y", ("N", channels, 6, 6) if conv else ("N", channels))


def column(*codes: int) -> list[list[int]]:
    return [[code] for code in codes]


DEPTHWISE = np.full((4, 1, 3, 3), 127)


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize(
    ("model", "fits"),
    [
        (product(column(64, 64, 0)), True),
        (product(column(65, 3, 64)), False),  # not neighbours: what is packed side by side?
        (product(column(127, 1, -128)), True),
        (product(column(-64, -65, 127)), False),
        (product(column(127)), True),
        (product([[127, 127], [0, 0]]), True),  # of two outputs
        (product([[127, 127], [0, 0]], "Gemm", transB=1), False),
        (product(column(127, 127), "Gemm"), False),
        (product(np.full((4, 4, 3, 3), 64), "Conv"), True),
        (product(np.full((4, 4, 3, 3), 65), "Conv"), False),
        (product(np.full((4, 1, 3, 3), 127), "Conv"), False),  # one channel, taps are added
        (product(DEPTHWISE, "Conv", group=4), True),
        (product(np.full((8, 1, 3, 3), 127), "Conv", group=4), False),
        (product(column(127, 127), highest=127), True),
        (product(column(127, 127), highest=130), False),
        (product(column(127, 127), highest=7, x="INT8"), False),  # 135 without sign
        (product(column(60, 60), highest=7, x="INT8"), True),
        (product(column(127, 127), x="INT8"), False),
        (product(column(64, 64), x="INT8"), True),
        (product(column(-128, -128), dtype="INT8"), False),
        (product(column(255, 255), dtype="UINT8"), True),  # added in 32 bits
    ],
)
def test_any_two_weights_of_a_row_are_looked_at(target: str, model: ir.Model, fits: bool) -> None:
    checked = check(model, TARGETS[target])
    found = [finding.node for finding in checked.findings if finding.rule == "pairs-beyond-int16"]
    assert (checked.fits_int16, found) == (fits, [] if fits else ["y"])
    assert "pairs-beyond-int16" not in {finding.rule for finding in checked.refused}


def test_where_pairs_are_added_in_32_bits_nothing_is_said() -> None:
    checked = check(product(column(127, 127), x="INT8"), TARGETS["tensorrt"])
    assert checked.fits_int16 is None
    assert "pairs-beyond-int16" not in {finding.rule for finding in checked.findings}


def test_layers_in_float_cannot_saturate() -> None:
    made = Builder()
    made.node("MatMul", ["x", made.weight("w", (8, 4), highest=127, axis=1)], "y")
    assert check(made.build("y", ("N", 8)), TARGETS["ort"]).fits_int16 is None
    assert check(product(column(127, 127), x="UINT16"), TARGETS["ort"]).fits_int16 is None


@pytest.mark.parametrize(("code", "fits"), [(64, True), (65, False)])
def test_operators_on_integers_are_looked_at_too(code: int, fits: bool) -> None:
    made = Builder()
    scale, point = made.constant("s", 0.1), made.constant("z", 0, "UINT8")
    zero = made.constant("wz", 0, "INT8")
    weight = made.constant("w", np.full((4, 4, 3, 3), code), "INT8")
    codes = made.node("QuantizeLinear", ["x", scale, point], "q")
    codes = made.node("QLinearConv", [codes, scale, point, weight, scale, zero, scale, point], "c")
    made.node("DequantizeLinear", [codes, scale, point], "y")
    assert check(made.build("y"), TARGETS["ort"]).fits_int16 == fits
    made = Builder()
    outputs = ["codes", "scale", "point"]
    made.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], outputs, name="dynamic"))
    weight = made.constant("w", np.full((8, 4), code), "INT8")
    made.node("MatMulInteger", ["codes", weight, "point"], "sums")
    made.node("Cast", ["sums"], "y", to=1)
    assert check(made.build("y", ("N", 8)), TARGETS["ort"]).fits_int16 == fits
