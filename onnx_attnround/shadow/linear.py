"""Products of tensors: Conv, ConvTranspose, Gemm, MatMul, Einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.ops import conv_pads
from onnx_attnround.shadow.common import Attributes, Inputs, Op, optional, pad_spatial

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _of_rank(functions: dict[int, Any], weight: Tensor) -> Any:
    rank = weight.ndim - 2
    if rank not in functions:
        raise ModelError(f"{rank} spatial dimensions: expected 1 to 3")
    return functions[rank]


def _conv(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, weight, bias = x[0], x[1], optional(x, 2)
    rank = weight.ndim - 2
    function = _of_rank(_CONV, weight)
    pads = conv_pads(a, data.shape[2:], weight.shape[2:])
    if pads[:rank] != pads[rank:]:
        data, pads = pad_spatial(data, pads), [0] * rank
    y: Tensor = function(
        data,
        weight,
        bias,
        tuple(a.get("strides", (1,) * rank)),
        tuple(pads[:rank]),
        tuple(a.get("dilations", (1,) * rank)),
        a.get("group", 1),
    )
    return y


def _crop(a: Attributes, sizes: Sequence[int], full: Sequence[int]) -> list[int]:
    """The pads that a transposed convolution takes away from its ``full`` output."""
    rank = len(sizes)
    mode = a.get("auto_pad", "NOTSET")
    wanted = a.get("output_shape")
    if wanted is None and mode.startswith("SAME"):
        strides = a.get("strides", (1,) * rank)
        wanted = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if wanted is None:
        return [0] * (2 * rank) if mode == "VALID" else list(a.get("pads", (0,) * (2 * rank)))
    total = [f - w for f, w in zip(full, wanted[-rank:], strict=True)]
    small = [t // 2 for t in total]
    large = [t - s for t, s in zip(total, small, strict=True)]
    return small + large if mode == "SAME_UPPER" else large + small


def _conv_transpose(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, weight, bias = x[0], x[1], optional(x, 2)
    rank = weight.ndim - 2
    function = _of_rank(_CONV_TRANSPOSE, weight)
    strides = tuple(a.get("strides", (1,) * rank))
    dilations = tuple(a.get("dilations", (1,) * rank))
    y: Tensor = function(data, weight, None, strides, 0, 0, a.get("group", 1), dilations)
    extra = a.get("output_padding", (0,) * rank)
    full = [size + more for size, more in zip(y.shape[2:], extra, strict=True)]
    pads = _crop(a, data.shape[2:], full)
    ends = [more - pad for more, pad in zip(extra, pads[rank:], strict=True)]
    y = pad_spatial(y, [-pad for pad in pads[:rank]] + ends)
    return y if bias is None else y + bias.reshape(-1, *(1,) * rank)


def _gemm(a: Attributes, x: Inputs, opset: int) -> Tensor:
    left = x[0].T if a.get("transA", 0) else x[0]
    right = x[1].T if a.get("transB", 0) else x[1]
    alpha, beta, bias = a.get("alpha", 1.0), a.get("beta", 1.0), optional(x, 2)
    y = left @ right
    if alpha != 1:
        y = alpha * y
    if bias is None:
        return y
    return y + (bias if beta == 1 else beta * bias)


OPS: dict[str, Op] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": lambda a, x, opset: torch.einsum(a["equation"], *x),
    "Gemm": _gemm,
    "MatMul": lambda a, x, opset: torch.matmul(x[0], x[1]),
}
