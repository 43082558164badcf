"""Post-training quantisation of ONNX models by Attention Round: ONNX in, standard QDQ out.

from onnx_attnround import QuantConfig, quantize

quantize("in.onnx", "samples.npz", QuantConfig(weight_bits=4), output="out.onnx")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import (
    AttnRoundError,
    CalibrationError,
    ConfigError,
    GateError,
    ModelError,
    OutputError,
)

if TYPE_CHECKING:
    from onnx_attnround.pipeline import QuantizeResult, check_model, make_plan, quantize
    from onnx_attnround.pipeline.trade_off import trade_off

# Else the official builds of ONNX Runtime from 1.29 on report on the models that they run.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "AttnRoundError",
    "CalibrationError",
    "ConfigError",
    "GateError",
    "ModelError",
    "OutputError",
    "QuantConfig",
    "QuantizeResult",
    "check_model",
    "make_plan",
    "quantize",
    "trade_off",
]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and with it torch and ONNX Runtime, when it is first asked for."""
    if name in ("QuantizeResult", "check_model", "make_plan", "quantize"):
        from onnx_attnround import pipeline

        return getattr(pipeline, name)
    if name == "trade_off":
        from onnx_attnround.pipeline.trade_off import trade_off

        return trade_off
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
