"""One run of the command line: what is asked for is checked, done, told and reported.

What is slow to import is imported when it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_attnround.cli.options import Options, Request
from onnx_attnround.cli.wording import worded
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError, GateError, ModelError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnx_attnround.cli.progress import OnEvent
    from onnx_attnround.report.forms import Record
    from onnx_attnround.report.result import Point, QuantizeResult
    from onnx_attnround.samples.preprocess import Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done; ``mean_bits`` where there are several, of which the config has the first.

    ``line`` is the command line. ``from_file`` are the settings of the config file, which messages
    name as that does.
    """

    options: Options
    line: str
    config: QuantConfig
    mean_bits: tuple[Any, ...]
    from_file: Mapping[str, Any]

    def show(self, found: RenderableType) -> None:
        """Print what was found, with settings by their names on the command line."""
        from onnx_attnround.report.layout import console_on

        console = console_on(sys.stdout)
        with console.capture() as printed:
            console.print(found, crop=False)
        sys.stdout.write(worded(printed.get(), self.from_file))


READ_BY_CHECK = frozenset(
    {"model", "--check", "--calib", "--preprocess", "--samples", "--target"}
    | {"--custom-op-library", "--config", "--report", "--quiet", "--verbose"}
)


def run(request: Request, from_file: Mapping[str, Any]) -> None:
    """Do what is asked for, with the settings of a file; raises the errors of ``errors.py``."""
    options = request.options
    config, means = request.config(from_file)
    job = Job(
        options=options, line=request.line, config=config, mean_bits=means, from_file=from_file
    )
    _check(job, request.names)
    if options.check:
        _check_model(job)
    elif options.dry_run:
        _dry_run(job)
    else:
        _quantize(job)


def _check(job: Job, names: frozenset[str]) -> None:
    """Raise ``ConfigError`` for options that do not go together."""
    options = job.options
    if options.check and (options.output is not None or options.dry_run):
        raise ConfigError("--check takes IN alone and writes nothing: leave out OUT and --dry-run")
    if options.check and (unread := sorted(names - READ_BY_CHECK)):
        raise ConfigError(f"--check does not read {', '.join(unread)}: leave that out")
    if options.output is None and not (options.dry_run or options.check):
        raise ConfigError("OUT is missing: name the file to write, or give --dry-run")
    _check_reports(options)
    if options.quiet and options.verbose:
        raise ConfigError("--quiet and --verbose contradict each other: give one of them")
    for output in _outputs(job):
        _check_overwritten(options, output)


def _check_reports(options: Options) -> None:
    """Raise ``ConfigError`` for a report that is of no known form, or is named twice."""
    reports = options.report or []
    if reports:
        from onnx_attnround.report.forms import form_of  # takes a second

        for path in reports:
            form_of(path)
    if len({path.resolve() for path in reports}) < len(reports):
        raise ConfigError("--report names one file twice: give each once")


def _outputs(job: Job) -> list[Path]:
    """The files that a run writes."""
    output = job.options.output
    if output is None:
        return []
    if not job.mean_bits:
        return [output]
    from onnx_attnround.pipeline.trade_off import point_path, with_means

    return [point_path(output, each) for each in with_means(job.config, job.mean_bits)]


def _check_overwritten(options: Options, output: Path) -> None:
    """Raise ``ConfigError`` if ``output`` is also the file of an option."""
    files = [
        ("--calib", options.calib),
        ("--eval", options.evaluation),
        ("--config", options.config),
        *(("--report", report) for report in options.report or ()),
    ]
    for name, file in files:
        if file is not None and file.resolve() == output.resolve():
            raise ConfigError(f"OUT '{output}' is the file of {name}: choose another OUT")


def _dry_run(job: Job) -> None:
    """Print the plan; raise what the run would refuse, before it if that lies in the samples."""
    from rich.console import Group

    from onnx_attnround.pipeline import make_plan
    from onnx_attnround.pipeline.trade_off import with_means
    from onnx_attnround.report.console import plan_tables

    options, config = job.options, job.config
    given = options.calib is not None or options.evaluation is not None
    notes = _foreseen(job) if given else config.idle()
    if options.report:
        notes.append("option `report` has no effect: a dry run measures nothing")
    configs = with_means(config, job.mean_bits) if job.mean_bits else [config]
    plans = [plan_tables(*make_plan(options.model, each)) for each in configs]
    job.show(Group(*plans, *(f"note: {note}" for note in notes)))
    if not given:  # the plan is that of a run with samples, which may come later
        _foreseen(job)


def _foreseen(job: Job) -> list[str]:
    """What the run would note at its start; raises what it would refuse."""
    from onnx_attnround.pipeline.foresee import foresee

    options = job.options
    return foresee(
        options.model,
        options.calib,
        job.config,
        outputs=_outputs(job),
        evaluation=options.evaluation,
        preprocess=_preprocess(options),
        compared=bool(job.mean_bits),
    )


def _preprocess(options: Options) -> Preprocess | None:
    from onnx_attnround.samples.preprocess import load_preprocess

    return None if options.preprocess is None else load_preprocess(options.preprocess)


def _check_model(job: Job) -> None:
    """Print what breaks the rules of the target; raise ``ModelError`` if it is refused."""
    from onnx_attnround.pipeline import check_model
    from onnx_attnround.report.console import check_console

    options = job.options
    preprocess = _preprocess(options)
    checked = check_model(options.model, job.config, options.calib, preprocess=preprocess)
    _write_reports(job, checked)
    if not options.quiet:
        job.show(check_console(checked))
    if checked.refused:
        raise ModelError(f"'{options.model}' {checked.verdict}")


def _quantize(job: Job) -> None:
    """The run: quantise, print, write the report; a missed gate is reported all the same."""
    from onnx_attnround.cli.progress import shown
    from onnx_attnround.graph import check_output

    options = job.options
    for report in options.report or ():
        check_output(report)
    work = _work(job)
    try:
        with shown(quiet=options.quiet, verbose=options.verbose) as on_event:
            made = work(on_event)
    except GateError as error:
        if (missed := getattr(error, "result", None)) is not None:
            _tell(missed, job, output=None)
        raise
    _tell(made, job, output=options.output)


def _work(job: Job) -> Callable[[OnEvent], QuantizeResult | tuple[Point, ...]]:
    """What to do: one model, or one for each of several mean bits."""
    from onnx_attnround.pipeline import quantize
    from onnx_attnround.pipeline.trade_off import trade_off

    options = job.options
    rest: dict[str, Any] = {
        "output": options.output,
        "evaluation": options.evaluation,
        "preprocess": _preprocess(options),
    }
    given = (options.model, options.calib, job.config)
    if not job.mean_bits:
        return lambda on_event: quantize(*given, **rest, on_event=on_event)
    means = job.mean_bits
    return lambda on_event: trade_off(*given, mean_bits=means, **rest, on_event=on_event)


def _tell(
    made: QuantizeResult | tuple[Point, ...], job: Job, *, output: Path | None
) -> None:
    """Write the report, and print what was found."""
    from onnx_attnround.report.console import console, points_table

    options = job.options
    if isinstance(made, tuple):
        table = points_table(made, verbose=options.verbose)
    else:
        table = console(made, output=output, verbose=options.verbose)
    _write_reports(job, made)
    if not options.quiet:
        job.show(table)


def _write_reports(job: Job, record: Record) -> None:
    """Write what is to be reported, in all forms that were asked for."""
    if not job.options.report:
        return
    from onnx_attnround.report.forms import write_report

    for path in job.options.report:
        write_report(path, record, job.line)
