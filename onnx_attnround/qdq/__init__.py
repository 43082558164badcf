"""Quantised models as nodes: Q and DQ around what runs in integer, and the arithmetic of both."""

from __future__ import annotations

from onnx_attnround.qdq.folded import fold_weights
from onnx_attnround.qdq.sharing import store_once
from onnx_attnround.qdq.storage import stored_bits
from onnx_attnround.qdq.writer import (
    bias_scale,
    insert,
    update_layer,
    update_scale,
)

__all__ = [
    "bias_scale",
    "fold_weights",
    "insert",
    "store_once",
    "stored_bits",
    "update_layer",
    "update_scale",
]
