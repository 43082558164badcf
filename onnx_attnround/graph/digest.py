"""A name for the content of a model, and of arrays: SHA-256, of any size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from onnx_attnround.graph.constants import constants
from onnx_attnround.records import Array


def model_digest(model: ir.Model) -> str:
    """Hex digits that stand for all that is in the model, wherever its constants lie."""
    return digest_of(_constants(model))


def digest_of(arrays: Iterable[tuple[str, Array]]) -> str:
    """Hex digits that stand for these named arrays, their types and shapes, in this order."""
    digest = hashlib.sha256()
    for name, values in arrays:
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        if values.dtype.hasobject:
            digest.update(repr(values.tolist()).encode())
        else:
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _constants(model: ir.Model) -> Iterator[tuple[str, Array]]:
    """The constants of the model one by one, so that any size fits; then what is around them."""
    shell = model.clone()
    for value, tensor in constants(shell):
        name = value.name or ""
        yield name, tensor.numpy()
        value.const_value = ir.tensor(np.zeros(0, np.uint8), name=name)
    around = ir.to_proto(shell).SerializeToString(deterministic=True)
    yield "", np.frombuffer(around, np.uint8)
