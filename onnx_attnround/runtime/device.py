"""Where layers are rounded: PyTorch's device, and ONNX Runtime on the same memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx_ir import tensor_adapters
from torch.utils.dlpack import from_dlpack

from onnx_attnround.errors import ConfigError
from onnx_attnround.records import Array

_FOREIGN = re.compile(r"string|^(seq|map|optional|sparse)")
"""ONNX Runtime's names of types that PyTorch does not have."""

CPU = torch.device("cpu")
Value = torch.Tensor | Array
"""A tensor on the device; an array where torch has no such element type, as for text."""


def open_device(name: str) -> torch.device:
    """The device ``cpu`` or ``cuda``.

    Raises ``ConfigError`` if PyTorch or ONNX Runtime cannot use it.
    """
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        why = "sees no GPU" if torch.version.cuda else "is built for the CPU alone"
        raise ConfigError(
            f"option `device`: got cuda, and PyTorch {torch.__version__} {why}; install PyTorch "
            "for CUDA and the driver of the GPU, or take `device` cpu"
        )
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ConfigError(
            f"option `device`: got cuda, and ONNX Runtime {ort.__version__} is built without it; "
            "install onnxruntime-gpu, or take `device` cpu"
        )
    return torch.device(name, 0)


def room_on(device: torch.device, budget: int) -> int:
    """Bytes of activations to keep on ``device``: ``budget``, or a quarter of a GPU's free memory.

    ONNX Runtime needs as much again for the sessions that the activations come from.
    """
    if device.type != "cuda":
        return budget
    release(device)
    return torch.cuda.mem_get_info(device)[0] // 4


def release(device: torch.device) -> None:
    """Let ONNX Runtime have the memory of ``device`` that PyTorch holds and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def placed(values: Array, device: torch.device) -> Value:
    """The array as a tensor on ``device``, on the CPU without a copy if it may be written to."""
    writable = np.require(values, requirements=("C", "W"))
    try:
        return torch.from_numpy(writable).to(device)
    except TypeError:  # torch has no such type
        return writable


def fetched(value: Value) -> Array:
    """The value as an array, in the memory of the CPU."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def exact(device: torch.device) -> AbstractContextManager[None]:
    """Convolutions of PyTorch in float32 and in one order, on a GPU as on a CPU."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def run_on(
    device: torch.device,
    session: ort.InferenceSession,
    names: Sequence[str],
    feeds: Mapping[str, Value],
) -> list[Value]:
    """The outputs ``names`` of ``session``, which stay on ``device``, where it made them.

    Nothing is copied, unless PyTorch has no type for one of the values.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # ONNX Runtime has a stream of its own
    tensors = {name: v.contiguous() for name, v in feeds.items() if isinstance(v, torch.Tensor)}
    kinds = [value.type for value in session.get_outputs()]
    if len(tensors) < len(feeds) or any(_FOREIGN.search(kind) for kind in kinds):
        arrays = {name: fetched(value) for name, value in feeds.items()}
        return [placed(values, device) for values in session.run(list(names), arrays)]
    binding = session.io_binding()
    for name, value in tensors.items():
        kind = tensor_adapters.from_torch_dtype(value.dtype).value
        place = value.device.type, value.device.index or 0
        binding.bind_input(name, *place, kind, tuple(value.shape), value.data_ptr())
    for name in names:
        binding.bind_output(name, device.type, device.index or 0)
    session.run_with_iobinding(binding)
    made = binding.get_outputs_as_ortvaluevector()
    return [_tensor(made[index]) for index in range(len(names))]


def _tensor(value: Any) -> torch.Tensor:
    """The memory of an OrtValue, which lives as long as the tensor."""
    tensor: torch.Tensor = from_dlpack(value)
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor
