"""The quantise/dequantise arithmetic: one copy, equal to ONNX Runtime bit for bit.

The functions work on numpy arrays and torch tensors alike: they use only
operators and the methods ``round`` (half to even) and ``clip``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_attnround.numerics import TINY
from onnx_attnround.records import Array, QuantParams, QuantSpec


def quantize(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int) -> Any:
    """``clip(round(x / scale) + zero_point, qmin, qmax)``, in the dtype of ``x``.

    ``scale`` and ``zero_point`` must broadcast against ``x``. Rounding is half
    to even, as the ONNX operator QuantizeLinear demands.
    """
    return ((x / scale).round() + zero_point).clip(qmin, qmax)


def dequantize(codes: Any, scale: Any, zero_point: Any) -> Any:
    """``(codes - zero_point) * scale``; arguments must broadcast.

    The type of ``codes`` and ``zero_point`` must hold their difference, as float does.
    """
    return (codes - zero_point) * scale


def params_from_range(spec: QuantSpec, lo: float, hi: float) -> QuantParams:
    """Per-tensor scale and zero point that cover ``[lo, hi]`` and represent 0 exactly.

    A symmetric spec centres the range on code 0 (signed) or the middle code
    (unsigned). A tensor that is constantly zero gets the range ``[0, 1]``: wide enough for
    values never seen, and fine enough for the bias behind it, whose step is that of input
    times weight. Others are at least as wide as the least range of the spec. The fixed range
    of a spec takes the place of ``[lo, hi]``.
    """
    lo, hi = (lo, hi) if spec.fixed_range is None else spec.fixed_range
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    if hi - lo < TINY:  # a narrower range would have a scale that float32 cannot hold
        lo, hi = 0.0, 1.0
    hi = max(hi, lo + spec.least_range)
    centre = 0 if spec.signed else (spec.qmax + 1) // 2
    if spec.symmetric:
        scale = max(lo / (spec.qmin - centre), hi / (spec.qmax - centre))
    else:
        scale = (hi - lo) / (spec.qmax - spec.qmin)
    scale32 = np.asarray(scale, np.float32)
    zero_point = centre if spec.symmetric else np.rint(spec.qmin - lo / float(scale32))
    return QuantParams(
        spec=spec,
        scale=scale32,
        zero_point=np.asarray(np.clip(zero_point, spec.qmin, spec.qmax), code_dtype(spec)),
    )


def range_of(params: QuantParams) -> tuple[float, float]:
    """The least and the largest value that codes of a per-tensor ``params`` stand for."""
    spec, scale, zero_point = params.spec, float(params.scale), int(params.zero_point)
    return (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale


def dynamic_grid(x: Any) -> tuple[float, float]:
    """Scale and zero point that DynamicQuantizeLinear has for ``x``, an array or a tensor.

    As the operator is defined: 8 bits, without sign, over the range of ``x`` and 0.
    """
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = float(np.float32(np.float32(hi - lo) / np.float32(255))) or 1.0
    return scale, float(np.rint(np.clip(-lo / scale, 0.0, 255.0)))


def dynamically(x: Any) -> Any:
    """``x`` as DynamicQuantizeLinear and DequantizeLinear leave it."""
    scale, zero = dynamic_grid(x)
    return dequantize(quantize(x, scale, zero, 0, 255), scale, zero)


def code_dtype(spec: QuantSpec) -> np.dtype[Any]:
    """The numpy integer type that holds the codes of ``spec`` (8 or 16 bits wide)."""
    return np.dtype(f"{'i' if spec.signed else 'u'}{1 if spec.bits <= 8 else 2}")


def channel_view(values: Array, rank: int, axis: int | None) -> Array:
    """``values`` (1-D, one per channel) reshaped to broadcast along ``axis`` of a tensor."""
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def spread(values: Array, shape: Sequence[int], spec: QuantSpec) -> Array:
    """Scales or zero points of ``spec`` so that they broadcast against a weight of ``shape``."""
    if spec.block_size is None or spec.axis is None:
        return channel_view(values, len(shape), spec.axis)
    axis = 1 - spec.axis  # of the inputs of a matrix
    return np.repeat(values, spec.block_size, axis)[: shape[0], : shape[1]]
