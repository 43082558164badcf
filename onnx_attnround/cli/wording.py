"""Settings by the names that they have on the command line.

All other modules name a setting as Python and config files do, in backticks:
``give more `samples` ``. What the command line prints has the option in its place.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from onnx_attnround.config import QuantConfig

# What Python takes as an argument or has as a function, and the command line as an option.
_OTHERS = {
    "calibration": "--calib",
    "evaluation": "--eval",
    "preprocess": "--preprocess",
    "report": "--report",
    "make_plan": "the command plan",
}


def option(key: str) -> str:
    """The option for a key of the config."""
    return f"--{key.replace('_', '-')}"


def worded(text: str, keys: Collection[str] = ()) -> str:
    """``text`` with options in place of the settings, but for those of ``keys``, from a file."""

    def name(found: re.Match[str]) -> str:
        key = found[1]
        if key in keys:
            return found[0]
        return option(key) if key in QuantConfig.model_fields else _OTHERS.get(key, found[0])

    return re.sub(r"`(\w+)`", name, text)
