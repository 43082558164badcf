"""A module of PyTorch as an ONNX model, by PyTorch's own exporters."""

from __future__ import annotations

import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch

from onnx_attnround import graph
from onnx_attnround.errors import ModelError

Given = tuple[tuple[Any, ...], dict[str, Any]]  # positional inputs, inputs by name


def from_torch(
    module: torch.nn.Module,
    example_inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    dynamic_batch: bool = True,
) -> ir.Model:
    """The ONNX model of ``module`` in evaluation mode, for ``quantize`` and its like.

    ``example_inputs`` are what its ``forward`` takes: a tensor, several in their order, or
    by name; their values do not matter. With ``dynamic_batch`` axis 0 of every tensor may
    have any size in the model, as far as the module's code allows that. It is exported by
    ``torch.export`` where the package onnxscript is installed, else by TorchScript.

    Raises ``ModelError`` if PyTorch cannot export it, with the exporter that was tried.
    """
    args, kwargs = _given(example_inputs)
    dynamo = importlib.util.find_spec("onnxscript") is not None
    export = _exported if dynamo else _traced
    try:
        with _evaluating(module), _quiet():
            data = export(module, (args, kwargs), dynamic_batch=dynamic_batch)
    except Exception as error:  # exporters raise what the code of the module does, and their own
        raise ModelError(_failed(module, error, dynamo=dynamo)) from error
    return graph.from_proto(data)


def _failed(module: torch.nn.Module, error: Exception, *, dynamo: bool) -> str:
    reason = graph.reason(error)
    remedy = "export it with torch.onnx.export and give the file"
    if dynamo:
        return f"torch.export cannot export {type(module).__name__}: {reason}; {remedy}"
    return (
        f"TorchScript cannot export {type(module).__name__}: {reason}; install onnxscript (pip "
        f"install onnxscript) for the newer exporter, or {remedy}"
    )


def _given(example_inputs: object) -> Given:
    """The inputs, each of its own: of one tensor given twice ``torch.export`` makes one input."""
    if isinstance(example_inputs, Mapping):
        return (), {name: _own(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, torch.Tensor):
        return (_own(example_inputs),), {}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(map(_own, example_inputs)), {}
    raise ModelError(
        f"the example inputs are of type {type(example_inputs).__name__}, expected a tensor, a "
        "tuple of tensors, or a mapping of names to tensors"
    )


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _exported(module: torch.nn.Module, given: Given, *, dynamic_batch: bool) -> bytes:
    args, kwargs = given
    program = torch.onnx.export(
        module,
        args,
        kwargs=kwargs,
        dynamo=True,
        verbose=False,
        dynamic_shapes=_dynamic(args, kwargs) if dynamic_batch else None,
    )
    if program is None:
        raise RuntimeError("nothing was exported")
    data: bytes = program.model_proto.SerializeToString()
    return data


def _dynamic(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Axis 0 of every tensor as one that ``torch.export`` keeps dynamic where it can."""

    def axes(value: object) -> dict[int, Any] | None:
        free = isinstance(value, torch.Tensor) and value.dim() > 0
        return {0: torch.export.Dim.AUTO} if free else None

    return {name: axes(value) for name, value in kwargs.items()} or tuple(map(axes, args))


def _traced(module: torch.nn.Module, given: Given, *, dynamic_batch: bool) -> bytes:
    args, kwargs = given
    names = list(kwargs) or list(inspect.signature(module.forward).parameters)[: len(args)]
    file = io.BytesIO()
    torch.onnx.export(
        module,
        args,
        file,  # type: ignore[arg-type]  # which its documentation allows
        kwargs=kwargs,
        dynamo=False,
        input_names=names,
        dynamic_axes={name: {0: "batch"} for name in names} if dynamic_batch else None,
    )
    return file.getvalue()


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The module, and each within, in evaluation mode while this is open."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, training in modes.items():
            each.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of libraries that are not there and of their own age."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
