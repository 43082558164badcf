"""The float model, in any form in which it comes."""

from __future__ import annotations

import sys
from os import PathLike
from pathlib import Path

import onnx
import onnx_ir as ir

from onnx_attnround import graph
from onnx_attnround.errors import ModelError

ModelSource = Path | str | bytes | onnx.ModelProto | ir.Model
"""A path, the bytes of a file, or a model in memory."""


def open_model(model: ModelSource) -> ir.Model:
    """The checked model; one of ``onnx_ir`` is taken as it is. Raises ``ModelError``."""
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, bytes | bytearray | memoryview):
        return graph.from_proto(bytes(model))
    if isinstance(model, onnx.ModelProto):
        return graph.from_proto(model)
    if not isinstance(model, str | PathLike):
        raise ModelError(_wrong_type(model))
    return graph.load(Path(model))


def source_of(model: ModelSource) -> Path | None:
    """The file of the model; ``None`` for one in memory, and for what is none."""
    return Path(model) if isinstance(model, str | PathLike) else None


def _wrong_type(model: object) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return (
            "the model is a torch.nn.Module, which ONNX must be made of first; give "
            "onnx_attnround.from_torch(model, example_inputs)"
        )
    return (
        f"the model is of type {type(model).__name__}, expected a path, bytes, an "
        "onnx.ModelProto or an onnx_ir.Model; onnx_attnround.from_torch makes one of a module"
    )
