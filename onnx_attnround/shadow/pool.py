"""Pooling over windows and over whole feature maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.ops import conv_pads
from onnx_attnround.shadow.common import Attributes, Inputs, Op, pad_spatial

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True, slots=True)
class _Window:
    """The geometry of a pool: ``pads`` are explicit, ``tail`` is what ``ceil_mode`` adds."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: list[int]
    tail: list[int]


def _window(a: Attributes, x: Tensor) -> _Window:
    kernel = tuple(a["kernel_shape"])
    rank = len(kernel)
    if rank not in _CONV:
        raise ModelError(f"{rank} spatial dimensions: expected 1 to 3")
    strides = tuple(a.get("strides", (1,) * rank))
    dilations = tuple(a.get("dilations", (1,) * rank))
    pads = conv_pads(a, x.shape[2:], kernel)
    tail = [0] * rank
    if a.get("ceil_mode", 0):
        tail = [
            _tail(size, k, s, d, pads[axis], pads[axis + rank])
            for axis, (size, k, s, d) in enumerate(
                zip(x.shape[2:], kernel, strides, dilations, strict=True)
            )
        ]
    return _Window(kernel, strides, dilations, pads, tail)


def _tail(size: int, kernel: int, stride: int, dilation: int, begin: int, end: int) -> int:
    """What one axis misses for its last, partial window; that must start within the input."""
    reach = dilation * (kernel - 1) + 1
    count = math.ceil((size + begin + end - reach) / stride) + 1
    if (count - 1) * stride >= size + begin:
        count -= 1
    return max((count - 1) * stride + reach - size - begin - end, 0)


def _max_pool(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data = x[0]
    w = _window(a, data)
    if not data.is_floating_point():
        raise ModelError(f"element type {data.dtype}: expected a float type")
    rank = len(w.kernel)
    ends = [end + tail for end, tail in zip(w.pads[rank:], w.tail, strict=True)]
    padded = pad_spatial(data, w.pads[:rank] + ends, -math.inf)
    return _MAX_POOL[rank](padded, w.kernel, w.strides, 0, w.dilations)


def _window_sums(x: Tensor, w: _Window) -> Tensor:
    """The sum over each window of ``x [n, c, *sizes]``, already padded."""
    rank = len(w.kernel)
    ones = torch.ones((1, 1, *w.kernel), dtype=x.dtype, device=x.device)
    sums = _CONV[rank](x.flatten(0, 1)[:, None], ones, None, w.strides, 0, w.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def _average_pool(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data = x[0]
    w = _window(a, data)
    tail = [0] * len(w.kernel) + w.tail
    sums = _window_sums(pad_spatial(pad_spatial(data, w.pads), tail), w)
    inside = float(a.get("count_include_pad", 0))
    ones = torch.ones((1, 1, *data.shape[2:]), dtype=data.dtype, device=data.device)
    return sums / _window_sums(pad_spatial(pad_spatial(ones, w.pads, inside), tail), w)


def _lp_pool(a: Attributes, x: Inputs, opset: int) -> Tensor:
    p = a.get("p", 2)
    w = _window(a, x[0])
    tail = [0] * len(w.kernel) + w.tail
    powers = pad_spatial(pad_spatial(x[0].abs() ** p, w.pads), tail)
    sums = _window_sums(powers, w)
    return torch.pow(sums, 1 / p)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _global_lp_pool(a: Attributes, x: Inputs, opset: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x[0], a.get("p", 2), _spatial(x[0]), keepdim=True)
    return norm


OPS: dict[str, Op] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda a, x, opset: x[0].mean(_spatial(x[0]), keepdim=True),
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": lambda a, x, opset: x[0].amax(_spatial(x[0]), keepdim=True),
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
}
