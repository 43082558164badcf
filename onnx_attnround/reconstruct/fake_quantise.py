"""Roundings that gradients pass: of codes, and of activations with a learned step."""

from __future__ import annotations

from typing import Any

import torch


class _Round(torch.autograd.Function):
    """Rounding whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, position: torch.Tensor) -> torch.Tensor:
        return position.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def rounded(position: torch.Tensor) -> torch.Tensor:
    """``position`` rounded to the nearest integer; the gradient passes straight through."""
    codes: torch.Tensor = _Round.apply(position)  # type: ignore[no-untyped-call]
    return codes


class _FakeQuantise(torch.autograd.Function):
    """``s clip(round(x/s), low, high)``, with the gradients of Esser et al.

    That is by ``x`` 1 inside the range and 0 outside, by ``s`` the code less ``x/s`` inside
    the range, the bound outside.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, step: torch.Tensor, low: float, high: float
    ) -> torch.Tensor:
        position = x / step
        codes = position.round().clamp_(low, high)
        ctx.save_for_backward(position, codes)
        ctx.range = low, high
        return codes * step

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        position, codes = ctx.saved_tensors
        low, high = ctx.range
        inside = (position >= low - 0.5) & (position <= high + 0.5)
        passed = gradient * inside
        by_step = (gradient * codes).sum() - (passed * position).sum()
        return passed, by_step, None, None


def fake_quantise(x: torch.Tensor, step: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``step * clip(round(x / step), low, high)``, differentiable by ``x`` and ``step``."""
    quantised: torch.Tensor = _FakeQuantise.apply(x, step, low, high)  # type: ignore[no-untyped-call]
    return quantised
