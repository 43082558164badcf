"""ONNX Runtime sessions: one place that opens them and words their errors."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from onnx_attnround.errors import ModelError
from onnx_attnround.graph import in_memory

ort.set_default_logger_severity(3)


def open_session(
    model: ir.Model | Path,
    *,
    threads: int | None = None,
    optimised_model: Path | None = None,
) -> ort.InferenceSession:
    """A CPU session on ``model``; raises ``ModelError`` if ONNX Runtime refuses it.

    ``threads`` bounds the threads inside an op (default: all cores);
    ``optimised_model`` is where ONNX Runtime writes the graph that it runs.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    # Waiting threads that spin cost CPU time that other work on the machine could use.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimised_model is not None:
        options.optimized_model_filepath = str(optimised_model)
    try:
        source = str(model) if isinstance(model, Path) else _serialised(model)
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # protobuf and ONNX Runtime raise a dozen unrelated types here
        raise ModelError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error


def _serialised(model: ir.Model) -> bytes:
    """The model with the values of its external data in place: no path is left to resolve."""
    data: bytes = ir.to_proto(in_memory(model)).SerializeToString()
    return data


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
