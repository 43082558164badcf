"""What every op function needs: its type, its optional inputs, dtypes.

An op function takes ``(attributes, inputs, opset)`` and returns one tensor, or
a tuple in the order of the node's outputs. ``attributes`` are plain Python
values (tensors as torch tensors) and always hold ``num_outputs``. Inputs that
ONNX calls optional are read with ``optional()``, the others by index. What a
function cannot compute exactly as ONNX defines it, it refuses with a
``ModelError`` that gives the reason; the caller adds the node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_attnround.errors import ModelError

Attributes: TypeAlias = Mapping[str, Any]
Inputs: TypeAlias = Sequence[Tensor]
Result: TypeAlias = Tensor | tuple[Tensor, ...]
Op: TypeAlias = Callable[[Attributes, Inputs, int], Result]

TORCH_DTYPES: dict[int, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
}


def torch_dtype(onnx_type: int) -> torch.dtype:
    """The torch dtype of an ONNX element type; raises ``ModelError`` if there is none."""
    if onnx_type not in TORCH_DTYPES:
        name = ir.DataType(onnx_type).name
        known = ", ".join(ir.DataType(key).name for key in TORCH_DTYPES)
        raise ModelError(f"element type {name}: expected one of {known}")
    return TORCH_DTYPES[onnx_type]


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """A copy of an ONNX tensor on the CPU; raises ``ModelError`` on a dtype torch lacks."""
    dtype = torch_dtype(tensor.dtype)
    array = np.array(tensor.numpy())
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(dtype)
    return torch.from_numpy(array)


def optional(inputs: Inputs, index: int) -> Tensor | None:
    """Input ``index``, or ``None`` where it is absent."""
    return inputs[index] if index < len(inputs) else None


def ints(tensor: Tensor) -> list[int]:
    """The elements of an integer tensor."""
    return [int(value) for value in tensor.reshape(-1).cpu().tolist()]


def list_of(attributes: Attributes, inputs: Inputs, name: str, index: int) -> list[int] | None:
    """Integers that were an attribute in old opsets and are input ``index`` in new ones."""
    if name in attributes:
        return list(attributes[name])
    values = optional(inputs, index)
    return None if values is None else ints(values)


def pad_spatial(x: Tensor, pads: Sequence[int], value: float = 0) -> Tensor:
    """``x`` with ONNX ``pads`` (begins, then ends) on its last axes; a negative pad crops."""
    rank = len(pads) // 2
    order = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[axis + rank])]
    return F.pad(x, order, value=value) if any(order) else x
