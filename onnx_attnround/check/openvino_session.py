"""OpenVINO, where it is installed: compile a model for the CPU, run it, read its kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_attnround.errors import ModelError
from onnx_attnround.graph import serialised
from onnx_attnround.records import Array
from onnx_attnround.runtime.session import first_line

_KERNELS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INTEGER = ("i8", "u8")
_FOUR_BITS = ("i4", "u4")
"""The types of weights under float inputs that a kernel unpacks."""


def available() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def version() -> str:
    """The release, without the build."""
    import openvino

    return str(openvino.__version__).split("-", 1)[0]


def compile_model(model: ir.Model, threads: int | None = None) -> Any:
    """The model on the CPU plugin, float layers in float32; raises ``ModelError`` if refused."""
    import openvino

    data = b"".join(serialised(model))
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        return core.compile_model(core.read_model(data), "CPU", options)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"OpenVINO cannot load the model: {lines[-1]}") from error


def run(compiled: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name; raises ``ModelError`` if the run fails."""
    try:
        # Copies: memory that cannot be written to is not taken for scalars.
        results = compiled({name: np.array(values) for name, values in feed.items()})
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot run the model: {first_line(error)}") from error
    return {port.get_any_name(): values for port, values in results.items()}


def integer_kernels(compiled: Any, *, bits: int = 8) -> list[tuple[str, frozenset[str]]]:
    """The weighted kernels that read integers of 8 bits, or also of 4; what went into each."""
    precisions = _INTEGER if bits == 8 else _INTEGER + _FOUR_BITS
    origins = []
    for kernel in compiled.get_runtime_model().get_ops():
        info = kernel.get_rt_info()
        told = {key: info[key].astype(str) for key in ("layerType", "runtimePrecision")}
        if told["layerType"] in _KERNELS and told["runtimePrecision"] in precisions:
            names = frozenset(info["originalLayersNames"].astype(str).split(","))
            origins.append((told["layerType"], names))
    return origins
