"""The options of the command line: what a run reads and writes, and one for each config key.

Both are declared once, as fields: those of :class:`Options` here, those of the config
with their descriptions in ``config.py``. What is slow to import is imported when it is
needed, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from onnx_attnround.cli.wording import option, worded
from onnx_attnround.config import SECTIONS, QuantConfig, Setting, read_config, settings
from onnx_attnround.errors import ConfigError
from onnx_attnround.version import version

EPILOG = "\n\n".join((
    "Examples:",
    "onnx-attnround in.onnx out.onnx --calib samples.npz",
    "onnx-attnround in.onnx out.onnx --calib photos/ --preprocess imagenet",
    "onnx-attnround in.onnx out.onnx --calib c.npz --mean-bits 4 --min-sqnr 20",
    "onnx-attnround in.onnx out.onnx --calib c.npz --mean-bits 3,4,6",
    "onnx-attnround in.onnx --weight-bits 4 --exclude '/head/*' --dry-run",
    "onnx-attnround --check quantised.onnx --target tensorrt",
    "Exit codes: 0 done, 1 failed, 2 usage, 3 gate missed, 130 interrupted.",
))  # fmt: skip

_SAMPLES, _RUN = SECTIONS[0], SECTIONS[-1]

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _option(panel: str, help: str, *names: str, **rest: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **rest)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onnx-attnround {version()}")
        raise typer.Exit


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run reads, writes and prints: all that the config does not hold."""

    model: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model to quantise.")]
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Where the quantised model goes.")
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
        str | None,
        _option(
            _SAMPLES,
            "How images become inputs: imagenet, cifar10, unit, tf, or a TOML file.",
            metavar="NAME|FILE",
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
            _RUN, "TOML file of settings, named as here with _ for -; options given here win."
        ),
    ] = None
    dry_run: Annotated[
        bool,
        _option(
            _RUN,
            "Print what would be quantised, and judge the samples given; write nothing.",
            "--dry-run",
        ),
    ] = False
    check: Annotated[
        bool,
        _option(
            _RUN,
            "Check the quantised model IN against the rules of --target, run it on --calib "
            "or noise where its runtime is installed, and list what breaks or does not fuse; "
            "exit code 1 if it is refused.",
            "--check",
        ),
    ] = False
    report: Annotated[
        list[Path] | None,
        _option(
            _RUN,
            "Write a report: all figures as .json, a page as .html, a summary as .md, gates as "
            ".xml (JUnit); repeatable.",
        ),
    ] = None
    quiet: Annotated[bool, _option(_RUN, "Print errors only.", "--quiet", "-q")] = False
    verbose: Annotated[
        bool,
        _option(_RUN, "Also print every layer, and tracebacks of errors.", "--verbose", "-v"),
    ] = False
    version: Annotated[
        bool,
        _option(_RUN, "Print the version.", "--version", callback=_show_version, is_eager=True),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line holds: its options, and keys of the config, as text or flags.

    ``names`` are the parameters that were given, options as ``--name``; ``line`` is all of it, as
    a shell takes it.
    """

    options: Options
    settings: Mapping[str, str | list[str] | bool]
    names: frozenset[str]
    line: str = ""

    def from_file(self) -> dict[str, Any]:
        """The keys of the config file that no option overrides."""
        if self.options.config is None:
            return {}
        read = read_config(self.options.config)
        return {key: value for key, value in read.items() if key not in self.settings}

    def config(self, from_file: Mapping[str, Any]) -> tuple[QuantConfig, tuple[Any, ...]]:
        """All settings together, and where there are several mean bits all of them.

        The config has the first. Raises ``ConfigError``.
        """
        chosen = {**from_file, **{key: _value(key, text) for key, text in self.settings.items()}}
        means = chosen.get("mean_bits")
        if not isinstance(means, list) or not means:
            return QuantConfig.parse(chosen), ()
        chosen["mean_bits"] = means[0]
        return QuantConfig.parse(chosen), tuple(means) if len(means) > 1 else ()


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


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def command(ctx: typer.Context, **given: Any) -> Request:
    """Quantise the ONNX model IN after training, and write it to OUT with Q/DQ nodes."""
    own = {field.name for field in fields(Options)}
    sources = {p.opts[0]: ctx.get_parameter_source(p.name or "") for p in ctx.command.params}
    here = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    return Request(
        options=Options(**{name: given[name] for name in own}),
        settings={key: text for key, text in given.items() if key not in own and text},
        names=frozenset(here),
    )


def _signature() -> inspect.Signature:
    """What ``command`` takes, in the order of the panels that ``--help`` shows."""
    hints = get_type_hints(Options, include_extras=True)
    declared = [(field.name, hints[field.name], field.default) for field in fields(Options)]
    declared += [(setting.key, _declared(setting), None) for setting in settings()]
    in_panels = sorted(declared, key=lambda one: _panel(one[1]))
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=inspect.Parameter.empty if default is MISSING else default,
        )
        for name, annotation, default in in_panels
    ]
    context, _ = inspect.signature(command).parameters.values()
    return inspect.Signature([context, *parameters])


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
    return Annotated[text | None, _option(setting.section, told, name, metavar=setting.kind)]


# typer reads the options from the signature: it is made of the declarations above.
command.__signature__ = _signature()  # type: ignore[attr-defined]
