"""Data movement by whole axes: shapes, slices, joins, padding. Shapes are CPU integers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.shadow.common import (
    Attributes,
    Inputs,
    Op,
    ints,
    list_of,
    optional,
    pad_spatial,
)


def _reshape(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data = x[0]
    shape = ints(x[1])
    if not a.get("allowzero", 0):
        shape = [data.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return data.reshape(shape)


def _flatten(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, axis = x[0], a.get("axis", 1)
    split = axis + data.ndim if axis < 0 else axis
    rows = math.prod(data.shape[:split]), math.prod(data.shape[split:])
    return data.reshape(rows)


def _transpose(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return x[0].permute(tuple(a.get("perm", reversed(range(x[0].ndim)))))


def _squeeze(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data = x[0]
    axes = list_of(a, x, "axes", 1)
    if axes is None:
        return data.squeeze()
    if any(data.shape[axis] != 1 for axis in axes):
        raise ModelError(f"axes {axes} of shape {list(data.shape)}: expected length 1")
    return data.squeeze(tuple(axes))


def _unsqueeze(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data = x[0]
    axes = list_of(a, x, "axes", 1) or []
    rank = data.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _slice(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data = x[0]
    starts, ends = list_of(a, x, "starts", 1) or [], list_of(a, x, "ends", 2) or []
    axes = list_of(a, x, "axes", 3) or list(range(len(starts)))
    steps = list_of(a, x, "steps", 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        data = _slice_axis(data, slice(start, end, step), axis)
    return data


def _slice_axis(x: Tensor, cut: slice, axis: int) -> Tensor:
    kept = range(x.shape[axis])[cut]
    if not kept:
        return x.narrow(axis, 0, 0)
    if kept.step < 0:  # the same elements in ascending order, then turned round
        return _slice_axis(x, slice(kept[-1], kept[0] + 1, -kept.step), axis).flip(axis)
    where = (slice(None),) * (axis % x.ndim)
    return x[(*where, slice(kept.start, kept.stop, kept.step))]


def _split(a: Attributes, x: Inputs, opset: int) -> tuple[Tensor, ...]:
    data, axis, parts = x[0], a.get("axis", 0), a["num_outputs"]
    sizes = list_of(a, x, "split", 1)
    if sizes is None:
        chunk = math.ceil(data.shape[axis] / parts)
        sizes = [chunk] * (parts - 1) + [data.shape[axis] - chunk * (parts - 1)]
    return torch.split_with_sizes(data, sizes, axis)


def _expand(a: Attributes, x: Inputs, opset: int) -> Tensor:
    shape = np.broadcast_shapes(tuple(x[0].shape), tuple(ints(x[1])))
    return x[0].expand(shape)


def _tile(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return x[0].tile(ints(x[1]))


def _pad(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, mode = x[0], a.get("mode", "constant")
    given = list_of(a, x, "pads", 1) or []
    fill, axes = optional(x, 2), list_of({}, x, "", 3)
    pads = [0] * (2 * data.ndim)
    for i, axis in enumerate(range(data.ndim) if axes is None else axes):
        pads[axis % data.ndim] = given[i]
        pads[axis % data.ndim + data.ndim] = given[i + len(given) // 2]
    if mode == "constant":
        value = fill.item() if fill is not None else a.get("value", 0)
        return pad_spatial(data, pads, value)
    for axis in range(data.ndim):
        data = _pad_axis(data, axis, pads[axis], pads[axis + data.ndim], mode)
    return data


def _pad_axis(x: Tensor, axis: int, begin: int, end: int, mode: str) -> Tensor:
    if not begin and not end:
        return x
    if begin < 0 or end < 0:
        raise ModelError(f"negative pads with mode '{mode}': expected mode 'constant'")
    order = np.pad(np.arange(x.shape[axis]), (begin, end), mode)  # type: ignore[call-overload]
    return x.index_select(axis, torch.from_numpy(order).to(x.device))


def _blocks(a: Attributes, x: Tensor) -> tuple[int, int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, h, w, a["blocksize"]


def _depth_to_space(a: Attributes, x: Inputs, opset: int) -> Tensor:
    n, c, h, w, b = _blocks(a, x[0])
    rest = c // (b * b)
    if a.get("mode", "DCR") == "DCR":
        y = x[0].reshape(n, b, b, rest, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x[0].reshape(n, rest, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, rest, h * b, w * b)


def _space_to_depth(a: Attributes, x: Inputs, opset: int) -> Tensor:
    n, c, h, w, b = _blocks(a, x[0])
    y = x[0].reshape(n, c, h // b, b, w // b, b)
    y = (
        y.permute(0, 3, 5, 1, 2, 4)
        if a.get("mode", "DCR") == "DCR"
        else y.permute(0, 1, 3, 5, 2, 4)
    )
    return y.reshape(n, c * b * b, h // b, w // b)


def _trilu(a: Attributes, x: Inputs, opset: int) -> Tensor:
    k = optional(x, 1)
    return (torch.triu if a.get("upper", 1) else torch.tril)(x[0], 0 if k is None else ints(k)[0])


def _shape(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return torch.tensor(list(x[0].shape)[a.get("start", 0) : a.get("end")], dtype=torch.int64)


OPS: dict[str, Op] = {
    "Concat": lambda a, x, opset: torch.cat(tuple(x), a["axis"]),
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda a, x, opset: torch.tensor(x[0].numel(), dtype=torch.int64),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
