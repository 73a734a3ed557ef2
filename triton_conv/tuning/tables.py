"""Tables on a terminal, and unwrapped lines of the same text in a file or a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..files import printable


def table(*headings: str) -> Table:
    """An empty one; columns whose heading starts with ">" are numbers, to the right."""
    made = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in headings:
        right = heading.startswith(">")
        made.add_column(heading.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return made


def add(to: Table, cells: Sequence[str]) -> None:
    """A row of plain text: what files hold commands no terminal."""
    to.add_row(*(Text(printable(cell)) for cell in cells))


class _Console(Console):
    def on_broken_pipe(self) -> None:  # rich would end the process, as if something were wrong
        raise  # noqa: PLE0704


def show(made: Table, spare: Sequence[str] = ()) -> None:
    """Prints a table, in lines as long as it takes where no terminal shows them or one is too narrow for its words.

    On a narrow terminal columns with these headings are left out, in their order, and a line says which.
    Raises BrokenPipeError where the reader went away.
    """
    console, left_out = _Console(), []
    if console.is_terminal:
        for heading in spare:
            if _needed(console, made).maximum <= console.width:
                break
            left_out += [heading for column in made.columns if column.header == heading]
            made.columns = [column for column in made.columns if column.header != heading]
        for column in made.columns:
            if column.no_wrap:
                column.header = str(column.header).replace(" ", "\n")
    needed = _needed(console, made)
    if not console.is_terminal or console.width < needed.minimum:  # where columns would vanish
        console.width = needed.maximum
    console.print(made, soft_wrap=console.width == needed.maximum)
    if left_out:
        print(f"a wider terminal or a pipe also shows: {', '.join(left_out)}")


def _needed(console: Console, made: Table) -> Measurement:
    return console.measure(made, options=console.options.update(width=10**4))
