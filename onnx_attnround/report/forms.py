"""The forms of the report, by the ending of the file's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_attnround.check import Checked
from onnx_attnround.errors import ConfigError
from onnx_attnround.graph import write_atomic
from onnx_attnround.report import document, junit, markdown, page
from onnx_attnround.report.result import Compared, Point, QuantizeResult

Record = QuantizeResult | tuple[Point, ...] | Checked | Compared
"""What is reported: a run, the points of a trade-off, a check, or a comparison of two files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The functions that make the text of a report of each kind, given the command."""

    run: Callable[[QuantizeResult, str | None], str]
    points: Callable[[tuple[Point, ...], str | None], str]
    check: Callable[[Checked, str | None], str]
    compared: Callable[[Compared, str | None], str]


FORMS: Mapping[str, Form] = {
    ".json": Form(
        run=lambda run, _: document.text(document.report_dict(run)),
        points=lambda points, _: document.text(document.points_dict(points)),
        check=lambda checked, _: document.text(document.check_dict(checked)),
        compared=lambda compared, _: document.text(document.compared_dict(compared)),
    ),
    ".html": Form(
        run=page.run_page,
        points=page.points_page,
        check=page.check_page,
        compared=page.compared_page,
    ),
    ".md": Form(
        run=markdown.run,
        points=markdown.points,
        check=markdown.check,
        compared=markdown.compared,
    ),
    ".xml": Form(
        run=junit.run, points=junit.points, check=junit.check, compared=junit.compared
    ),
}
ENDINGS = ", ".join(FORMS)


def form_of(path: Path) -> Form:
    """The form that the name asks for; raises ``ConfigError`` for another ending."""
    found = FORMS.get(path.suffix.lower())
    if found is None:
        raise ConfigError(f"`report` '{path}': expected a file name that ends in one of {ENDINGS}")
    return found


def write_report(path: Path, record: Record, command: str | None = None) -> None:
    """Write the report to ``path``, complete or not at all; raises ``OutputError``.

    ``command`` is the command line of the run, which a page shows.
    """
    form = form_of(path)
    if isinstance(record, QuantizeResult):
        text = form.run(record, command)
    elif isinstance(record, tuple):
        text = form.points(record, command)
    elif isinstance(record, Compared):
        text = form.compared(record, command)
    else:
        text = form.check(record, command)
    write_atomic(path, text.encode())
