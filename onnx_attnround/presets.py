"""Presets as data: the settings that a name asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "w8a8": {"weight_bits": 8, "act_bits": 8},
    "w4a8": {"weight_bits": 4, "act_bits": 8},
    "w4a16": {"weight_bits": 4, "act_bits": 16},
    "mixed4": {"mean_bits": 4, "act_bits": 8},
    "fast": {"weight_bits": 8, "act_bits": 8, "float_tensors": "never"},
    "small": {"weight_bits": 4, "first_last_bits": 4, "embedding_bits": 4, "act_bits": 8},
}
"""Settings by the name of what people ask for; any that is given itself goes before."""

Preset = Literal["w8a8", "w4a8", "w4a16", "mixed4", "fast", "small"]


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with what their ``preset`` says of all other keys; an unknown one is left."""
    preset = values.get("preset")
    return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}
