"""A run as the forms of the report are shown it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from small_models import build

from onnx_attnround.calibrate import Calibration
from onnx_attnround.check import Checked, Finding, Fusion
from onnx_attnround.config import QuantConfig
from onnx_attnround.pipeline import QuantizeResult
from onnx_attnround.records import (
    BitAllocation,
    LayerPlan,
    LayerRounding,
    QuantParams,
    QuantPlan,
    QuantSpec,
    TensorStats,
)
from onnx_attnround.targets import TARGETS
from onnx_attnround.verify import Accuracy, KernelTime, Latency, OutputComparison, Verification
from onnx_attnround.verify.results import Extreme, WorstSlice

SPEC = QuantSpec(bits=4, signed=True, symmetric=True, axis=0)


def layer(node: str, macs: int | None) -> LayerPlan:
    """A 4-bit convolution."""
    return LayerPlan(
        node=node,
        op_type="Conv",
        x="x",
        y=f"{node}.y",
        weight=f"{node}.w",
        bias=None,
        weight_shape=(8, 3, 5, 5),
        weight_spec=SPEC,
        macs=macs,
    )


@pytest.fixture
def result() -> QuantizeResult:
    """A run on two layers, of which the second was not rounded by learning."""
    return QuantizeResult(
        model=build("net (float[N] x) => (float[N] y) { y = Abs(x) }"),
        config=QuantConfig(),
        fitted=100,
        ranges=Calibration(
            stats={"x": TensorStats(name="x", count=9, lo=-0.5, hi=30.0)},
            params={
                name: QuantParams(
                    spec=QuantSpec(bits=8, signed=False, symmetric=False),
                    scale=np.float32(0.125),
                    zero_point=np.uint8(4),
                )
                for name in ("x", "flat")
            },
        ),
        plan=QuantPlan(
            target=TARGETS["ort"],
            layers=(layer("/body/conv[0]", 1_234_567), layer("head", None)),
            activations={},
            same_range={"flat": "x"},
            skipped={"lstm": "op LSTM is not supported"},
        ),
        allocation=BitAllocation(
            bits={"/body/conv[0]": 4, "head": 8},
            coding_length={"/body/conv[0]": 2.5, "head": 3.5},
            mean_bits=4.0,
        ),
        blocks=(),
        roundings={
            "/body/conv[0]": LayerRounding(
                weight="/body/conv[0].w",
                spec=SPEC,
                codes=np.zeros((8, 3, 5, 5), np.int8),
                scale=np.ones(8, np.float32),
                zero_point=np.zeros(8, np.int8),
                bias=None,
                mse_nearest=0.02,
                mse_final=0.005,
                changed=0.125,
            )
        },
        checked=Checked(
            target="ort",
            findings=(
                Finding(rule="zero-point-missing", node="head", why="write zeros", refused=False),
            ),
            fusion=Fusion(
                runtime="ONNX Runtime 1.31.1",
                measured=True,
                integer=("/body/conv[0]",),
                fallen={"head": "its bias is float"},
                macs={"/body/conv[0]": 3_000_000, "head": 1_000_000},
            ),
            oldest_onnxruntime="1.18",
            ran=True,
        ),
        verification=Verification(
            samples=256,
            basis="calibration",
            outputs=(
                OutputComparison(
                    name="logits",
                    sqnr_db=31.25,
                    sqnr_error_db=0.25,
                    max_abs_error=0.5,
                    agreeing=255,
                    judged=256,
                    worst_slices=(WorstSlice(axis=1, index=3, sqnr_db=17.5),),
                    correlation=0.999,
                    frozen=0.25,
                    lost_extreme=Extreme(axis=1, index=2, kept=0.125, expected=0.875, got=0.109375),
                    collapsed="its SQNR is low",
                ),
                OutputComparison(name="aux", sqnr_db=math.inf, max_abs_error=0.0),
            ),
            accuracy=Accuracy(samples=200, float_correct=190, quantised_correct=187),
            layer_sqnr={"/body/conv[0]": 28.5},
            not_compared=("head",),
            latency=Latency(
                batch=16, pairs=9, float_ms=8.0, quantised_ms=5.0, speedup=1.6, spread=(1.5, 1.75)
            ),
            kernels=(
                KernelTime(op_type="Conv", float_ms=7.0, quantised_ms=0.0),
                KernelTime(op_type="QLinearConv", float_ms=0.0, quantised_ms=4.5),
                *(
                    KernelTime(op_type=f"Small{number}", float_ms=0.125, quantised_ms=0.0625)
                    for number in range(9)
                ),
            ),
            float_bytes=4_000_000,
            quantised_bytes=1_000_000,
        ),
        notes=("no calibration samples: weights only",),
        seconds={"plan": 0.5, "round": 2.0},
    )
