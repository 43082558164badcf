"""The jobs of a sweep, from a TOML file: models x targets x presets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx_attnround.config import QuantConfig, read_config
from onnx_attnround.errors import ConfigError
from onnx_attnround.run_file import RunFile, RunFiles, run_of
from onnx_attnround.settings import unknown
from onnx_attnround.version import version

WORK = ".work"  # beside the files of a sweep, what unfinished jobs have done
_OWN = ("output", "targets", "presets", "models")
_SHARED = tuple(key for key in RunFiles.model_fields if key not in ("model", "output", "report"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One model for one target at one preset, in values that JSON holds.

    ``folder`` is where its files go, all of which begin with its ``name``. ``settings`` are
    keys of ``QuantConfig``, target and preset among them.
    """

    name: str
    folder: str
    model: str
    target: str
    preset: str
    calib: str | None
    eval: str | None
    preprocess: str | dict[str, Any] | None
    settings: dict[str, Any]

    def file(self, ending: str) -> Path:
        """The file of the job with that ending."""
        return Path(self.folder) / f"{self.name}{ending}"

    def fingerprint(self) -> str:
        """What tells whether a result is still that of the job: all of it, and its files' dates."""
        read = [self.model, self.calib, self.eval]
        stated = [each for path in read if path is not None for each in _states(Path(path))]
        told = json.dumps([version(), asdict(self), stated], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


def _states(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of a file, or of all below a folder; none for what is not there."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    for file in files:
        status = file.stat()
        yield str(file), status.st_size, status.st_mtime_ns


def read_jobs(path: Path) -> tuple[Path, list[Job]]:
    """The folder that a sweep writes to, and its jobs in their order.

    The file has ``output`` (the folder, by default ``swept`` beside it), ``targets``,
    ``presets``, and ``models``: paths, or tables with ``model`` and, if need be, ``name``. calib,
    eval, preprocess and all settings stand at the top for all models, or in the table of one.
    Raises ``ConfigError``, also for a setting that no run would take.
    """
    keys = read_config(path)
    path = path.absolute()  # workers of a cluster stand elsewhere
    models = keys.pop("models", None)
    if not isinstance(models, list) or not models:
        raise ConfigError(f"jobs '{path}': 'models' is missing: give paths or tables [[models]]")
    folder = path.parent / _text(keys.pop("output", "swept"), "output", path)
    targets = _texts(keys.pop("targets", ["ort"]), "targets", path)
    presets = _texts(keys.pop("presets", ["w8a8"]), "presets", path)
    jobs = [
        _job(folder, each, target, preset, path)
        for each in (_model(given, keys, path) for given in models)
        for target in targets
        for preset in presets
    ]
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"jobs '{path}': two jobs are '{name}': give models a 'name' each")
    return folder, jobs


def _model(given: object, shared: Mapping[str, Any], path: Path) -> tuple[str, RunFile]:
    """The name of a model, and what its jobs have in common."""
    table = {"model": given} if isinstance(given, str) else given
    if not isinstance(table, Mapping) or "model" not in table:
        raise ConfigError(f"jobs '{path}': got {given!r} in 'models', expected a path or a 'model'")
    own = {key.replace("-", "_"): value for key, value in table.items()}
    name = _text(own.pop("name", Path(str(own["model"])).stem), "name", path)
    settings = (key for key in QuantConfig.model_fields if key not in ("target", "preset"))
    known = ["model", "name", *_SHARED, *settings]
    for key in (*shared, *own):
        if key not in known:
            told = unknown("key", key, [*_OWN, *known], "'")
            raise ConfigError(f"jobs '{path}': {told}")
    return name, run_of({**shared, **own}, path)


def _job(folder: Path, model: tuple[str, RunFile], target: str, preset: str, path: Path) -> Job:
    name, run = model
    placed = target if not target.endswith(".toml") else str(path.parent / target)
    settings = {**run.settings, "target": placed, "preset": preset}
    QuantConfig.parse(settings)  # which judges them
    files = run.files
    return Job(
        name=f"{name}.{Path(target).stem}.{preset}",
        folder=str(folder),
        model=str(files.model),
        target=Path(target).stem,
        preset=preset,
        calib=None if files.calib is None else str(files.calib),
        eval=None if files.eval is None else str(files.eval),
        preprocess=files.preprocess,
        settings=settings,
    )


def _text(value: object, key: str, path: Path) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"jobs '{path}': '{key}': got {value!r}, expected text")
    return value


def _texts(value: object, key: str, path: Path) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"jobs '{path}': '{key}': got {value!r}, expected a list of names")
    return [_text(each, key, path) for each in value]
