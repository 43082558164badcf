"""Deployment targets as data: what a runtime wants of a QDQ file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnx_attnround.errors import ConfigError

WeightStorage = Literal["packed", "int8", "int4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The rules of one runtime.

    ``weighted`` are the ops with a constant weight that run in integer when
    their activations are quantised; ``arithmetic`` ops do if all their data
    inputs and their output are; ``movement`` ops pass codes through, so that
    input and output share scale and zero point; ``absorbed`` activations
    vanish into the Q behind them. ``float_output`` ops need no Q on their
    output. ``int32_bias`` says whether a bias is stored as int32 at sx*sw.
    """

    name: str
    activation_signed: bool
    activation_symmetric: bool
    weighted: frozenset[str]
    arithmetic: frozenset[str]
    movement: frozenset[str]
    absorbed: frozenset[str]
    float_output: frozenset[str]
    int32_bias: bool
    weight_storage: WeightStorage


TARGETS: dict[str, Target] = {
    "ort": Target(
        name="ort",
        activation_signed=False,
        activation_symmetric=False,
        weighted=frozenset({"Conv", "Gemm", "MatMul"}),
        arithmetic=frozenset(
            {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"}
        ),
        movement=frozenset(
            {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather"}
            | {"DepthToSpace", "MaxPool", "Pad", "Resize"}
        ),
        absorbed=frozenset({"Relu", "Clip"}),
        float_output=frozenset({"Gemm", "MatMul"}),
        int32_bias=True,
        weight_storage="packed",
    ),
}


def get_target(name: str) -> Target:
    """The target of that name; raises ``ConfigError`` with the valid names."""
    if name not in TARGETS:
        raise ConfigError(f"unknown target '{name}': expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
