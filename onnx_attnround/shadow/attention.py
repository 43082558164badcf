"""Scaled dot-product attention and rotary embeddings, without caches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onnx_attnround.errors import ModelError
from onnx_attnround.shadow.common import Attributes, Inputs, Op, optional


def _heads(x: Tensor, count: int | None) -> Tensor:
    """``[n, length, heads * size]`` as ``[n, heads, length, size]``; rank 4 is that already."""
    if x.ndim == 4:
        return x
    if count is None:
        raise ModelError("input of rank 3 without a number of heads: expected q/kv_num_heads")
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _check(a: Attributes, x: Inputs) -> None:
    if any(value is not None for value in x[4:]) or a["num_outputs"] > 1:
        raise ModelError("caches or extra outputs: expected Q, K, V, a mask and one output")
    windows = a.get("left_window_size", -1), a.get("right_window_size", -1)
    if windows != (-1, -1) or a.get("softmax_precision") not in (None, 1):
        raise ModelError("sliding window or softmax_precision: expected full float32 attention")


def _masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is None:
        return scores
    if mask.shape[-1] != scores.shape[-1]:
        raise ModelError(f"mask of {mask.shape[-1]} keys: expected {scores.shape[-1]}")
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _attention(a: Attributes, x: Inputs, opset: int) -> Tensor:
    _check(a, x)
    query = _heads(x[0], a.get("q_num_heads"))
    key, value = (_heads(t, a.get("kv_num_heads")) for t in x[1:3])
    shared = query.shape[1] // key.shape[1]  # query heads that share one key head
    key, value = (t.repeat_interleave(shared, 1) for t in (key, value))
    root = math.sqrt(a.get("scale", 1 / math.sqrt(query.shape[-1])))
    scores = (query * root) @ (key * root).transpose(-1, -2)
    cap = a.get("softcap", 0.0)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = _masked(scores, optional(x, 3), bool(a.get("is_causal", 0)))
    # A query that may attend to nothing gives zero, not NaN.
    weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0, scores.softmax(-1))
    y = weights @ value
    return y if x[0].ndim == 4 else y.transpose(1, 2).flatten(2)


def _rotary(a: Attributes, x: Inputs, opset: int) -> Tensor:
    data, cos, sin, positions = _heads(x[0], a.get("num_heads")), x[1], x[2], optional(x, 3)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos[:, None], sin[:, None]
    width = a.get("rotary_embedding_dim", 0) or data.shape[-1]
    turned, kept = data[..., :width], data[..., width:]
    if a.get("interleaved", 0):
        left, right = turned[..., 0::2], turned[..., 1::2]
    else:
        left, right = turned.chunk(2, -1)
    pair = cos * left - sin * right, sin * left + cos * right
    turned = torch.stack(pair, -1).flatten(-2) if a.get("interleaved", 0) else torch.cat(pair, -1)
    y = torch.cat([turned, kept], -1)
    return y if x[0].ndim == 4 else y.transpose(1, 2).flatten(2)


OPS: dict[str, Op] = {"Attention": _attention, "RotaryEmbedding": _rotary}
