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

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from onnx_attnround.ops import input_grid
from onnx_attnround.records import LayerPlan, QuantParams
from onnx_attnround.rounding.gram import Gram, dense, factored

GOLDEN = 0.6180339887498949
PER_INPUT = 512  # patches sampled, for each entry of a patch ...
ENOUGH = 16384  # ... while that is no more than this; then so many, and ...
LEAST_PER_INPUT = 32  # ... for each entry at least
WIDE = 8192  # inputs beyond which patches are kept, and not all of their products ...
WIDE_PATCHES = 8192  # ... of so many patches
MANY_INPUTS = 128  # from here on products take so long that bfloat16 pays


@dataclass(slots=True)
class Moments:
    """Running sums over sampled patches; torch tensors, float32.

    ``gram`` is ``G``, ``linear`` ``W D`` ``[g, o, d]``; ``mean_v`` and ``mean_e`` ``[g, d]``;
    ``power`` is ``E |W e|^2`` and ``signal`` the variance of ``W x``, both ``[g, o]``.
    """

    gram: Gram
    linear: torch.Tensor
    mean_v: torch.Tensor
    mean_e: torch.Tensor
    power: torch.Tensor
    signal: torch.Tensor

    @property
    def finite(self) -> bool:
        """Whether no sum overflowed, as squares of inputs beyond some 1e18 do."""
        means = (self.linear, self.mean_v, self.mean_e, self.power, self.signal)
        return self.gram.finite and all(bool(mean.isfinite().all()) for mean in means)


def collect(
    layer: LayerPlan,
    weight: torch.Tensor,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    count: int,
    params: QuantParams | None,
    *,
    centred: bool,
) -> Moments:
    """Moments of ``layer`` from ``(x, v)`` batches of ``count`` samples in all.

    ``weight`` is ``[g, o, d]``, on the device of the batches. ``v`` are codes where
    ``params`` is given. Which patches are sampled depends on a sample's running index
    alone, not on the batch that it comes in; those that are not finite are left out.
    """
    depth, scale = weight.shape[-1], 1.0 if params is None else float(params.scale)
    codes = params is not None and params.spec.bits <= 8
    second = _Patches() if depth > WIDE else _Products(short=codes and depth >= MANY_INPUTS)
    sums: list[torch.Tensor] | None = None
    total: float = 0
    seen = 0
    for x, v in batches:
        rows_x, rows_v = _finite(x, v, *_rows(layer, x, v, params, seen, count, depth))
        seen += x.shape[0]
        total += rows_v.shape[1]
        e = torch.sub(rows_x, rows_v, alpha=scale)
        out_e = e @ weight.transpose(1, 2)
        second.add(rows_v, e, out_e, scale)
        sums = _added(sums, [rows_v.sum(1).mul_(scale), e.sum(1), out_e.square_().sum(1)])
    if sums is None:
        raise ValueError("no batches")
    if not total:
        total = math.nan  # there is nothing to go by, which the result says
    mean_v, mean_e, power = (part / total for part in sums)
    gram, linear = second.finish(weight, total)
    return _finish(weight, gram, linear, mean_v, mean_e, power, centred=centred)


def _added(sums: list[torch.Tensor] | None, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return parts if sums is None else [a.add_(b) for a, b in zip(sums, parts, strict=True)]


def _rows(
    layer: LayerPlan,
    x: torch.Tensor,
    v: torch.Tensor,
    params: QuantParams | None,
    seen: int,
    count: int,
    depth: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled patches of both streams, ``[g, n, d]``; ``v`` in steps of its scale, from zero."""
    zero = 0.0 if params is None else float(params.zero_point)
    grid_x, grid_v = (input_grid(layer, _plain(values)) for values in (x, v))
    index = _positions(len(grid_x.x), grid_x.count, seen, count, depth)
    sources = grid_x.sources(index)
    rows_v = grid_v.rows(sources, zero).float()
    return grid_x.rows(sources), rows_v if params is None else rows_v.sub_(zero)


def _finite(
    x: torch.Tensor, v: torch.Tensor, rows_x: torch.Tensor, rows_v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are finite in both streams: positions that are masked throughout are NaN."""
    if bool(x.isfinite().all()) and bool(v.isfinite().all()):
        return rows_x, rows_v
    kept = (rows_x.isfinite() & rows_v.isfinite()).all(-1).all(0)
    return rows_x[:, kept], rows_v[:, kept]


def _plain(values: torch.Tensor) -> torch.Tensor:
    """The values in a type that torch has all kernels for."""
    return values.int() if values.dtype == torch.uint16 else values


def wanted_patches(depth: int) -> int:
    """How many patches of ``depth`` entries are looked at, where there are as many."""
    if depth > WIDE:
        return WIDE_PATCHES
    return max(min(PER_INPUT * depth, ENOUGH), LEAST_PER_INPUT * depth)


def _positions(samples: int, positions: int, seen: int, count: int, depth: int) -> torch.Tensor:
    """Flat positions ``[samples, p]``: all of them, or a low-discrepancy subset."""
    per_sample = -(-wanted_patches(depth) // max(count, 1))
    if per_sample >= positions:
        return torch.arange(positions).expand(samples, positions)
    running = np.arange(seen * per_sample, (seen + samples) * per_sample, dtype=np.float64)
    chosen = np.floor(((running * GOLDEN) % 1.0) * positions).astype(np.int64)
    return torch.from_numpy(chosen.reshape(samples, per_sample))


class _Products:
    """``G`` and ``W D`` from running sums of ``v v'`` and ``e v'``."""

    def __init__(self, *, short: bool) -> None:
        self._short = short
        self._sums: list[torch.Tensor] | None = None

    def add(self, v: torch.Tensor, e: torch.Tensor, out_e: torch.Tensor, scale: float) -> None:
        with _short_products(self._short):
            gram, cross = _product(v, v), _product(e, v)
        self._sums = _added(self._sums, [gram.mul_(scale * scale), cross.mul_(scale)])

    def finish(self, weight: torch.Tensor, total: float) -> tuple[Gram, torch.Tensor]:
        gram, cross = (part / total for part in self._sums or ())
        return dense(gram), weight @ cross


class _Patches:
    """``G`` from the patches ``v`` themselves, ``W D`` from running sums of ``W e v'``."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._linear = torch.zeros(())

    def add(self, v: torch.Tensor, e: torch.Tensor, out_e: torch.Tensor, scale: float) -> None:
        self._rows.append(v * scale)
        self._linear = (out_e.transpose(1, 2) @ self._rows[-1]).add_(self._linear)

    def finish(self, weight: torch.Tensor, total: float) -> tuple[Gram, torch.Tensor]:
        return factored(torch.cat(self._rows, 1)), self._linear / total


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a' b`` for each group, ``[g, d, d]``; torch is slower on a batch of one."""
    return (a[0].T @ b[0])[None] if len(a) == 1 else a.transpose(1, 2) @ b


@contextmanager
def _short_products(allowed: bool) -> Iterator[None]:
    """Where ``allowed``, multiply in bfloat16 and add in float32, if the hardware is faster so.

    Exact for products of two 8-bit codes, which bfloat16 holds; of a product with
    ``e`` each term is within 2^-9 of its value, at random. GPUs take TF32, within 2^-11.
    """
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else usual)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


def _finish(
    weight: torch.Tensor,
    gram: Gram,
    linear: torch.Tensor,
    mean_v: torch.Tensor,
    mean_e: torch.Tensor,
    power: torch.Tensor,
    *,
    centred: bool,
) -> Moments:
    covariance = gram.centred(mean_v)
    out_e = (weight @ mean_e[..., None])[..., 0]
    linear_covariance = linear - out_e[:, :, None] * mean_v[:, None, :]
    variance = power - out_e.square()
    # the variance of W x = W v + W e
    signal = ((covariance.times(weight) + 2 * linear_covariance) * weight).sum(-1) + variance
    if centred:
        gram, linear, power = covariance, linear_covariance, variance
    return Moments(
        gram=gram,
        linear=linear,
        mean_v=mean_v,
        mean_e=mean_e,
        power=power.clamp_min(0.0),
        signal=signal.clamp_min(0.0),
    )
