"""ONNX Runtime sessions: one place that opens them and words their errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.errors import ConfigError, ModelError
from onnx_attnround.graph import in_memory

_FATAL = 4  # errors come as exceptions, so the log need not tell them too
_UNKNOWN_OP = "is not a registered function/op"  # in the words of ONNX Runtime
ort.set_default_logger_severity(_FATAL)

_libraries: ContextVar[tuple[str, ...]] = ContextVar("_libraries", default=())


@contextmanager
def custom_ops(libraries: Sequence[str]) -> Iterator[None]:
    """Every session opened within knows the operators of these shared libraries.

    Raises ``ConfigError`` if ONNX Runtime cannot load one.
    """
    options = ort.SessionOptions()
    for library in libraries:
        try:
            options.register_custom_ops_library(library)
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise ConfigError(
                f"cannot load the custom operator library '{library}': {first_line(error)}; "
                "give a shared library built for this version of ONNX Runtime"
            ) from error
    token = _libraries.set(tuple(libraries))
    try:
        yield
    finally:
        _libraries.reset(token)


def open_session(
    model: ir.Model | Path,
    *,
    threads: int | None = None,
    optimised_model: Path | None = None,
    optimise: bool = True,
    signed_activations: bool = False,
) -> ort.InferenceSession:
    """A CPU session on ``model``; raises ``ModelError`` if ONNX Runtime refuses it.

    ``threads`` bounds the threads inside an op (default: all cores);
    ``optimised_model`` is where ONNX Runtime writes the graph that it runs, with
    ``optimise`` false as it is given. ``signed_activations`` are fused, as they
    are by default on ARM alone.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads or 0
    # Waiting threads that spin cost CPU time that other work on the machine could use.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for library in _libraries.get():
        options.register_custom_ops_library(library)
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if signed_activations:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    if optimised_model is not None:
        options.optimized_model_filepath = str(optimised_model)
    try:
        source = str(model) if isinstance(model, Path) else _serialised(model)
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # protobuf and ONNX Runtime raise a dozen unrelated types here
        why = first_line(error)
        remedy = "; name its library with --custom-op-library" if _UNKNOWN_OP in why else ""
        raise ModelError(f"ONNX Runtime cannot load the model: {why}{remedy}") from error


def _serialised(model: ir.Model) -> bytes:
    """The model with the values of its external data in place: no path is left to resolve."""
    data: bytes = ir.to_proto(in_memory(model)).SerializeToString()
    return data


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, without the places in ONNX Runtime's sources."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    text = re.sub(r"/onnxruntime_src/\S+:\d+ [^(\n]*(\([^()\n]*\)( const)? )?", "", text)
    return next((line.strip() for line in text.splitlines() if line.strip()), repr(error))
