"""The user's choices, validated when they are made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from onnx_attnround.errors import ConfigError
from onnx_attnround.targets import Target, WeightStorage, get_target, read_toml

Bits = Annotated[int, Field(ge=2, le=8)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class QuantConfig(BaseModel):
    """What decides the bytes of the output, and how the run goes; the keys of a ``--config`` file.

    Build it with keywords (``pydantic.ValidationError`` on a mistake) or with
    :meth:`parse` (one-line ``ConfigError``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str | Target = "ort"
    weight_bits: Bits = 8
    act_bits: Literal[2, 3, 4, 5, 6, 7, 8, 16, 32] = 8
    mean_bits: Annotated[float, Field(ge=2, le=8)] | None = None
    bit_choices: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
    allocator: Literal["coding-length", "gram"] = "coding-length"
    first_last_bits: Bits = 8
    embedding_bits: Literal[4, 8, 32] = 8
    layer_bits: dict[str, Bits] = Field(default_factory=dict)
    method: Literal["attention", "adaround", "nearest"] = "attention"
    reconstruct: Literal["layer", "block"] = "layer"
    observer: Literal["minmax", "percentile", "entropy", "mse"] = "mse"
    samples: Annotated[int, Field(ge=1)] = 1024
    batch_size: Annotated[int, Field(ge=1)] = 32
    block_size: Literal[16, 32, 64, 128, 256] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=0)] = 50
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    weight_storage: WeightStorage | None = None
    custom_op_library: tuple[str, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    activation_memory_mb: Annotated[int, Field(ge=1)] = 256
    memory_limit: Annotated[int, Field(ge=1)] | None = None
    work_dir: Path | None = None
    min_sqnr: Finite | None = None
    max_drop: Finite | None = None

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str | Target) -> str | Target:
        """The name of a target, or the content of the file that describes one."""
        try:
            target = get_target(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value if value == target.name else target

    @field_serializer("target")
    def _plain_target(self, value: str | Target) -> str | dict[str, Any]:
        return value if isinstance(value, str) else value.plain()

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        """Bytes, from a number of them or a text such as 800MB or 4GB (decimal)."""
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", value.strip().upper())
        if found is None:
            raise ValueError("expected a size such as 800MB or 4GB")
        return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))

    @field_validator("bit_choices")
    @classmethod
    def _sorted_choices(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if not value:
            raise ValueError("bit_choices is empty: give at least one width from 2 to 8")
        mean = info.data.get("mean_bits")
        if mean is not None and mean < min(value):
            raise ValueError(f"no width is within mean_bits {mean:g}: give one, or raise mean_bits")
        return tuple(sorted(set(value)))

    def idle(self) -> list[str]:
        """A line for each setting that is not the default, yet has no effect beside the others."""
        budget = self.mean_bits is not None
        chosen = self.bit_choices if budget else (self.weight_bits,)
        idle = {
            "weight_bits": (budget, "mean_bits decides the bits"),
            "bit_choices": (not budget, "there is no mean_bits"),
            "allocator": (not budget, "there is no mean_bits"),
            "observer": (self.act_bits == 32, "activations stay float"),
            "activation_memory_mb": (self.device != "cpu", "a GPU keeps what it has room for"),
            "weight_storage": (
                min(*chosen, self.first_last_bits, *self.layer_bits.values(), 8) > 4,
                "no weights have up to 4 bits",
            ),
        }
        defaults = {key: QuantConfig.model_fields[key].default for key in idle}
        return [
            f"option '{key}' has no effect: {why}"
            for key, (is_idle, why) in idle.items()
            if is_idle and getattr(self, key) != defaults[key]
        ]

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Validate ``values``; raises ``ConfigError`` that names the first wrong key."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_first_line(error)) from error

    @classmethod
    def of(cls, given: QuantConfig | Mapping[str, Any] | None) -> QuantConfig:
        """A config as it is, one of the keys in a mapping, or the default; as :meth:`parse`."""
        if isinstance(given, QuantConfig):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(
                f"the config is of type {type(given).__name__}, expected a QuantConfig or a "
                "mapping of its keys"
            )
        return cls.parse(given or {})


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, not yet validated; raises ``ConfigError``."""
    return read_toml(path, "config")


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown option '{key}': expected one of {', '.join(QuantConfig.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    message = message.replace("a valid tuple", "a list")
    return f"option '{key}': {message}, got {first['input']!r}"
