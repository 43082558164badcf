"""Element types: casts, constants, QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.qdq.arithmetic import dequantize, quantize
from onnx_attnround.shadow.common import Attributes, Inputs, Op, optional, torch_dtype

_CODES = (torch.int8, torch.uint8, torch.int16, torch.uint16)


def _cast(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return x[0].to(torch_dtype(a["to"]))


def _cast_like(a: Attributes, x: Inputs, opset: int) -> Tensor:
    return x[0].to(x[1].dtype)


def _constant(a: Attributes, x: Inputs, opset: int) -> Tensor:
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64)):
        if name in a:
            return torch.tensor(a[name], dtype=dtype)
        if name + "s" in a:
            return torch.tensor(list(a[name + "s"]), dtype=dtype)
    if "value" not in a:
        raise ModelError(f"attributes {sorted(a)}: expected value, or value_float(s) or _int(s)")
    value: Tensor = a["value"]
    return value


def _along(a: Attributes, values: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point (one in all, one per channel, or blocked) spread over ``x``."""
    if values.numel() == 1:
        return values.reshape(())
    axis, block = a.get("axis", 1) % x.ndim, a.get("block_size", 0)
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if values.ndim != 1:
        raise ModelError(f"scale of rank {values.ndim} without block_size: expected rank 0 or 1")
    return values.reshape(-1, *(1,) * (x.ndim - axis - 1))


def _quantize(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, zero_point = x[0], optional(x, 2)
    if zero_point is None:
        dtype = torch_dtype(a.get("output_dtype", 0) or ir.DataType.UINT8)
    else:
        dtype = zero_point.dtype
    if dtype not in _CODES or a.get("precision", 0):
        raise ModelError(
            f"codes of {dtype}, precision {a.get('precision', 0)}: expected 8 or 16 "
            "bits and the default precision"
        )
    scale = _along(a, x[1], data)
    zero = 0 if zero_point is None else _along(a, zero_point.to(scale.dtype), data)
    limits = torch.iinfo(dtype)
    codes: Tensor = quantize(data, scale, zero, limits.min, limits.max)
    return codes.to(dtype)


def _dequantize(a: Attributes, x: Inputs, opset: int) -> Tensor:
    codes, zero_point = x[0].to(torch.int32), optional(x, 2)
    zero = 0 if zero_point is None else _along(a, zero_point.to(torch.int32), codes)
    values: Tensor = dequantize(codes, _along(a, x[1], codes), zero)
    return values.to(torch_dtype(a["output_dtype"])) if a.get("output_dtype", 0) else values


OPS: dict[str, Op] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Constant": _constant,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
}
