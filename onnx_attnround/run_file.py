"""A run as one file: the settings of a config file, and what the run reads and writes.

Paths in a file start from the folder that the file lies in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from onnx_attnround.config import PYPROJECT, TABLE, QuantConfig, read_config
from onnx_attnround.errors import ConfigError
from onnx_attnround.settings import Settings, unknown


class RunFiles(Settings):
    """The keys of a config file that are no settings: what a run reads and writes."""

    noun: ClassVar[str] = "key"

    model: Path | None = Field(default=None, description="The ONNX model to quantise, IN")
    output: Path | None = Field(default=None, description="Where the quantised model goes, OUT")
    calib: Path | None = Field(default=None, description="Calibration samples")
    eval: Path | None = Field(default=None, description="Samples to verify on")
    preprocess: str | dict[str, Any] | None = Field(
        default=None,
        description="How images become inputs: a name, a TOML file, or the keys of one as a table",
    )
    report: tuple[Path, ...] = Field(default=(), description="Reports to write, one or a list")

    @field_validator("report", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A config file as read: ``files`` are checked, ``settings`` not yet."""

    path: Path | None = None
    files: RunFiles = field(default_factory=RunFiles)
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_run(path: Path) -> RunFile:
    """The content of a config file; raises ``ConfigError`` for a key that there is not."""
    keys = read_config(path)
    known = [*RunFiles.model_fields, *QuantConfig.model_fields]
    for key in keys:
        if key not in known:
            told = unknown("key", key, known, "'")  # as the file has them, not as options
            raise ConfigError(f"config '{path}': {told}")
    return run_of(keys, path)


def run_of(keys: Mapping[str, Any], path: Path) -> RunFile:
    """Such keys, told apart, with paths that start from the folder of ``path``."""
    placed = {key: _placed(key, value, path.parent) for key, value in keys.items()}
    files = {key: placed.pop(key) for key in RunFiles.model_fields if key in placed}
    return RunFile(path=path, files=RunFiles(**files), settings=placed)


def find_run() -> RunFile:
    """That of the nearest ``pyproject.toml`` with a table for this tool, here or above.

    Without any it is empty. Raises ``ConfigError`` as :func:`read_run`.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        path = folder / PYPROJECT
        if path.is_file() and f"[tool.{TABLE}" in path.read_text("utf-8", errors="replace"):
            return read_run(path)
    return RunFile()


_PATHS = frozenset({"model", "output", "calib", "eval", "report", "work_dir", "custom_op_library"})
_NAMES = frozenset({"preprocess", "target"})  # or files, which end in .toml


def _placed(key: str, value: Any, folder: Path) -> Any:
    """``value`` with the paths in it below ``folder``, if the key holds paths."""
    if isinstance(value, list):
        return [_placed(key, each, folder) for each in value]
    if not isinstance(value, str):
        return value
    is_path = key in _PATHS or (key in _NAMES and value.endswith(".toml"))
    return str(folder / value) if is_path else value


def described() -> Iterator[tuple[str, str]]:
    """The keys of :class:`RunFiles` with their descriptions."""
    for key, info in RunFiles.model_fields.items():
        yield key, info.description or ""
