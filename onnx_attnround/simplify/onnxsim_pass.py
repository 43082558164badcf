"""onnxsim, kept quiet and on a short lead."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx
import onnx_ir as ir

from onnx_attnround import graph

LARGE = 1 << 20
"""Bytes of a constant above which onnxsim sees it only if it could fold what reads it."""

_UNWANTED = (
    "fuse_bn_into_conv",  # fold_batch_norm covers more layers
    "fuse_matmul_add_bias_into_gemm",  # fold_matmul_bias keeps the name of the layer
    "fuse_matmul_add_bias_into_gemm_batched",  # MatMul runs in integer without Reshapes around it
    "fuse_transpose_into_gemm",  # makes Gemms that read their input transposed
    "fuse_qkv",  # joins layers that may want different bits
    "fuse_attention",  # hides layers in an operator of ONNX Runtime
    "fuse_gqa",  # the same
    "eliminate_duplicate_initializer",  # ties layers that have, say, a bias of zeros
    "eliminate_loop_with_const_trip_count",  # unrolls, however long the loop
)


def run_onnxsim(model: ir.Model) -> tuple[ir.Model, str]:
    """The model that onnxsim makes of it, or the model itself; and a line on what happened."""
    try:
        result = graph.through_proto(model, _simplified, _withheld(model))
        _check_opsets(model, result)
        graph.copy_signature(model, result)
    except Exception as error:  # whatever happens in there: the model is good without it
        return model, f"onnxsim: failed ({graph.reason(error)})"
    result.metadata_props.clear()  # onnxsim writes a diary there
    result.metadata_props.update(model.metadata_props)
    before, after = (sum(1 for _ in each.graph.all_nodes()) for each in (model, result))
    return result, f"onnxsim: {before} to {after} nodes" if before != after else ""


def _withheld(model: ir.Model) -> set[str]:
    """The large constants that onnxsim need not see: whoever reads them reads no constants alone.

    All large ones, where what is left would not fit into one message.
    """
    large = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > LARGE
    }
    idle = {name for name, value in large.items() if not any(map(_is_constant, value.consumers()))}
    return idle if graph.fits_inline(model, without=idle) else set(large)


def _is_constant(node: ir.Node) -> bool:
    """Whether a node could be folded."""
    return all(value is None or value.is_initializer() for value in node.inputs)


def _simplified(proto: onnx.ModelProto) -> Any:
    with _silence():
        result, valid = _import_onnxsim().simplify(proto, skipped_optimizers=list(_UNWANTED))
    if not valid:
        raise ValueError("the result does not pass its check")
    return result


def _check_opsets(old: ir.Model, new: ir.Model) -> None:
    if not new.opset_imports.items() <= old.opset_imports.items():
        raise ValueError(f"the result needs {new.opset_imports}, got {old.opset_imports}")


def _import_onnxsim() -> Any:
    """onnxsim, imported as if PyTorch were missing: its bridges to it cost a second."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # lets ``import torch`` fail
    try:
        return importlib.import_module("onnxsim")
    finally:
        if hide:
            del sys.modules["torch"]


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches the terminal, not even from C++, which writes to the descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
            yield
    finally:
        for descriptor, copy in enumerate(saved, start=1):
            os.dup2(copy, descriptor)
            os.close(copy)
