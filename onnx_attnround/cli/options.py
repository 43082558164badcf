"""The options of the commands: what a run reads and writes, and one for each config key.

Both are declared once, as fields: those of :class:`Options` here, those of the config
with their descriptions in ``config.py``. What is slow to import is imported when it is
needed, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from onnx_attnround.cli.wording import option, worded
from onnx_attnround.config import SECTIONS, QuantConfig, Setting, settings
from onnx_attnround.errors import ConfigError
from onnx_attnround.presets import expanded
from onnx_attnround.run_file import RunFile, find_run, read_run
from onnx_attnround.targets import TARGETS

_SAMPLES, _RUN = SECTIONS[0], SECTIONS[-1]


class Format(str, Enum):
    """How a result is printed: for people, for programs, for the log of a GitHub workflow."""

    text = "text"
    json = "json"
    github = "github"


def _option(panel: str, help: str, *names: str, **rest: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run reads, writes and prints: all that the config does not hold."""

    model: Annotated[Path | None, typer.Argument(metavar="IN", help="The ONNX model.")] = None
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Where the quantised model goes.")
    ] = None
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[IN]...", help="More models, one by one.")
    ] = None
    quantised: Annotated[
        Path | None,
        typer.Argument(metavar="QUANTISED", help="The quantised model, of any make."),
    ] = None
    jobs: Annotated[
        Path | None,
        typer.Argument(metavar="JOBS", help="TOML file of models, targets and presets."),
    ] = None
    backend: Annotated[
        str,
        _option(
            _RUN,
            "What runs the jobs: loky (processes of this machine), or a cluster of ray or dask. "
            "Default: loky.",
            metavar="NAME",
        ),
    ] = "loky"
    workers: Annotated[
        int | None,
        _option(_RUN, "Jobs run at a time. Default: one for each two cores.", min=1),
    ] = None
    cluster: Annotated[
        str | None,
        _option(
            _RUN,
            "Address of a cluster that runs already, such as auto (ray) or tcp://host:8786 "
            "(dask); without, one is started on this machine.",
            metavar="ADDRESS",
        ),
    ] = None
    calib: Annotated[
        Path | None,
        _option(
            _SAMPLES,
            "Calibration samples, unlabelled: .npz with input names as keys, .npy, an image, "
            "a folder of these, or of ONNX test_data_set_*. Without: test_data_set_* beside IN "
            "with 16 samples or more, else weights only.",
        ),
    ] = None
    preprocess: Annotated[
        Any,
        _option(
            _SAMPLES,
            "How images become inputs: imagenet, tf, yolo and others, or a TOML file.",
            metavar="NAME|FILE",
            parser=str,
        ),
    ] = None
    evaluation: Annotated[
        Path | None,
        _option(
            _SAMPLES,
            "Samples to verify on, as for --calib; an .npz with `labels` adds top-1.",
            "--eval",
        ),
    ] = None
    config: Annotated[
        Path | None,
        _option(
            _RUN,
            "TOML file of settings, and of model, output, calib, eval, preprocess and report; "
            "options given here win. Without: [tool.onnx-attnround] of the nearest "
            "pyproject.toml.",
        ),
    ] = None
    report: Annotated[
        list[Path] | None,
        _option(
            _RUN,
            "Write a report: all figures as .json, a page as .html, a summary as .md, gates as "
            ".xml (JUnit); repeatable.",
        ),
    ] = None
    format: Annotated[
        Format,
        _option(_RUN, "Print for people, as JSON, or with annotations of a GitHub workflow."),
    ] = Format.text
    quiet: Annotated[bool, _option(_RUN, "Print errors only.", "--quiet", "-q")] = False
    verbose: Annotated[
        bool,
        _option(_RUN, "Also print every layer, and tracebacks of errors.", "--verbose", "-v"),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line holds: its options, and keys of the config, as text or flags.

    ``command`` is what to do, ``line`` is all of it, as a shell takes it. ``reads_config`` says
    whether the command goes by settings of a config file.
    """

    command: str
    options: Options
    settings: Mapping[str, str | list[str] | bool] = field(default_factory=dict)
    line: str = ""
    reads_config: bool = True

    def with_file(self) -> tuple[Request, dict[str, Any]]:
        """The request with the files that its config names, and the settings there.

        What the command line gives wins. Raises ``ConfigError``.
        """
        given = self.options
        if not self.reads_config:
            return self, {}
        found = find_run() if given.config is None else read_run(given.config)
        read = _named_by(found)
        own = {name: value for name, value in read.items() if not getattr(given, name)}
        left = {key: each for key, each in found.settings.items() if key not in self.settings}
        return replace(self, options=replace(given, **own)), left

    def settled(self, from_file: Mapping[str, Any]) -> tuple[QuantConfig, tuple[Any, ...]]:
        """All settings together, and where there are several mean bits all of them.

        The config has the first. A preset that is given here goes before the settings of the
        file. Raises ``ConfigError``.
        """
        given = {key: _value(key, text) for key, text in self.settings.items()}
        chosen = {**expanded(from_file), **expanded(given)}
        means = chosen.get("mean_bits")
        if not isinstance(means, list) or not means:
            return QuantConfig.parse(chosen), ()
        chosen["mean_bits"] = means[0]
        return QuantConfig.parse(chosen), tuple(means) if len(means) > 1 else ()


def _named_by(found: RunFile) -> dict[str, Any]:
    """The files that a config names, by the names that they have among the options."""
    files = found.files
    return {
        "model": files.model,
        "output": files.output,
        "calib": files.calib,
        "evaluation": files.eval,
        "preprocess": files.preprocess,
        "report": list(files.report) or None,
        "config": found.path,
    }


def _value(key: str, text: str | list[str] | bool) -> Any:
    """The value of a key, as a config file has it but for numbers, which stay text."""
    if isinstance(text, str):
        return text.split(",") if key in ("bit_choices", "mean_bits") else text
    if isinstance(text, bool):
        return text
    return dict(_named_bits(key, each) for each in text) if key in _NAMED else text


_NAMED = ("layer_bits", "activation_bits")


def _named_bits(key: str, text: str) -> tuple[str, str]:
    name, equals, bits = text.rpartition("=")
    if not equals:
        raise ConfigError(f"option `{key}`: got '{text}', expected NAME=BITS")
    return name, bits


def function_of(
    name: str, options: Collection[str], keys: Collection[str] | None
) -> Callable[..., Request]:
    """The function that typer makes the command ``name`` of; it returns the :class:`Request`.

    It takes some of the :class:`Options`, the others having their defaults, and the settings
    ``keys``, by default all.
    """
    hints = get_type_hints(Options, include_extras=True)
    declared = [
        (each.name, hints[each.name], each.default)
        for each in fields(Options)
        if each.name in options
    ]
    declared += [
        (each.key, _declared(each), None)
        for each in settings()
        if keys is None or each.key in keys
    ]

    def command(**given: Any) -> Request:
        own = {key: value for key, value in given.items() if key in options}
        rest = {key: text for key, text in given.items() if key not in own and text}
        return Request(
            command=name,
            options=Options(**own),
            settings=rest,
            reads_config="config" in options,
        )

    # typer reads the options from the signature: it is made of the declarations above.
    command.__signature__ = _signature(declared)  # type: ignore[attr-defined]
    return command


def _signature(declared: Iterable[tuple[str, Any, Any]]) -> inspect.Signature:
    """What a command takes, in the order of the panels that ``--help`` shows."""
    return inspect.Signature([
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
        )
        for name, annotation, default in sorted(declared, key=lambda one: _panel(one[1]))
    ])  # fmt: skip


def _panel(annotation: Any) -> int:
    (declared,) = annotation.__metadata__
    return SECTIONS.index(declared.rich_help_panel) if declared.rich_help_panel else -1


def _declared(setting: Setting) -> Any:
    """The option of a key: it takes text, which the config then judges as any value."""
    listed = f": {', '.join(setting.choices)}" if setting.choices else ""
    repeatable = "; repeatable" if setting.repeatable else ""
    default = f" Default: {setting.default}." if setting.default else ""
    told = f"{worded(setting.description)}{listed}{repeatable}.{default}"
    name = option(setting.key)
    if setting.flag:
        return Annotated[bool | None, _option(setting.section, told, name)]
    text = list[str] if setting.repeatable else str
    known = tuple(TARGETS) if setting.key == "target" else setting.choices
    rest = {"metavar": setting.kind, "autocompletion": _beginning(known)}
    return Annotated[text | None, _option(setting.section, told, name, **rest)]


def _beginning(known: Collection[str]) -> Callable[[str], list[str]]:
    """What a shell is told of the values that begin like what is typed."""

    def offered(incomplete: str) -> list[str]:
        return [value for value in known if value.startswith(incomplete)]

    return offered
