"""Ops that work element by element, with numpy broadcasting: arithmetic, logic, activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.shadow.common import Attributes, Inputs, Op, optional


def _unary(function: Callable[..., Tensor]) -> Op:
    return lambda a, x, opset: function(x[0])


def _binary(function: Callable[..., Tensor]) -> Op:
    return lambda a, x, opset: function(x[0], x[1])


def _variadic(function: Callable[..., Tensor]) -> Op:
    return lambda a, x, opset: functools.reduce(function, x)


def _mean(a: Attributes, x: Inputs, opset: int) -> Tensor:
    total = functools.reduce(torch.add, x)
    return total / len(x)


def _div(a: Attributes, x: Inputs, opset: int) -> Tensor:
    # ONNX divides integers as C does.
    return torch.div(x[0], x[1], rounding_mode=None if x[0].is_floating_point() else "trunc")


def _mod(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return (torch.fmod if a.get("fmod", 0) else torch.remainder)(x[0], x[1])


def _pow(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return torch.pow(x[0], x[1]).to(x[0].dtype)


def _clip(a: Attributes, x: Inputs, opset: int) -> Tensor:
    low, high = optional(x, 1), optional(x, 2)
    if opset < 11:
        low, high = a.get("min"), a.get("max")
    return x[0] if low is None and high is None else torch.clamp(x[0], low, high)


def _bit_shift(a: Attributes, x: Inputs, opset: int) -> Tensor:
    shift = {"LEFT": torch.bitwise_left_shift, "RIGHT": torch.bitwise_right_shift}
    return shift[a["direction"]](x[0], x[1])


def _is_inf(a: Attributes, x: Inputs, opset: int) -> Tensor:
    found = torch.zeros_like(x[0], dtype=torch.bool)
    if a.get("detect_positive", 1):
        found = found | torch.isposinf(x[0])
    if a.get("detect_negative", 1):
        found = found | torch.isneginf(x[0])
    return found


def _gelu(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return F.gelu(x[0], approximate=a.get("approximate", "none"))


def _selu(a: Attributes, x: Inputs, opset: int) -> Tensor:
    alpha = a.get("alpha", 1.67326319217681884765625)
    return torch.mul(F.elu(x[0], alpha), a.get("gamma", 1.05070102214813232421875))


def _hard_sigmoid(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return torch.clamp(x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1)


def _prelu(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return torch.where(x[0] < 0, x[0] * x[1], x[0])


def _thresholded_relu(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return torch.where(x[0] > a.get("alpha", 1.0), x[0], torch.zeros_like(x[0]))


def _shrink(a: Attributes, x: Inputs, opset: int) -> Tensor:
    bias, edge = a.get("bias", 0.0), a.get("lambd", 0.5)
    outside = torch.where(x[0] < -edge, x[0] + bias, x[0] - bias)
    return torch.where(x[0].abs() > edge, outside, torch.zeros_like(outside)).to(x[0].dtype)


def _dropout(a: Attributes, x: Inputs, opset: int) -> tuple[Tensor, ...]:
    ratio, training = optional(x, 1), optional(x, 2)
    if training is not None and bool(training) and (ratio is None or float(ratio) != 0):
        raise ModelError("training_mode is set: expected an inference graph")
    return (x[0], torch.ones_like(x[0], dtype=torch.bool))[: a["num_outputs"]]


OPS: dict[str, Op] = {
    "Abs": _unary(torch.abs),
    "Acos": _unary(torch.acos),
    "Acosh": _unary(torch.acosh),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Asin": _unary(torch.asin),
    "Asinh": _unary(torch.asinh),
    "Atan": _unary(torch.atan),
    "Atanh": _unary(torch.atanh),
    "BitShift": _bit_shift,
    "BitwiseAnd": _binary(torch.bitwise_and),
    "BitwiseNot": _unary(torch.bitwise_not),
    "BitwiseOr": _binary(torch.bitwise_or),
    "BitwiseXor": _binary(torch.bitwise_xor),
    "Ceil": _unary(torch.ceil),
    "Celu": lambda a, x, opset: F.celu(x[0], a.get("alpha", 1.0)),
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "Cosh": _unary(torch.cosh),
    "Div": _div,
    "Dropout": _dropout,
    "Elu": lambda a, x, opset: F.elu(x[0], a.get("alpha", 1.0)),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": _gelu,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Identity": lambda a, x, opset: x[0],
    "IsInf": _is_inf,
    "IsNaN": _unary(torch.isnan),
    "LeakyRelu": lambda a, x, opset: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "Max": _variadic(torch.maximum),
    "Mean": _mean,
    "Min": _variadic(torch.minimum),
    "Mish": _unary(F.mish),
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _pow,
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Round": _unary(torch.round),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Sinh": _unary(torch.sinh),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _variadic(torch.add),
    "Swish": lambda a, x, opset: x[0] * torch.sigmoid(a.get("alpha", 1.0) * x[0]),
    "Tan": _unary(torch.tan),
    "Tanh": _unary(torch.tanh),
    "ThresholdedRelu": _thresholded_relu,
    "Where": lambda a, x, opset: torch.where(x[0], x[1], x[2]),
    "Xor": _binary(torch.logical_xor),
}
