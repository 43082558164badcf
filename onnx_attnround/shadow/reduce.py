"""Reductions over axes, arg-extrema, running sums and TopK."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnx_attnround.shadow.common import Attributes, Inputs, Op, ints, list_of


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Op:
    def op(a: Attributes, x: Inputs, opset: int) -> Tensor:
        data, keep = x[0], bool(a.get("keepdims", 1))
        axes = list_of(a, x, "axes", 1) or []
        if not axes and not a.get("noop_with_empty_axes", 0):
            axes = list(range(data.ndim))
        if not axes:  # reduce nothing: over a new axis of length one
            data, axes, keep = data[None], [0], False
        y = function(data, axes, keep)
        return y.to(data.dtype)

    return op


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _arg(function: Callable[..., Tensor]) -> Op:
    def op(a: Attributes, x: Inputs, opset: int) -> Tensor:
        axis, keep = a.get("axis", 0), bool(a.get("keepdims", 1))
        if not a.get("select_last_index", 0):
            return function(x[0], axis, keep)
        return x[0].shape[axis] - 1 - function(x[0].flip(axis), axis, keep)

    return op


def _cumulative(function: Callable[..., Tensor], neutral: int) -> Op:
    def op(a: Attributes, x: Inputs, opset: int) -> Tensor:
        axis = ints(x[1])[0]
        data = x[0].flip(axis) if a.get("reverse", 0) else x[0]
        y = function(data, axis, dtype=data.dtype)
        if a.get("exclusive", 0):
            head = torch.full_like(y.narrow(axis, 0, 1), neutral)
            y = torch.cat([head, y.narrow(axis, 0, y.shape[axis] - 1)], axis)
        return y.flip(axis) if a.get("reverse", 0) else y

    return op


def _top_k(a: Attributes, x: Inputs, opset: int) -> tuple[Tensor, Tensor]:
    axis = a.get("axis", -1)
    k = a["k"] if opset < 10 else ints(x[1])[0]
    # A stable sort gives equal elements in the order of their indices, as ONNX demands.
    values, order = torch.sort(x[0], stable=True, dim=axis, descending=bool(a.get("largest", 1)))
    return values.narrow(axis, 0, k), order.narrow(axis, 0, k)


OPS: dict[str, Op] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumProd": _cumulative(torch.cumprod, 1),
    "CumSum": _cumulative(torch.cumsum, 0),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceLogSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduce(_prod),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "TopK": _top_k,
}
