"""Normalisations and the softmax family."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.shadow.common import Attributes, Inputs, Op, optional


def _batch_norm(a: Attributes, x: Inputs, opset: int) -> Tensor:
    if a.get("training_mode", 0) or not a.get("spatial", 1):
        raise ModelError("training_mode=1 or spatial=0: expected an inference graph, per channel")
    data, scale, bias, mean, variance = x
    return F.batch_norm(data, mean, variance, scale, bias, False, 0.0, _epsilon(a))


def _epsilon(a: Attributes) -> float:
    return float(a.get("epsilon", 1e-5))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (x.ndim - 2))


def _instance_norm(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return torch.group_norm(x[0], x[0].shape[1], x[1], x[2], _epsilon(a))


def _group_norm(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, scale, bias = x
    groups = a["num_groups"]
    if opset < 21:  # one scale and bias per group, not per channel
        scale, bias = (t.repeat_interleave(data.shape[1] // groups) for t in (scale, bias))
    y = torch.group_norm(data, groups, eps=_epsilon(a))
    return y * _per_channel(scale, data) + _per_channel(bias, data)


def _layer_norm(a: Attributes, x: Inputs, opset: int) -> tuple[Tensor, ...]:
    data, bias = x[0], optional(x, 2)
    axis = a.get("axis", -1) % data.ndim
    y = torch.layer_norm(data, data.shape[axis:], eps=_epsilon(a)) * x[1]
    if bias is not None:
        y = y + bias
    if a["num_outputs"] == 1:
        return (y,)
    dims = tuple(range(axis, data.ndim))
    variance, mean = torch.var_mean(data.float(), dims, correction=0, keepdim=True)
    return y, mean, (variance + _epsilon(a)).rsqrt()


def _rms_norm(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data = x[0]
    y = F.rms_norm(data, data.shape[a.get("axis", -1) % data.ndim :], eps=_epsilon(a))
    return y * x[1]


def _lp_norm(a: Attributes, x: Inputs, opset: int) -> Tensor:
    norm = torch.linalg.vector_norm(x[0], a.get("p", 2), a.get("axis", -1), keepdim=True)
    return x[0] / torch.where(norm == 0, 1.0, norm)


def _lrn(a: Attributes, x: Inputs, opset: int) -> Tensor:
    size, data = a["size"], x[0]
    flat = data.square().flatten(2).transpose(1, 2)  # channels last, where F.pad reaches them
    sums = F.pad(flat, ((size - 1) // 2, size // 2)).unfold(-1, size, 1).sum(-1)
    energy = sums.transpose(1, 2).reshape(data.shape)
    base = energy * (a.get("alpha", 1e-4) / size) + a.get("bias", 1.0)
    return data / torch.pow(base, a.get("beta", 0.75))


def _mean_variance(a: Attributes, x: Inputs, opset: int) -> Tensor:
    axes = tuple(a.get("axes", (0, 2, 3)))
    variance, mean = torch.var_mean(x[0], axes, correction=0, keepdim=True)
    return (x[0] - mean) / (variance.sqrt() + 1e-9)


def _hardmax(x: Tensor, dim: int) -> Tensor:
    winner = x.argmax(dim, keepdim=True)
    return torch.zeros_like(x).scatter(dim, winner, 1.0)


def _softmax_like(function: Callable[[Tensor, int], Tensor]) -> Op:
    def op(a: Attributes, x: Inputs, opset: int) -> Tensor:
        data = x[0]
        if opset >= 13:
            return function(data, a.get("axis", -1))
        # Old opsets normalise over all axes from ``axis`` on.
        axis = a.get("axis", 1)
        split = axis + data.ndim if axis < 0 else axis
        rows = data.reshape(math.prod(data.shape[:split]), math.prod(data.shape[split:]))
        y = function(rows, 1)
        return y.reshape(data.shape)

    return op


OPS: dict[str, Op] = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "Hardmax": _softmax_like(_hardmax),
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax_like(torch.log_softmax),
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": _rms_norm,
    "Softmax": _softmax_like(torch.softmax),
}
