"""The command `hf-v0init report`: the report of a comparison from its folder alone, and its runs for a tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    folder: Annotated[
        Path, typer.Argument(help="The --output_dir of a comparison, or a copy that --summary_dir made.")
    ],
    at_step: Annotated[
        int | None,
        typer.Option(
            "--at_step", help="On every run as it stood after this optimizer step, into at_step_N inside the folder."
        ),
    ] = None,
    summary_dir: Annotated[
        Path | None, typer.Option("--summary_dir", help="Also a copy that is light enough for a repository.")
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            "--report_to", help="Also export the runs that have ended: tensorboard or trackio. May be repeated."
        ),
    ] = None,
) -> None:
    """Write the report on the runs that a folder holds, without the YAML file; start no run.

    `hf-v0init compare CONFIG --report_only` does so after a change of the plan.
    """
    from ..compare.reading.copies import read_runs_or_copy
    from ..compare.reporting.export import export_runs, require_destinations
    from ..compare.reporting.report import write_report

    console = Console(highlight=False, markup=False)
    require_destinations(report_to or [])
    console.print(f"Report: {write_report(folder, summary_dir, at_step)}", soft_wrap=True)
    if report_to:
        for name, number in export_runs(read_runs_or_copy(folder), report_to).items():
            console.print(f"{name}: {number} runs exported.", soft_wrap=True)


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command("report")(report)
