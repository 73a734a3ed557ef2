"""Tables on a terminal, and unwrapped lines of the same text in a file or a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(*headings: str) -> Table:
    """An empty one; columns whose heading starts with ">" are numbers, to the right."""
    made = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in headings:
        right = heading.startswith(">")
        made.add_column(heading.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return made


def add(to: Table, cells: Sequence[str]) -> None:
    """A row of plain text: what files hold commands no terminal."""
    to.add_row(*(Text("".join(c if c.isprintable() else "?" for c in cell)) for cell in cells))


def show(made: Table) -> None:
    """Prints a table, in lines as long as it takes where no terminal shows them or one is too narrow for its words."""
    console = Console()
    if console.is_terminal:
        for column in made.columns:
            if column.no_wrap:
                column.header = str(column.header).replace(" ", "\n")
    needed = console.measure(made, options=console.options.update(width=10**4))
    if not console.is_terminal or console.width < needed.minimum:  # where columns would vanish
        console.width = needed.maximum
    console.print(made, soft_wrap=console.width == needed.maximum)
