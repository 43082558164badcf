"""One run of the command line: what the options ask for is checked, done, told and reported.

What is slow to import is imported when it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError, GateError, ModelError

if TYPE_CHECKING:
    from onnx_attnround.cli.progress import OnEvent
    from onnx_attnround.pipeline import QuantizeResult
    from onnx_attnround.pipeline.trade_off import Point
    from onnx_attnround.samples.preprocess import Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for, beside the config; ``mean_bits`` where there are several.

    ``given`` names what the command line holds, options as ``--name``.
    """

    given: frozenset[str]
    model: Path
    output: Path | None
    calib: Path | None
    preprocess: str | None
    evaluation: Path | None
    config_file: Path | None
    report: Path | None
    dry_run: bool
    check: bool
    quiet: bool
    verbose: bool
    mean_bits: tuple[Any, ...] = ()


READ_BY_CHECK = frozenset(
    {"model", "--check", "--calib", "--preprocess", "--samples", "--target"}
    | {"--custom-op-library", "--config", "--report", "--quiet", "--verbose"}
)


def run(options: Options, config: QuantConfig) -> None:
    """Do what the options ask for; raises the errors of ``errors.py``."""
    _check(options)
    if options.check:
        _check_model(options, config)
    elif options.dry_run:
        _dry_run(options, config)
    else:
        _quantize(options, config)


def _check(options: Options) -> None:
    """Raise ``ConfigError`` for options that do not go together."""
    if options.check and (options.output is not None or options.dry_run):
        raise ConfigError("--check takes IN alone and writes nothing: leave out OUT and --dry-run")
    if options.check and (unread := sorted(options.given - READ_BY_CHECK)):
        raise ConfigError(f"--check does not read {', '.join(unread)}: leave that out")
    if options.output is None and not (options.dry_run or options.check):
        raise ConfigError("OUT is missing: name the file to write, or give --dry-run")
    if options.report is not None and options.report.suffix.lower() != ".json":
        raise ConfigError(f"--report '{options.report}': expected a file name that ends in .json")
    if options.quiet and options.verbose:
        raise ConfigError("--quiet and --verbose contradict each other: give one of them")
    for output in _outputs(options):
        _check_overwritten(options, output)


def _means(options: Options) -> list[float]:
    """The several mean bits; raises ``ConfigError`` for what is no number."""
    try:
        return [float(mean) for mean in options.mean_bits]
    except (TypeError, ValueError) as error:
        given = ",".join(map(str, options.mean_bits))
        raise ConfigError(f"option 'mean_bits': expected numbers, got '{given}'") from error


def _outputs(options: Options) -> list[Path]:
    """The files that a run writes."""
    if options.output is None:
        return []
    if not options.mean_bits:
        return [options.output]
    from onnx_attnround.pipeline.trade_off import point_path

    return [point_path(options.output, mean) for mean in _means(options)]


def _check_overwritten(options: Options, output: Path) -> None:
    """Raise ``ConfigError`` if ``output`` is also the file of an option."""
    files = {
        "--calib": options.calib,
        "--eval": options.evaluation,
        "--config": options.config_file,
        "--report": options.report,
    }
    for name, file in files.items():
        if file is not None and file.resolve() == output.resolve():
            raise ConfigError(f"OUT '{output}' is the file of {name}: choose another OUT")


def _dry_run(options: Options, config: QuantConfig) -> None:
    from onnx_attnround.cli.progress import console_on
    from onnx_attnround.pipeline import make_plan
    from onnx_attnround.pipeline.trade_off import with_means
    from onnx_attnround.report.console import plan_tables

    notes = _expected_notes(options, config)
    for each in with_means(config, _means(options)) if options.mean_bits else [config]:
        console_on(sys.stdout).print(plan_tables(*make_plan(options.model, each)))
    for note in notes:
        console_on(sys.stdout).print(f"note: {note}")


def _expected_notes(options: Options, config: QuantConfig) -> list[str]:
    """What a run would note at its start; samples that are given are judged as it would do."""
    from onnx_attnround.pipeline import load
    from onnx_attnround.pipeline.context import Run

    config = config.model_copy(update={"work_dir": None})  # which load would make
    run = Run(config, lambda event: None)
    if options.calib is None and options.evaluation is None:
        run.notes += config.idle()
    else:
        load(run, options.model, options.calib, options.evaluation, _preprocess(options))
    if options.report is not None:
        run.notes.append("option 'report' has no effect: a dry run measures nothing")
    return run.notes


def _preprocess(options: Options) -> Preprocess | None:
    from onnx_attnround.samples.preprocess import load_preprocess

    return None if options.preprocess is None else load_preprocess(options.preprocess)


def _check_model(options: Options, config: QuantConfig) -> None:
    """Print what breaks the rules of the target; raise ``ModelError`` if it is refused."""
    from onnx_attnround.cli.progress import console_on
    from onnx_attnround.pipeline import check_model
    from onnx_attnround.report.console import check_console
    from onnx_attnround.report.document import write_check

    checked = check_model(options.model, config, options.calib, preprocess=_preprocess(options))
    if options.report is not None:
        write_check(options.report, checked)
    if not options.quiet:
        console_on(sys.stdout).print(check_console(checked))
    if number := len(checked.refused):
        raise ModelError(
            f"'{options.model}' breaks the rules of target '{checked.target}' {number} times, "
            f"first at {checked.refused[0].node}: {checked.refused[0].why}"
        )


def _quantize(options: Options, config: QuantConfig) -> None:
    """The run: quantise, print, write the report; a missed gate is reported all the same."""
    from onnx_attnround.cli.progress import shown
    from onnx_attnround.graph import check_output

    if options.report is not None:
        check_output(options.report)
    work = _work(options, config)
    try:
        with shown(quiet=options.quiet, verbose=options.verbose) as on_event:
            made = work(on_event)
    except GateError as error:
        if (missed := getattr(error, "result", None)) is not None:
            _tell(missed, options, config, output=None)
        raise
    _tell(made, options, config, output=options.output)


def _work(
    options: Options, config: QuantConfig
) -> Callable[[OnEvent], QuantizeResult | tuple[Point, ...]]:
    """What to do: one model, or one for each of several mean bits."""
    from onnx_attnround.pipeline import quantize
    from onnx_attnround.pipeline.trade_off import trade_off

    rest: dict[str, Any] = {
        "output": options.output,
        "evaluation": options.evaluation,
        "preprocess": _preprocess(options),
    }
    given = (options.model, options.calib, config)
    if not options.mean_bits:
        return lambda on_event: quantize(*given, **rest, on_event=on_event)
    means = _means(options)
    return lambda on_event: trade_off(*given, mean_bits=means, **rest, on_event=on_event)


def _tell(
    made: QuantizeResult | tuple[Point, ...],
    options: Options,
    config: QuantConfig,
    *,
    output: Path | None,
) -> None:
    """Write the report, and print what was found."""
    from onnx_attnround.cli.progress import console_on
    from onnx_attnround.report.console import console, points_table
    from onnx_attnround.report.document import write_json, write_points

    if isinstance(made, tuple):
        table = points_table(made, verbose=options.verbose)
        if options.report is not None:
            write_points(options.report, made)
    else:
        table = console(made, output=output, verbose=options.verbose)
        if options.report is not None:
            write_json(options.report, made, config)
    if not options.quiet:
        console_on(sys.stdout).print(table)
