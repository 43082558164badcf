"""Progress of the stages on standard error: bars on a terminal, else plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich import progress
from rich.table import Column
from rich.text import Text

from onnx_attnround.records import Event, OnEvent
from onnx_attnround.report.layout import console_on

if TYPE_CHECKING:
    from onnx_attnround.report.swept import Swept


def shown(*, quiet: bool, verbose: bool) -> AbstractContextManager[OnEvent]:
    """While the context is open, its function shows the events that it is given.

    Nothing is shown if ``quiet``. Without a terminal a stage gets one line, and
    with ``verbose`` another whenever the word on what is done changes.
    """
    if quiet:
        return nullcontext(lambda event: None)
    return _bars() if sys.stderr.isatty() else nullcontext(_lines(verbose=verbose))


class _Detail(progress.TextColumn):
    """Text on one line: the only column that gives way, since it alone may be wrapped."""

    def render(self, task: progress.Task) -> Text:
        """The text, which is cut where there is no room for it."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def _whole() -> Column:
    return Column(no_wrap=True)


@contextmanager
def _bars() -> Iterator[OnEvent]:
    """One bar per stage, with the time passed and left and the layer at hand.

    Where the terminal is too narrow for all, that of the layer is cut.
    """
    columns = (
        progress.TextColumn("{task.description}", markup=False, table_column=_whole()),
        progress.BarColumn(bar_width=20, table_column=_whole()),
        progress.MofNCompleteColumn(table_column=_whole()),
        progress.TimeElapsedColumn(table_column=_whole()),
        progress.TimeRemainingColumn(table_column=_whole()),
        _Detail("{task.fields[detail]}", markup=False, table_column=Column()),
    )
    bars: dict[str, progress.TaskID] = {}
    with progress.Progress(*columns, console=console_on(sys.stderr)) as display:

        def on_event(event: Event) -> None:
            if event.stage not in bars:
                _complete(display)
                bars[event.stage] = display.add_task(event.stage, total=event.total, detail="")
            display.update(
                bars[event.stage], completed=event.done, total=event.total, detail=event.detail
            )

        yield on_event
        _complete(display)


def _complete(display: progress.Progress) -> None:
    """Fill the bars: a stage has ended when the next one begins, or all is done."""
    for task in display.tasks:
        display.update(task.id, completed=task.total, detail="")


def _lines(*, verbose: bool) -> OnEvent:
    last: dict[str, str] = {}

    def on_event(event: Event) -> None:
        if event.stage not in last:
            sys.stderr.write(f"{event.stage}\n")
        if verbose and event.detail and event.detail != last.get(event.stage):
            sys.stderr.write(f"{event.stage} {event.done}/{event.total} {event.detail}\n")
        last[event.stage] = event.detail

    return on_event


def counted(total: int, *, quiet: bool) -> Callable[[Swept], None]:
    """A function that tells of each job of a sweep that has ended, one line each."""
    done = 0

    def on_done(found: Swept) -> None:
        nonlocal done
        done += 1
        if not quiet:
            sys.stderr.write(f"{done}/{total} {found.name}: {found.status}\n")

    return on_done
