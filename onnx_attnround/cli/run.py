"""One run of the command line: what is asked for is checked, done, told and reported.

What is slow to import is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_attnround.cli.formats import Found, Level, remarks_of, show
from onnx_attnround.cli.options import Options, Request
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import ConfigError, GateError, ModelError

if TYPE_CHECKING:
    from onnx_attnround.records import OnEvent
    from onnx_attnround.report.forms import Record
    from onnx_attnround.report.result import Point, QuantizeResult
    from onnx_attnround.report.swept import Swept
    from onnx_attnround.samples.preprocess import Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done; ``mean_bits`` where there are several, of which the config has the first.

    ``line`` is the command line. ``from_file`` are the settings of the config file, which messages
    name as that does; ``given`` are the keys of all settings that are given.
    """

    options: Options
    model: Path
    line: str
    config: QuantConfig
    mean_bits: tuple[Any, ...]
    from_file: Mapping[str, Any]
    given: frozenset[str]

    def show(self, found: Found) -> None:
        """Print what was found, in the form asked for."""
        show(found, self.options.format, self.from_file)


def run(request: Request, from_file: Mapping[str, Any]) -> None:
    """Do what is asked for, with the settings of a file; raises the errors of ``errors.py``."""
    options = request.options
    if request.command == "sweep":
        _sweep(options)
        return
    config, means = request.settled(from_file)
    if options.model is None:
        raise ConfigError("IN is missing: name the model, here or as `model` in a config")
    job = Job(
        options=options,
        model=options.model,
        line=request.line,
        config=config,
        mean_bits=means,
        from_file=from_file,
        given=frozenset({*from_file, *request.settings}),
    )
    _check(job, request.command)
    DOES[request.command](job)


def _check(job: Job, command: str) -> None:
    """Raise ``ConfigError`` for options that do not go together."""
    options = job.options
    if command == "quantize" and options.output is None:
        raise ConfigError(
            "OUT is missing: name the file to write, here or as `output` in a config, or take the "
            "command plan"
        )
    if command == "compare" and options.quantised is None:
        raise ConfigError("QUANTISED is missing: name the float model and then the quantised one")
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


def _plan(job: Job) -> None:
    """Print the plan; raise what the run would refuse, before it if that lies in the samples."""
    from rich.console import Group

    from onnx_attnround.pipeline import make_plan
    from onnx_attnround.pipeline.trade_off import with_means
    from onnx_attnround.report.console import plan_tables
    from onnx_attnround.report.document import plans_dict

    options, config = job.options, job.config
    given = options.calib is not None or options.evaluation is not None
    notes = _foreseen(job) if given else config.idle()
    if options.report:
        notes.append("option `report` has no effect: a plan measures nothing")
    configs = with_means(config, job.mean_bits) if job.mean_bits else [config]
    plans = [make_plan(job.model, each) for each in configs]
    tables = [plan_tables(*each) for each in plans]
    found = Found(
        shown=Group(*tables, *(f"note: {note}" for note in notes)),
        record=lambda: plans_dict(plans, notes),
        remarks=tuple(("notice", note) for note in notes),
    )
    job.show(found)
    if not given:  # the plan is that of a run with samples, which may come later
        _foreseen(job)


def _foreseen(job: Job) -> list[str]:
    """What the run would note at its start; raises what it would refuse."""
    from onnx_attnround.pipeline.foresee import foresee

    options = job.options
    return foresee(
        job.model,
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


def _check_models(job: Job) -> None:
    """Check one model after the other; raise ``ModelError`` for the first that is refused."""
    options = job.options
    models = [job.model, *(options.more or ())]
    if len(models) > 1 and options.report:
        raise ConfigError("--report is of one model: give one IN, or leave it out")
    refused = [error for error in map(partial(_check_model, job), models) if error is not None]
    if refused:
        others = f", and {len(refused) - 1} more are refused" if len(refused) > 1 else ""
        raise ModelError(f"{refused[0]}{others}")


def _check_model(job: Job, model: Path) -> str | None:
    """Print what breaks the rules of the target; returns what is to be said if it is refused."""
    from onnx_attnround.pipeline import check_model
    from onnx_attnround.report.console import check_console
    from onnx_attnround.report.document import check_dict

    options = job.options
    preprocess = _preprocess(options)
    checked = check_model(model, job.config, options.calib, preprocess=preprocess)
    _write_reports(job, checked)
    found = Found(
        shown=check_console(checked),
        record=lambda: check_dict(checked),
        remarks=tuple(remarks_of(checked)),
    )
    if not options.quiet:
        job.show(found)
    return f"'{model}' {checked.verdict}" if checked.refused else None


def _compare(job: Job) -> None:
    """Print how a quantised model differs from its float model, and where."""
    from onnx_attnround.cli.progress import shown
    from onnx_attnround.graph import check_output
    from onnx_attnround.pipeline.two_models import compare
    from onnx_attnround.report.console import compared_console
    from onnx_attnround.report.document import compared_dict
    from onnx_attnround.report.sentences import parting_lines

    options = job.options
    for report in options.report or ():
        check_output(report)
    models = job.model, options.quantised or job.model
    preprocess = _preprocess(options)
    with shown(quiet=options.quiet, verbose=options.verbose) as on_event:
        compared = compare(
            *models, options.evaluation, job.config, preprocess=preprocess, on_event=on_event
        )
    _write_reports(job, compared)
    found = compared.found
    warnings = [*found.verification.collapsed, *(parting_lines(found) if found.first else ())]
    if not options.quiet:
        job.show(
            Found(
                shown=compared_console(compared, verbose=options.verbose),
                record=lambda: compared_dict(compared),
                remarks=tuple(("warning", each) for each in warnings),
            )
        )


def _inspect(job: Job) -> None:
    """Print what is in the model, and what targets would take of it."""
    from onnx_attnround.pipeline.inspection import inspect_model
    from onnx_attnround.report.inspected import inspection_console, inspection_dict

    targets = [job.config.target] if "target" in job.given else None
    inspected = inspect_model(job.model, targets)
    job.show(
        Found(
            shown=inspection_console(inspected, verbose=job.options.verbose),
            record=lambda: inspection_dict(inspected),
        )
    )


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
    search = None if isinstance(made, tuple) else made.search
    if search is not None and search.missed is not None:
        raise GateError(f"{search.missed}; the file was written all the same")


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
    given = (job.model, options.calib, job.config)
    if not job.mean_bits:
        return lambda on_event: quantize(*given, **rest, on_event=on_event)
    means = job.mean_bits
    return lambda on_event: trade_off(*given, mean_bits=means, **rest, on_event=on_event)


def _tell(
    made: QuantizeResult | tuple[Point, ...], job: Job, *, output: Path | None
) -> None:
    """Write the report, and print what was found."""
    _write_reports(job, made)
    if not job.options.quiet:
        job.show(_found(made, job, output))


def _found(made: QuantizeResult | tuple[Point, ...], job: Job, output: Path | None) -> Found:
    from onnx_attnround.report.console import console, points_table
    from onnx_attnround.report.document import points_dict, report_dict

    verbose = job.options.verbose
    if isinstance(made, tuple):
        remarks = [
            (level, f"{point.config.mean_bits:g} mean bits: {told}")
            for point in made
            for level, told in _said(point.result)
        ]
        return Found(
            shown=points_table(made, verbose=verbose),
            record=lambda: points_dict(made),
            remarks=tuple(remarks),
        )
    return Found(
        shown=console(made, output=output, verbose=verbose),
        record=lambda: report_dict(made),
        remarks=tuple(_said(made)),
    )


def _said(made: QuantizeResult) -> Iterator[tuple[Level, str]]:
    """What annotations say of a run: outputs that are of no use, rules that are broken, notes."""
    if made.verification is not None:
        yield from (("warning", each) for each in made.verification.collapsed)
    yield from remarks_of(made.checked)
    yield from (("notice", note) for note in made.notes)


def _write_reports(job: Job, record: Record) -> None:
    """Write what is to be reported, in all forms that were asked for."""
    if not job.options.report:
        return
    from onnx_attnround.report.forms import write_report

    for path in job.options.report:
        write_report(path, record, job.line)


def _sweep(options: Options) -> None:
    """Run the jobs, print and keep what became of them; raise if one failed or missed a gate."""
    from rich.console import Group

    from onnx_attnround.cli.progress import counted
    from onnx_attnround.graph import write_atomic
    from onnx_attnround.report import swept
    from onnx_attnround.report.document import text
    from onnx_attnround.sweep.jobs import read_jobs
    from onnx_attnround.sweep.run import sweep

    if options.jobs is None:
        raise ConfigError("JOBS is missing: name a TOML file of models, targets and presets")
    folder, jobs = read_jobs(options.jobs)
    found = sweep(
        folder,
        jobs,
        backend=options.backend,
        workers=options.workers,
        cluster=options.cluster,
        on_done=counted(len(jobs), quiet=options.quiet),
    )
    forms = {
        "sweep.json": text(swept.swept_dict(found)),
        "sweep.md": swept.swept_markdown(found),
        "sweep.html": swept.swept_page(found, folder),
    }
    for name, content in forms.items():
        write_atomic(folder / name, content.encode())
    if not options.quiet:
        shown = Found(
            shown=Group(swept.swept_table(found), f"wrote {folder / 'sweep.html'}"),
            record=lambda: swept.swept_dict(found),
            remarks=tuple(("error", f"{e.name}: {e.message}") for e in found if e.message),
        )
        show(shown, options.format, ())
    _judge(found)


def _judge(found: Sequence[Swept]) -> None:
    """Raise for jobs that failed, or else for those that missed a gate."""
    for status, raised in (("failed", ModelError), ("gate missed", GateError)):
        these = [each for each in found if each.status == status]
        if these:
            first = f"first {these[0].name}: {these[0].message}"
            raise raised(f"{status}: {len(these)} of {len(found)} jobs, {first}")


DOES: Mapping[str, Callable[[Job], None]] = {
    "quantize": _quantize,
    "plan": _plan,
    "check": _check_models,
    "compare": _compare,
    "inspect": _inspect,
}
"""What each command does."""
