"""Where the commands write to: `CONSOLE` for tables and text, `typer.echo` for what is piped or read by programs."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

CONSOLE = Console(highlight=False, markup=False)
EXIT_BAD_INPUT = 2


def exit_with_error(message: str) -> NoReturn:
    """End the program over bad input: one line on stderr, exit status 2."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise SystemExit(EXIT_BAD_INPUT)
