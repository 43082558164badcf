"""What a command found, printed for people, for programs or for the log of a GitHub workflow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from onnx_attnround.cli.options import Format
from onnx_attnround.cli.wording import worded

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnx_attnround.check import Checked

Level = Literal["error", "warning", "notice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a command found: what people read, what programs read, and what annotations say."""

    shown: RenderableType
    record: Callable[[], Mapping[str, Any]]
    remarks: tuple[tuple[Level, str], ...] = ()


def show(found: Found, form: Format, keys: Collection[str]) -> None:
    """Print ``found``; settings have their names on the command line, but for ``keys``."""
    if form is Format.json:
        from onnx_attnround.report.document import text

        sys.stdout.write(text(found.record()))
        return
    from onnx_attnround.report.layout import console_on

    console = console_on(sys.stdout)
    with console.capture() as printed:
        console.print(found.shown, crop=False)
    sys.stdout.write(worded(printed.get(), keys))
    if form is Format.github:
        for level, text_of in found.remarks:
            sys.stdout.write(annotation(level, worded(text_of, keys)))


def annotation(level: Level, message: str) -> str:
    """A line that GitHub shows beside a run, by its workflow commands."""
    escaped = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{level} title=onnx-attnround::{escaped}\n"


def remarks_of(checked: Checked) -> Iterable[tuple[Level, str]]:
    """An annotation for each finding of a check."""
    for found in checked.findings:
        level: Level = "error" if found.refused else "warning"
        yield level, f"{found.node}: {found.rule}: {found.why}"
