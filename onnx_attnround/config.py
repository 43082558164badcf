"""The user's choices, validated when they are made, and what each of them means.

A key is described here alone: the options of the command line with their help, the
JSON schema and ``docs/config.md`` follow from the fields of :class:`QuantConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from onnx_attnround.errors import ConfigError
from onnx_attnround.goals import FORMS, Goal
from onnx_attnround.presets import Preset, expanded
from onnx_attnround.settings import Finite, Settings, read_toml
from onnx_attnround.targets import TARGETS, BlockSize, Target, WeightStorage, get_target

Bits = Annotated[int, Field(ge=2, le=8)]
ActBits = Literal[2, 3, 4, 5, 6, 7, 8, 16, 32]

def _whole(value: object) -> object:
    """A number that came as text, as from the command line, where only some are allowed."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


_WHOLE = BeforeValidator(_whole)

_DECIDING = ("mean_bits", "size", "until")

SECTIONS = ("Samples", "Bits", "Method and target", "Run and result")
_SAMPLES, _BITS, _METHOD, _RUN = SECTIONS


def _key(section: str, default: Any, description: str) -> Any:
    """A key of the config; a factory of its default takes the place of a mutable one."""
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**given, description=description, json_schema_extra={"section": section})


class QuantConfig(Settings):
    """What decides the bytes of the output, and how the run goes; the keys of a config file.

    Build it with keywords, or with :meth:`parse` from a mapping. A mistake raises a
    ``ConfigError`` of one line.
    """

    target: str | Target = _key(
        _METHOD,
        "ort",
        f"The runtime to write for: {', '.join(TARGETS)}, or a TOML file that describes one",
    )
    preset: Preset | None = _key(
        _BITS,
        None,
        "Bits by one name: w8a8, w4a8, w4a16 (weights, activations), mixed4 (`mean_bits` 4), fast "
        "(8 bits, the first layers too), small (4 bits, the first and last layers and embeddings "
        "too); other settings win",
    )
    weight_bits: Bits = _key(_BITS, 8, "Bits of the weights, 2 to 8")
    act_bits: Annotated[ActBits, _WHOLE] = _key(
        _BITS, 8, "Bits of the activations, 32 leaves them in float"
    )
    mean_bits: Annotated[float, Field(ge=2, le=8)] | None = _key(
        _BITS,
        None,
        "Mixed precision: mean bits per weight, each layer's chosen among `bit_choices`. "
        "Several, as in 3,4,6: a file for each, the output's name with .w3 and so on, and what "
        "they cost",
    )
    bit_choices: tuple[Bits, ...] = _key(
        _BITS, (2, 3, 4, 5, 6, 8), "Bits that `mean_bits` chooses among"
    )
    allocator: Literal["coding-length", "gram"] = _key(
        _BITS,
        "coding-length",
        "What `mean_bits` goes by: coding-length of the weights, or gram, errors measured on the "
        "calibration samples",
    )
    first_last_bits: Bits = _key(
        _BITS, 8, "Bits of the first and the last layers, at least `weight_bits` without "
        "`mean_bits`; with samples, of as many weights in the layers whose rounding is measured to "
        "cost most",
    )  # fmt: skip
    embedding_bits: Annotated[Literal[4, 8, 32], _WHOLE] = _key(
        _BITS,
        8,
        "Bits of tables that are looked up, such as embeddings: 8, with a scale for each row; 4, "
        "with one for each 32 entries; 32 leaves them float",
    )
    stored_bits: Annotated[Literal[8, 32], _WHOLE] = _key(
        _BITS,
        8,
        "Bits in the file of weights that are read as floats: of LSTM, GRU and RNN, and of layers "
        "in the bodies of If, Loop and Scan; 8, with a scale for each output, or 32",
    )
    layer_bits: dict[str, Bits] = _key(
        _BITS, dict, "Bits of single layers, by the name of the node or a glob of names"
    )
    activation_bits: dict[str, Annotated[ActBits, _WHOLE]] = _key(
        _BITS,
        dict,
        "Bits of single activations, by the name of the tensor or a glob of names; 32 leaves them "
        "float",
    )
    activations: Literal["static", "dynamic", "auto"] = _key(
        _METHOD,
        "static",
        "Where the ranges of activations come from: static, the calibration samples; dynamic, each "
        "run, for what MatMul alone reads; auto, each run where layers and outputs gain by it. "
        "With dynamic ranges a sample's result depends on its batch",
    )
    float_tensors: Literal["auto", "never"] = _key(
        _BITS,
        "auto",
        "Whether activations stay float that, rounded, cause much of the error at the outputs, and "
        "cost little time in float",
    )
    method: Literal["attention", "adaround", "nearest"] = _key(
        _METHOD, "attention", "How weights are rounded"
    )
    reconstruct: Literal["layer", "block"] = _key(
        _METHOD,
        "layer",
        "What is matched to the float model: each layer, or then each block of layers too, with "
        "activations quantised in the loop, which takes some five times as long",
    )
    smooth: Literal["auto", "never"] = _key(
        _METHOD,
        "auto",
        "Whether range moves from activations to weights, channel by channel, where that pays",
    )
    observer: Literal["minmax", "percentile", "entropy", "mse"] = _key(
        _METHOD,
        "mse",
        "How activation ranges are found: the extrema, or what another criterion leaves of them, "
        "widened where the model's outputs ask for it",
    )
    samples: Annotated[int, Field(ge=1)] = _key(_SAMPLES, 1024, "Calibration samples used at most")
    holdout: Annotated[float, Field(ge=0, lt=1)] | None = _key(
        _SAMPLES,
        None,
        "Share of the calibration samples that nothing is fitted to and figures are measured on, "
        "where there are none to verify on; 0 for none. By default a fifth, 32 to 256, if that is "
        "at most a third",
    )
    batch_size: Annotated[int, Field(ge=1)] = _key(_SAMPLES, 32, "Samples run at a time")
    block_size: Annotated[BlockSize | None, _WHOLE] = _key(
        _BITS,
        None,
        "Weights only (`act_bits` 32): Gemm and MatMul get a scale for each run of so many "
        "inputs, not one per channel",
    )
    seed: Annotated[int, Field(ge=0)] = _key(_RUN, 0, "Seed of all randomness")
    steps: Annotated[int, Field(ge=0)] = _key(
        _METHOD, 50, "Steps of the descent that learns how a layer is rounded"
    )
    include: tuple[str, ...] = _key(_METHOD, (), "Only layers of these names, or globs of names")
    exclude: tuple[str, ...] = _key(
        _METHOD,
        (),
        "Nodes to keep in float, by name or glob: the weights of layers, what others compute",
    )
    weight_storage: WeightStorage | None = _key(
        _METHOD,
        None,
        "How weights of up to 4 bits are stored, by default as the target wants",
    )
    weight_range: Literal["safe", "full"] = _key(
        _METHOD,
        "safe",
        "The codes of 8-bit weights: safe, those whose sums are exact on x86-64 CPUs without VNNI "
        "too, -64 to 64 under 8-bit activations where the target may run on such; full, all",
    )
    custom_op_library: tuple[str, ...] = _key(
        _RUN, (), "Shared libraries with operators that the model uses"
    )
    device: Literal["cpu", "cuda"] = _key(
        _RUN, "cpu", "Where layers are rounded: the CPU, or an NVIDIA GPU"
    )
    threads: Annotated[int, Field(ge=1)] | None = _key(
        _RUN, None, "CPU threads, by default one for each core"
    )
    activation_memory_mb: Annotated[int, Field(ge=1)] = _key(
        _RUN, 256, "Megabytes of activations kept in memory on the CPU; what is more waits on disk"
    )
    memory_limit: Annotated[int, Field(ge=1)] | None = _key(
        _RUN,
        None,
        "Memory of the process, in bytes or such as 4GB: fewer samples at a time, more on disk",
    )
    work_dir: Path | None = _key(
        _RUN,
        None,
        "Keep what is finished in this folder until the output is written: the same command then "
        "goes on where it was cut off, to the same bytes. Runs may share it",
    )
    keep_integer: bool = _key(
        _METHOD,
        False,
        "Keep activations quantised where ONNX Runtime runs the file slower than the float model",
    )
    speed_batch: Annotated[int, Field(ge=1)] = _key(
        _RUN,
        16,
        "Samples in a run that is timed against the float model's, beside single ones",
    )
    min_sqnr: Finite | None = _key(_RUN, None, "Gate: least SQNR of any output, in dB")
    max_drop: Finite | None = _key(
        _RUN,
        None,
        "Gate: most points of top-1 lost; without labels, points of disagreement with float",
    )

    until: str | None = _key(
        _RUN,
        None,
        f"Find the best file that reaches a goal on samples that nothing was fitted to: {FORMS}. "
        "The function takes outputs by name and labels, higher is better; without a bound, it may "
        "lose a hundredth. Where no file reaches the goal, the nearest is written",
    )
    prefer: Literal["size", "speed"] = _key(
        _RUN,
        "size",
        "Of the files that reach `until`, the smallest or the fastest",
    )
    size: Annotated[int, Field(ge=1)] | None = _key(
        _BITS,
        None,
        "The most that the file may take, in bytes or such as 220kB: bits of each layer among "
        "`bit_choices` as they are stored, by measured errors",
    )
    strict: bool = _key(
        _RUN,
        False,
        "Gate: no output may collapse, by an SQNR of less than 10 dB in all or in a part, by an "
        "extreme that is cut off, or by a lost correlation with the float model",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        return expanded(values) if isinstance(values, dict) else values

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str | Target) -> str | Target:
        """The name of a target, or the content of the file that describes one."""
        try:
            target = get_target(value)
        except ConfigError as error:  # which pydantic would let pass, without the name of the key
            raise ValueError(str(error)) from error
        return value if value == target.name else target

    @field_serializer("target")
    def _plain_target(self, value: str | Target) -> str | dict[str, Any]:
        return value if isinstance(value, str) else value.plain()

    @field_validator("until")
    @classmethod
    def _known_goal(cls, value: str | None) -> str | None:
        """A goal as it is written, so that a file and the command line have one form."""
        try:
            return None if value is None else str(Goal.parse(value))
        except ConfigError as error:  # as above
            raise ValueError(str(error)) from error

    @field_validator("memory_limit", "size", mode="before")
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
            raise ValueError("it is empty: give at least one width from 2 to 8")
        mean = info.data.get("mean_bits")
        if mean is not None and mean < min(value):
            raise ValueError(f"no width is within `mean_bits` {mean:g}: give one, or raise it")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _one_decides(self) -> QuantConfig:
        """The bits of the layers follow from one setting at most."""
        if len(given := [key for key in _DECIDING if getattr(self, key) is not None]) > 1:
            first, second = given[:2]
            raise ValueError(f"`{first}` and `{second}` each decide the bits: give one of them")
        return self

    @property
    def _decides(self) -> str:
        return next((key for key in _DECIDING if getattr(self, key) is not None), "weight_bits")

    @property
    def budgeted(self) -> bool:
        """Whether the bits of a layer are chosen among ``bit_choices``."""
        return self._decides != "weight_bits"

    def idle(self) -> list[str]:
        """A line for each setting that is not the default, yet has no effect beside the others."""
        budget = self.budgeted
        chosen = self.bit_choices if budget else (self.weight_bits,)
        idle = {
            "weight_bits": (budget, f"`{self._decides}` decides the bits"),
            "bit_choices": (not budget, "there is no `mean_bits`"),
            "allocator": (self.mean_bits is None, "there is no `mean_bits`"),
            "prefer": (self.until is None, "there is no `until`"),
            "observer": (self.act_bits == 32, "activations stay float"),
            "activations": (self.act_bits == 32, "activations stay float"),
            "activation_bits": (
                self.act_bits == 32 and bool(self.activation_bits),
                "activations stay float",
            ),
            "activation_memory_mb": (self.device != "cpu", "a GPU keeps what it has room for"),
            "weight_storage": (
                min(*chosen, self.first_last_bits, *self.layer_bits.values(), 8) > 4,
                "no weights have up to 4 bits",
            ),
            "weight_range": (
                not get_target(self.target).int16_pairs or self.act_bits > 8,
                "no pairs of products are added in 16 bits",
            ),
        }
        defaults = {key: QuantConfig.model_fields[key].default for key in idle}
        return [
            f"option `{key}` has no effect: {why}"
            for key, (is_idle, why) in idle.items()
            if is_idle and getattr(self, key) != defaults[key]
        ]

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """The settings that are not the default."""
        for key, value in self:
            if value != type(self).model_fields[key].get_default(call_default_factory=True):
                yield key, value

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The config with these keys; raises ``ConfigError`` that names the first wrong one."""
        return cls(**{str(key): value for key, value in values.items()})

    @classmethod
    def of(cls, given: QuantConfig | Mapping[str, Any] | None, **settings: Any) -> QuantConfig:
        """A config, one of the keys in a mapping, or the default; ``settings`` override its keys.

        Raises as :meth:`parse`.
        """
        if given is not None and not isinstance(given, QuantConfig | Mapping):
            raise ConfigError(
                f"the config is of type {type(given).__name__}, expected a QuantConfig or a "
                "mapping of its keys"
            )
        if isinstance(given, QuantConfig) and not settings:
            return given
        return cls.parse({**dict(given or {}), **expanded(settings)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A key of the config as people read of it.

    ``kind`` is what a value is, ``choices`` are all values where there are few, and
    ``default`` is in text, empty where there is none. A ``repeatable`` key holds any
    number of values; a ``flag`` is on where it is named.
    """

    key: str
    section: str
    description: str
    kind: str
    choices: tuple[str, ...]
    default: str
    repeatable: bool
    flag: bool


def settings() -> Iterator[Setting]:
    """The keys of the config, in the order of their sections."""
    for section in SECTIONS:
        for key, field in QuantConfig.model_fields.items():
            if field.json_schema_extra == {"section": section}:
                yield _setting(key, section, field)


def _setting(key: str, section: str, field: FieldInfo) -> Setting:
    leaf = _leaf(field.annotation)
    origin, values = get_origin(leaf) or leaf, get_args(leaf)
    default = field.get_default(call_default_factory=True)
    return Setting(
        key=key,
        section=section,
        description=field.description or "",
        kind=_KINDS.get(type(values[0]) if origin is Literal else origin, "TEXT"),
        choices=tuple(map(str, values)) if origin is Literal else (),
        default=_text(default),
        repeatable=origin is dict or (origin is tuple and str in values),
        flag=origin is bool,
    )


def _text(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "" if default is False or default in (None, {}) else str(default)


_KINDS = {int: "INTEGER", float: "FLOAT", Path: "PATH", dict: "NAME=BITS"}


def _leaf(annotation: Any) -> Any:
    """The type of a value that is not ``None``: the first of several, without its bounds."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return _leaf(get_args(annotation)[0])
    return annotation


PYPROJECT = "pyproject.toml"
TABLE = "onnx-attnround"


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, ``-`` in them read as ``_``; not yet validated.

    Of a ``pyproject.toml`` these are those of ``[tool.onnx-attnround]``. Raises ``ConfigError``.
    """
    read = read_toml(path, "config")
    if path.name == PYPROJECT:
        read = read.get("tool", {}).get(TABLE, {})
    keys: dict[str, Any] = {}
    for given, value in read.items():
        key = given.replace("-", "_")
        if key in keys:
            raise ConfigError(f"config '{path}': '{key}' is given twice, with - and with _")
        keys[key] = value
    return keys
