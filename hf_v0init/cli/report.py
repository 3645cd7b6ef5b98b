"""The command `hf-v0init report`: the report of a comparison from its folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..extras import require_extra

PACKAGES = ("pandas", "scipy", "matplotlib", "jinja2", "markdown_it", "filelock", "psutil")


def require_packages() -> None:
    """Do nothing if what comparisons need is installed.

    Raises:
        MissingExtraError: it is not; the message names the `pip install` to type.
    """
    require_extra("compare", *PACKAGES)


def report(
    folder: Annotated[
        Path, typer.Argument(help="The --output_dir of a comparison, or a copy of it in a repository (--summary_dir).")
    ],
    at_step: Annotated[
        int | None,
        typer.Option(
            "--at_step", help="On every run as it stood after this optimizer step, into at_step_N inside the folder."
        ),
    ] = None,
    summary_dir: Annotated[
        Path | None,
        typer.Option("--summary_dir", help="Also a copy for a repository: plan, tables, report and figures."),
    ] = None,
) -> None:
    """Write the report on what the folder holds, without the YAML file; start no run.

    `hf-v0init compare CONFIG --report_only` does so after a change of the plan.
    """
    require_packages()
    from ..compare.report import write_report

    Console(highlight=False, markup=False).print(
        f"Report: {write_report(folder, summary_dir, at_step)}", soft_wrap=True
    )


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command("report")(report)
