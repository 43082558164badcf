"""Resize and Upsample: one interpolation matrix per axis.

The coordinates are computed in float32, as ONNX Runtime does, so that both
pick the same neighbours where a coordinate falls on a boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.shadow.common import Attributes, Inputs, Op, ints, optional

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_WHOLE = 1e-3
"""How far from an integer an output size may be, in elements."""
_TIE = 1e-6


def _half_pixel(y: Floats, scale: np.float32, size: int, count: int) -> Floats:
    return (y + np.float32(0.5)) / scale - np.float32(0.5)


def _pytorch_half_pixel(y: Floats, scale: np.float32, size: int, count: int) -> Floats:
    return _half_pixel(y, scale, size, count) if count > 1 else y * 0


def _asymmetric(y: Floats, scale: np.float32, size: int, count: int) -> Floats:
    return y / scale


def _align_corners(y: Floats, scale: np.float32, size: int, count: int) -> Floats:
    return y * np.float32(size - 1) / np.float32(max(count - 1, 1))


_COORDINATES: dict[str, Callable[[Floats, np.float32, int, int], Floats]] = {
    "align_corners": _align_corners,
    "asymmetric": _asymmetric,
    "half_pixel": _half_pixel,
    "pytorch_half_pixel": _pytorch_half_pixel,
}

# Like ONNX Runtime, take for a tie what float32 misses by a rounding error.
_NEAREST: dict[str, Callable[[Doubles], Doubles]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda x: np.floor(x + 0.5 + _TIE),
    "round_prefer_floor": lambda x: np.ceil(x - 0.5 - _TIE),
}


def _linear_taps(ratio: Floats, a: Attributes) -> list[Floats]:
    return [1 - ratio, ratio]


def _cubic_taps(ratio: Floats, a: Attributes) -> list[Floats]:
    k = float(a.get("cubic_coeff_a", -0.75))

    def far(d: Floats) -> Floats:
        return ((k * d - 5 * k) * d + 8 * k) * d - 4 * k

    def near(d: Floats) -> Floats:
        return ((k + 2) * d - (k + 3)) * d * d + 1

    return [far(ratio + 1), near(ratio), near(1 - ratio), far(2 - ratio)]


_TAPS = {"linear": _linear_taps, "cubic": _cubic_taps}


def _matrix(a: Attributes, position: Floats, size: int) -> Doubles:
    """Interpolation weights ``[count, size]``; beyond the border the edge repeats."""
    left = np.floor(position)
    taps = np.stack(_TAPS[a["mode"]](position - left, a), 1)
    where = left.astype(np.int64)[:, None] + np.arange(taps.shape[1]) - (taps.shape[1] // 2 - 1)
    if a.get("exclude_outside", 0):
        taps = np.where((where < 0) | (where >= size), 0, taps)
        taps = taps / taps.sum(1, keepdims=True)
    matrix = np.zeros((len(position), size))
    np.add.at(matrix, (np.arange(len(position))[:, None], where.clip(0, size - 1)), taps)
    return matrix


def _resize_axis(a: Attributes, x: Tensor, axis: int, scale: np.float32, count: int) -> Tensor:
    size = x.shape[axis]
    if count == size and scale == 1:
        return x
    name = a.get("coordinate_transformation_mode", "half_pixel")
    whole = abs(float(scale) * size - count) < _WHOLE
    if not whole and (name == "align_corners" or count == size):
        raise ModelError(
            f"scale {scale} of size {size}, with {name}: expected a whole output size, since "
            "runtimes disagree otherwise"
        )
    transform = _COORDINATES[name]
    position = transform(np.arange(count, dtype=np.float32), scale, size, count)
    if a["mode"] == "nearest":
        index = _NEAREST[a.get("nearest_mode", "round_prefer_floor")](position.astype(np.float64))
        order = torch.from_numpy(index.astype(np.int64).clip(0, size - 1))
        return x.index_select(axis, order.to(x.device))
    matrix = torch.from_numpy(_matrix(a, position, size)).to(x)
    return (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)


def _check(a: Attributes, x: Tensor) -> None:
    expected: dict[str, tuple[Any, ...]] = {
        "mode": ("nearest", *_TAPS) if x.is_floating_point() else ("nearest",),
        "coordinate_transformation_mode": tuple(_COORDINATES),
        "nearest_mode": tuple(_NEAREST),
        "antialias": (0,),
        "keep_aspect_ratio_policy": ("stretch",),
    }
    for name, values in expected.items():
        if name in a and a[name] not in values:
            known = ", ".join(map(str, values))
            raise ModelError(f"{name} {a[name]} on {x.dtype}: expected one of {known}")


def _apply(a: Attributes, x: Tensor, scales: list[Any], counts: list[int] | None) -> Tensor:
    _check(a, x)
    axes = a.get("axes", range(x.ndim))
    for i, axis in enumerate(axes):
        size = x.shape[axis]
        if counts is None:
            scale = np.float32(scales[i])
            x = _resize_axis(a, x, axis, scale, int(scale * np.float32(size)))
        else:
            x = _resize_axis(a, x, axis, np.float32(counts[i]) / np.float32(size), counts[i])
    return x


def _resize(a: Attributes, x: Inputs, opset: int) -> Tensor:
    a = {"mode": "nearest", **a}
    if opset < 11:
        return _legacy(a, x[0], x[1].cpu().tolist())
    scales, sizes = optional(x, 2), optional(x, 3)
    counts = ints(sizes) if sizes is not None and sizes.numel() else None
    return _apply(a, x[0], [] if scales is None else scales.cpu().tolist(), counts)


def _upsample(a: Attributes, x: Inputs, opset: int) -> Tensor:
    scales = a["scales"] if opset < 9 else x[1].cpu().tolist()
    return _legacy({"mode": "nearest", **a}, x[0], list(scales))


def _legacy(a: Attributes, x: Tensor, scales: list[float]) -> Tensor:
    if a["mode"] == "nearest" and min(scales) < 1:
        raise ModelError(f"nearest with scales {scales} before opset 11: expected scales >= 1")
    old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return _apply({**a, **old}, x, scales, None)


OPS: dict[str, Op] = {"Resize": _resize, "Upsample": _upsample}
