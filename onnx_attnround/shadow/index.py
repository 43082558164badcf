"""Data movement by index tensors: gather, scatter, one-hot."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.shadow.common import Attributes, Inputs, Op, ints

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(index: Tensor, size: int) -> Tensor:
    """``index`` with negative entries counted from the end."""
    index = index.long()
    return torch.where(index < 0, index + size, index)


def _gather(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, index = x[0], x[1]
    axis = a.get("axis", 0) % data.ndim
    picked = data.index_select(axis, _wrapped(index, data.shape[axis]).reshape(-1))
    return picked.reshape((*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]))


def _gather_elements(a: Attributes, x: Inputs, opset: int) -> Tensor:
    axis = a.get("axis", 0)
    return torch.gather(x[0], axis, _wrapped(x[1], x[0].shape[axis]))


def _flat_index(index: Tensor, shape: list[int]) -> Tensor:
    """``index [..., k]`` into the first k axes of ``shape`` as one index into their product."""
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for axis in range(index.shape[-1]):
        flat = flat * shape[axis] + _wrapped(index[..., axis], shape[axis])
    return flat


def _gather_nd(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, index, batch = x[0], x[1], a.get("batch_dims", 0)
    last = batch + index.shape[-1]
    lead, shape = math.prod(data.shape[:batch]), list(data.shape[batch:last])
    flat = _flat_index(index, shape).reshape(lead, -1)
    offset = torch.arange(lead, device=flat.device)[:, None] * math.prod(shape)
    rows = data.reshape(-1, math.prod(data.shape[last:]))
    return rows[(flat + offset).reshape(-1)].reshape((*index.shape[:-1], *data.shape[last:]))


def _scatter(target: Tensor, axis: int, index: Tensor, updates: Tensor, how: str) -> Tensor:
    if how == "none":
        return target.scatter(axis, index, updates)
    if how not in _REDUCTIONS:
        raise ModelError(f"reduction '{how}': expected one of none, {', '.join(_REDUCTIONS)}")
    return target.scatter_reduce(axis, index, updates, _REDUCTIONS[how])


def _scatter_elements(a: Attributes, x: Inputs, opset: int) -> Tensor:
    axis = a.get("axis", 0)
    index = _wrapped(x[1], x[0].shape[axis])
    return _scatter(x[0], axis, index, x[2], a.get("reduction", "none"))


def _scatter_nd(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, depth = x[0], x[1].shape[-1]
    width = math.prod(data.shape[depth:])
    flat = _flat_index(x[1], list(data.shape)).reshape(-1, 1).expand(-1, width)
    rows, updates = data.reshape(-1, width), x[2].reshape(-1, width)
    return _scatter(rows, 0, flat, updates, a.get("reduction", "none")).reshape(data.shape)


def _one_hot(a: Attributes, x: Inputs, opset: int) -> Tensor:
    index, depth, (off, on) = x[0], ints(x[1])[0], x[2]
    axis = a.get("axis", -1)
    axis = axis + index.ndim + 1 if axis < 0 else axis
    levels = torch.arange(depth, device=index.device).reshape(-1, *(1,) * (index.ndim - axis))
    hit = _wrapped(index, depth).unsqueeze(axis) == levels
    return torch.where(hit, on, off)


def _compress(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, axis = (x[0], a["axis"]) if "axis" in a else (x[0].reshape(-1), 0)
    kept = torch.nonzero(x[1]).reshape(-1)
    return data.index_select(axis, kept)


def _range(a: Attributes, x: Inputs, opset: int) -> Tensor:
    start, limit, step = (t.item() for t in x)
    count = max(math.ceil((limit - start) / step), 0)
    return start + step * torch.arange(count, dtype=x[0].dtype, device=x[0].device)


def _constant_of_shape(a: Attributes, x: Inputs, opset: int) -> Tensor:
    value = a["value"] if "value" in a else torch.zeros(1)
    return torch.full(ints(x[0]), value.item(), dtype=value.dtype)


OPS: dict[str, Op] = {
    "Compress": _compress,
    "ConstantOfShape": _constant_of_shape,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": lambda a, x, opset: torch.nonzero(x[0]).T,
    "OneHot": _one_hot,
    "Range": _range,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}
