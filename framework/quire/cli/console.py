"""Where the program writes: answers and tables to stdout, everything about the run to stderr."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def output() -> Console:
    """A console on stdout; made when it is needed, so that a redirected stdout is honoured."""
    return Console(highlight=False, soft_wrap=True)


def errors() -> Console:
    """A console on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A line about the run, such as which model is used."""
    errors().print(Text(text, style="dim"))


def print_error(cause: str, remedy: str) -> None:
    """One line of cause, one of remedy."""
    console = errors()
    console.print(Text.assemble(("error: ", "bold red"), " ".join(cause.split())))
    if remedy:
        console.print(Text.assemble(("  fix: ", "bold"), " ".join(remedy.split())))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; as wide as its content when stdout is no terminal, so that it can be searched."""
    console = output()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if not console.is_terminal:
        console.width = 1000
        console.print(table, crop=False, no_wrap=True)
    else:
        console.print(table, soft_wrap=False)
