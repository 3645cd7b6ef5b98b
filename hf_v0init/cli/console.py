"""Where the commands write to: `CONSOLE` for tables and text, `typer.echo` for what is piped or read by programs."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table

CONSOLE = Console(highlight=False, markup=False)
EXIT_BAD_INPUT = 2


def make_table(*numbers: str, first: str | None = None) -> Table:
    """Make a table of columns of numbers, after a `first` one of text if there is one."""
    return Table(*([] if first is None else [first]), *(Column(heading, justify="right") for heading in numbers))


def exit_with_error(message: str) -> NoReturn:
    """End the program over bad input: one line on stderr, exit status 2."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise SystemExit(EXIT_BAD_INPUT)
