"""Progress of the stages on standard error: bars on a terminal, else plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TextIO

from rich import progress
from rich.console import Console

from onnx_attnround.records import Event

OnEvent = Callable[[Event], None]

WIDTH = 160  # columns where the output is no terminal


def console_on(file: TextIO) -> Console:
    """A console that takes names of nodes and files as they are, brackets and colons included."""
    width = None if file.isatty() else WIDTH
    return Console(file=file, markup=False, emoji=False, highlight=False, width=width)


def shown(*, quiet: bool, verbose: bool) -> AbstractContextManager[OnEvent]:
    """While the context is open, its function shows the events that it is given.

    Nothing is shown if ``quiet``. Without a terminal a stage gets one line, and
    with ``verbose`` another whenever the word on what is done changes.
    """
    if quiet:
        return nullcontext(lambda event: None)
    return _bars() if sys.stderr.isatty() else nullcontext(_lines(verbose=verbose))


@contextmanager
def _bars() -> Iterator[OnEvent]:
    """One bar per stage, with the time passed and left and the layer at hand."""
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[detail]}", markup=False),
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
