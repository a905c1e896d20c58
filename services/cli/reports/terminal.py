"""Output to the terminal as plain text: no markup, no names of emojis, no control characters.

`Terminal` prints; `table`, `panel` and `cell` make what it prints of strings. Nothing else in the command line touches rich's
Console, Table, Panel or Text, and nothing in `services`, `learner` or `treegrpo` calls `print` but for help texts and files
that may be piped to another program (ruff: T201, TID251).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from treegrpo.observability.printable_text import printable

NARROW, WIDTH = 20, 80
Justify = Literal["left", "right"]


def cell(text: str, style: str = "") -> Text:
    """A table cell with ``text`` in one line, taken literally; ``style`` is rich's."""
    return Text(printable(text), style)


def table(headings: Sequence[tuple[str, Justify]], rows: Iterable[Sequence[str | Text]]) -> Table:
    """A table without lines around its cells, which are strings or come from `cell`."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    for heading, justify in headings:
        made.add_column(cell(heading), justify=justify)
    for row in rows:
        made.add_row(*(cell(part) if isinstance(part, str) else part for part in row))
    return made


def panel(title: str, rows: Iterable[tuple[str, str | Text]]) -> Panel:
    """A framed panel with a title and rows of name and value."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for name, value in rows:
        grid.add_row(cell(name), cell(value) if isinstance(value, str) else value)
    return Panel(grid, title=cell(title), title_align="left")


class Terminal:
    """Standard output, for people."""

    def __init__(self, file: TextIO | None = None, *, force_terminal: bool | None = None, width: int | None = None) -> None:
        """``file``: instead of standard output; the others: instead of what is detected."""
        self._console = Console(file=file, force_terminal=force_terminal, width=width, markup=False, highlight=False, emoji=False)
        if self._console.width < NARROW:  # COLUMNS of a shell that does not know
            self._console.width = WIDTH

    @property
    def is_terminal(self) -> bool:
        """Whether it is interactive, so that printed lines can be redrawn."""
        return self._console.is_terminal

    def print_line(self, line: str) -> None:
        """Print one line."""
        self._console.print(cell(line), soft_wrap=True)

    def print_renderable(self, what: Table | Panel) -> None:
        """Print a result of `table` or `panel`."""
        self._console.print(what)

    def live_display(self) -> Live:
        """A display that is redrawn in place; `print_line` goes above it."""
        return Live(console=self._console, auto_refresh=False)
