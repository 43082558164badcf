"""Constants that stay in files, so that a model may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path

import onnx_ir as ir

from onnx_attnround.records import Array

SMALL = 1024
"""Constants of up to so many bytes go into no file of their own."""


class FileTensor(ir.ExternalTensor):
    """A constant in an external data file, mapped anew whenever its values are asked for.

    The pages leave the memory with the array that was given out. (The tensor of onnx-ir
    keeps what it mapped, so that in the end all weights are in memory; here a copy does.)
    """

    @classmethod
    def of(cls, tensor: ir.ExternalTensor, folder: Path, location: str = "") -> FileTensor:
        """``tensor`` with its file at ``location`` in ``folder``, by default where it says."""
        return cls(
            location or tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape.copy(),
            name=tensor.name or "",
            base_dir=folder,
        )

    def numpy(self) -> Array:
        """The values, a read-only view of the file."""
        values: Array = ir.ExternalTensor.numpy(copy(self))
        return values

    def tobytes(self) -> bytes:
        """The values as the file has them."""
        return ir.ExternalTensor.tobytes(copy(self))

    def __array__(self, dtype: object = None) -> Array:
        values: Array = ir.ExternalTensor.__array__(copy(self), dtype)
        return values


def constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """The initializers of all graphs, each with its tensor."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value


def held(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor with its values at hand, as protobuf wants them."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def in_files(model: ir.Model, folder: Path) -> tuple[ir.Model, Path]:
    """A copy whose constants lie in files, and the folder that their locations start from.

    What is in memory, but for ``SMALL`` constants, is written to a file in ``folder``.
    Other files stay where they are: the folder returned is the root of the file system.
    """
    result, root = model.clone(), Path(folder.resolve().anchor)
    loose = [
        (value, tensor)
        for value, tensor in constants(result)
        if not _is_below(tensor, root) and tensor.nbytes > SMALL
    ]
    written = ir.external_data.convert_tensors_to_external(
        [tensor for _, tensor in loose], folder, "constants.data"
    )
    for (value, _), stored in zip(loose, written, strict=True):
        value.const_value = stored
    for value, tensor in constants(result):
        if isinstance(tensor, ir.ExternalTensor):
            path = Path(tensor.path).resolve()
            value.const_value = FileTensor.of(tensor, root, path.relative_to(root).as_posix())
    return result, root


def _is_below(tensor: ir.TensorProtocol, root: Path) -> bool:
    """Whether the tensor lies in a file on the same drive."""
    return isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).resolve().anchor == str(root)
