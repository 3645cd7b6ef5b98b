"""The command `hf-v0init cost`: the cost model at one's own constants. Imports neither torch nor numpy."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .cost_model import ACCELERATORS, SIZES, CostConstants, list_conclusions, make_cells, make_markdown_table
from .errors import InputError

DEFAULT_SIZES = ",".join(f"{size / 1e9:g}" for size in SIZES)
DEFAULT_ACCELERATORS = ",".join(map(str, ACCELERATORS))


def cost(billions: str, accelerators: str, markdown: bool, **values: float) -> None:
    """Print what a v0 costs on large models: the statistics pass, the random draw, the memory of the state.

    A cell is: seconds of the pass (* where moving the weights takes longer than computing), seconds of the draw, and Adam's state
    on each accelerator, to which v0 adds nothing. The formulas are at the head of hf_v0init/cost_model.py.
    """
    constants = CostConstants(**values)
    sizes = [1e9 * size for size in _read_numbers("billions", billions)]
    numbers = [int(number) for number in _read_numbers("accelerators", accelerators)]
    if markdown:
        typer.echo(make_markdown_table(constants, sizes, numbers))
        return
    console = Console(highlight=False, markup=False)
    used = Table("constant", "value", "unit", "from", title="Constants", title_justify="left")
    for one in fields(CostConstants):
        value = getattr(constants, one.name)
        source = one.metadata["source"] if value == one.default else "given"
        used.add_row(one.name, f"{value:g}", one.metadata["unit"], source)
    console.print(used)
    table = Table("parameters", title="Pass, draw, state on each of so many accelerators", title_justify="left")
    for number in numbers:
        table.add_column(f"{number:,}")
    for row in make_cells(constants, sizes, numbers):
        table.add_row(*row)
    console.print(table)
    for line in list_conclusions(constants):
        console.print(line, soft_wrap=True)


def _read_numbers(name: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise InputError(f"{name}={text}: must be numbers > 0 with commas between them, such as 1,8,64")
    return numbers


def _make_signature() -> inspect.Signature:
    """Make a flag of every constant, so that each has its help, unit and default in one place."""
    flags = {
        "billions": (str, DEFAULT_SIZES, "Parameters of the models, in billions, with commas between them."),
        "accelerators": (str, DEFAULT_ACCELERATORS, "Numbers of accelerators, with commas between them."),
        "markdown": (bool, False, "Print the table alone, as Markdown."),
    }
    for one in fields(CostConstants):
        unit = f" In {one.metadata['unit']}." if one.metadata["unit"] else ""
        flags[one.name] = (float, one.default, f"{one.metadata['help']}{unit} From: {one.metadata['source']}.")
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, typer.Option(f"--{name}", help=text)],
            )
            for name, (kind, default, text) in flags.items()
        ]
    )


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    cost.__signature__ = _make_signature()
    cost.__annotations__ = {p.name: p.annotation for p in cost.__signature__.parameters.values()}
    app.command("cost")(cost)
