"""Second moments of a layer's input: all that the rounding of its weight needs to know.

With ``x`` the float input patches, ``v`` those of the quantised prefix and
``e = x - v``, the output error of codes ``q`` is, per output row and exactly,

    E |W x - Q v|^2 = E |W e|^2 - 2 (W D)·delta + delta G delta',   delta = Q - W,
    G = E[v v'],  D = E[e v'],

so that a step of the optimiser costs ``o d^2`` and no activations. Where the
layer has a bias, moments are centred: the best bias for any ``Q`` is then
implied, and is ``b + W E[x] - Q E[v]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from onnx_attnround.ops import input_grid
from onnx_attnround.records import Array, LayerPlan, QuantParams

GOLDEN = 0.6180339887498949
POSITIONS_PER_INPUT = 32  # patches sampled, per entry of a patch ...
MIN_POSITIONS = 16384  # ... and at least
MANY_INPUTS = 128  # from here on products take so long that bfloat16 pays


@dataclass(slots=True)
class Moments:
    """Running sums over sampled patches; torch tensors, float32.

    ``gram`` and ``cross`` are ``[g, d, d]``; ``mean_v`` and ``mean_e`` ``[g, d]``;
    ``power`` is ``E |W e|^2`` and ``signal`` the variance of ``W x``, both ``[g, o]``.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    mean_v: torch.Tensor
    mean_e: torch.Tensor
    power: torch.Tensor
    signal: torch.Tensor

    @property
    def finite(self) -> bool:
        """Whether no sum overflowed, as squares of inputs beyond some 1e18 do."""
        means = (self.gram, self.cross, self.mean_v, self.mean_e, self.power, self.signal)
        return all(bool(mean.isfinite().all()) for mean in means)


def collect(
    layer: LayerPlan,
    weight: torch.Tensor,
    batches: Iterable[tuple[Array, Array]],
    count: int,
    params: QuantParams | None,
    *,
    centred: bool,
) -> Moments:
    """Moments of ``layer`` from ``(x, v)`` batches of ``count`` samples in all.

    ``weight`` is ``[g, o, d]``. ``v`` are codes where ``params`` is given. Which
    patches are sampled depends on a sample's running index alone, not on the
    batch that it comes in.
    """
    sums: list[torch.Tensor] | None = None
    total, seen = 0, 0
    for x, v in batches:
        rows_x, rows_v = _rows(layer, x, v, params, seen, count, weight.shape[-1])
        seen += x.shape[0]
        total += rows_v.shape[1]
        parts = _sums(weight, rows_x, rows_v, params)
        sums = parts if sums is None else [a.add_(b) for a, b in zip(sums, parts, strict=True)]
    if sums is None:
        raise ValueError("no batches")
    return _finish(weight, [s / total for s in sums], centred=centred)


def _rows(
    layer: LayerPlan,
    x: Array,
    v: Array,
    params: QuantParams | None,
    seen: int,
    count: int,
    depth: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled patches of both streams, ``[g, n, d]``; ``v`` in steps of its scale, from zero."""
    zero = 0.0 if params is None else float(params.zero_point)
    grid_x, grid_v = (input_grid(layer, _tensor(values)) for values in (x, v))
    index = _positions(len(grid_x.x), grid_x.count, seen, count, depth)
    sources = grid_x.sources(index)
    rows_v = grid_v.rows(sources, zero).float()
    return grid_x.rows(sources), rows_v if params is None else rows_v.sub_(zero)


def _tensor(values: Array) -> torch.Tensor:
    """A view of an array that torch only reads; a copy of samples of a file and 16-bit codes."""
    if values.dtype == np.uint16:  # which torch has few kernels for
        values = values.astype(np.int32)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _positions(samples: int, positions: int, seen: int, count: int, depth: int) -> torch.Tensor:
    """Flat positions ``[samples, p]``: all of them, or a low-discrepancy subset."""
    wanted = max(MIN_POSITIONS, POSITIONS_PER_INPUT * depth)
    per_sample = -(-wanted // max(count, 1))
    if per_sample >= positions:
        return torch.arange(positions).expand(samples, positions)
    running = np.arange(seen * per_sample, (seen + samples) * per_sample, dtype=np.float64)
    chosen = np.floor(((running * GOLDEN) % 1.0) * positions).astype(np.int64)
    return torch.from_numpy(chosen.reshape(samples, per_sample))


def _sums(
    weight: torch.Tensor, x: torch.Tensor, v: torch.Tensor, params: QuantParams | None
) -> list[torch.Tensor]:
    scale = 1.0 if params is None else float(params.scale)
    e = torch.sub(x, v, alpha=scale)
    codes = params is not None and params.spec.bits <= 8
    with _short_products(codes and weight.shape[-1] >= MANY_INPUTS):
        gram, cross = _product(v, v), _product(e, v)
    return [
        gram.mul_(scale * scale),
        cross.mul_(scale),
        v.sum(1).mul_(scale),
        e.sum(1),
        (e @ weight.transpose(1, 2)).square_().sum(1),
    ]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a' b`` for each group, ``[g, d, d]``; torch is slower on a batch of one."""
    return (a[0].T @ b[0])[None] if len(a) == 1 else a.transpose(1, 2) @ b


@contextmanager
def _short_products(allowed: bool) -> Iterator[None]:
    """Where ``allowed``, multiply in bfloat16 and add in float32, if the hardware is faster so.

    Exact for products of two 8-bit codes, which bfloat16 holds; of a product with
    ``e`` each term is within 2^-9 of its value, at random.
    """
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else usual)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


def _finish(weight: torch.Tensor, means: list[torch.Tensor], *, centred: bool) -> Moments:
    gram, cross, mean_v, mean_e, power = means
    covariance = gram - mean_v[:, :, None] * mean_v[:, None, :]
    cross_covariance = cross - mean_e[:, :, None] * mean_v[:, None, :]
    variance = power - (weight @ mean_e[..., None])[..., 0].square()
    # the variance of W x = W v + W e
    signal = variance + ((weight @ (covariance + 2 * cross_covariance)) * weight).sum(-1)
    if centred:
        gram, cross, power = covariance, cross_covariance, variance
    return Moments(
        gram=gram,
        cross=cross,
        mean_v=mean_v,
        mean_e=mean_e,
        power=power.clamp_min(0.0),
        signal=signal.clamp_min(0.0),
    )
