"""Consoles and tables that keep the names of nodes and files whole, however narrow they are."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 160
"""The columns of the output where it is no terminal."""
GAP = 2
"""The blanks between the columns of a table."""
INDENT = 4
"""The blanks before a line that belongs to the name above it."""


def console_on(file: TextIO, width: int | None = None) -> Console:
    """A console that takes names of nodes and files as they are, brackets and colons included.

    Without a ``width`` it has that of the terminal.
    """
    if width is None and not file.isatty():
        width = WIDTH
    return Console(file=file, markup=False, emoji=False, highlight=False, width=width)


def plain_text(renderable: RenderableType, width: int) -> str:
    """What a console of that width shows, in lines without blanks at their ends."""
    file = io.StringIO()
    console_on(file, width).print(renderable, crop=False)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


@dataclass(frozen=True, slots=True)
class Rows:
    """A table whose first column names what a row is of, and whose cells are never cut.

    Columns whose header starts with ``>`` are right-aligned. Where a row does not fit on
    a line, the name has a line of its own, however long, and the rest flows below it.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, or names with what belongs to them."""
        widths = self._widths()
        fits = sum(widths) + GAP * len(widths) <= options.max_width
        yield from [self._table()] if fits else self._stacked(widths)

    def _widths(self) -> list[int]:
        """The columns that each column of the table takes, headers included."""
        titles = [header.removeprefix(">") for header in self.headers]
        return [max(map(cell_len, column)) for column in zip(titles, *self.rows, strict=True)]

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
        for header in self.headers:
            table.add_column(
                header.removeprefix(">"), justify="right" if header.startswith(">") else "left"
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def _stacked(self, widths: Sequence[int]) -> Iterator[RenderableType]:
        titles = [header.removeprefix(">") for header in self.headers]
        for line in (titles, *self.rows):
            style = "bold" if line is titles else ""
            cells = [
                cell.rjust(width) if header.startswith(">") else cell.ljust(width)
                for cell, width, header in zip(line, widths, self.headers, strict=True)
            ]
            yield Text(line[0], style, overflow="ignore", no_wrap=True)
            yield Padding(Text((" " * GAP).join(cells[1:]).rstrip(), style), (0, 0, 0, INDENT))
