"""Post-training quantisation of ONNX models by Attention Round: ONNX in, standard QDQ out.

from onnx_attnround import quantize

result = quantize("in.onnx", "samples.npz", weight_bits=4)
result.save("out.onnx")

What this module exports is public. All other modules are how it is done, and may change.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
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
from onnx_attnround.targets import TARGETS, Target
from onnx_attnround.version import version

if TYPE_CHECKING:
    from onnx_attnround.pipeline import check_model, make_plan, quantize
    from onnx_attnround.pipeline.from_torch import from_torch
    from onnx_attnround.pipeline.trade_off import trade_off
    from onnx_attnround.pipeline.two_models import compare
    from onnx_attnround.records import Event
    from onnx_attnround.report.result import QuantizeResult
    from onnx_attnround.samples.preprocess import Preprocess

    __version__: str

# What goes on is logged for those who ask; without a handler of theirs nothing shows.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Else the official builds of ONNX Runtime from 1.29 on report on the models that they run.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "TARGETS",
    "AttnRoundError",
    "CalibrationError",
    "ConfigError",
    "Event",
    "GateError",
    "ModelError",
    "OutputError",
    "Preprocess",
    "QuantConfig",
    "QuantizeResult",
    "Target",
    "__version__",
    "check_model",
    "compare",
    "from_torch",
    "make_plan",
    "quantize",
    "trade_off",
]

# Where the names are that bring torch, ONNX Runtime or numpy: imported when they are asked for.
_LATE = {
    "Event": "records",
    "Preprocess": "samples.preprocess",
    "QuantizeResult": "report.result",
    "check_model": "pipeline",
    "compare": "pipeline.two_models",
    "from_torch": "pipeline.from_torch",
    "make_plan": "pipeline",
    "quantize": "pipeline",
    "trade_off": "pipeline.trade_off",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
