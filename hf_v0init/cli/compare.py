"""The commands `hf-v0init compare` and `hf-v0init report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import InputError
from ..extras import require_extra
from .console import CONSOLE


def compare(
    config: Annotated[Path, typer.Argument(help="YAML file of the comparison, such as configs/compare/tiny.yaml.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the runs and the report.")],
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs side by side. [default: one for each GPU; 1 without]")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices", help="GPUs to use, such as 0,1, or none: one for a run of one process. [default: all]"
        ),
    ] = None,
    launcher: Annotated[
        Literal["local", "submitit", "slurm"],
        typer.Option(
            "--launcher",
            help="local; slurm: an array job over the runs, with what the file says under `slurm`; submitit: its jobs on this machine.",
        ),
    ] = "local",
    small: Annotated[
        bool,
        typer.Option("--small", help="The file's small scale: the same settings, small and short enough for a laptop."),
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry_failed", help="Start failed runs again.")] = False,
    resume_runs: Annotated[
        bool,
        typer.Option("--resume_runs", help="Go on with interrupted runs from the newest checkpoint, if there is one."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry_run", help="Print the runs and the first command, have the flags checked, and train none."),
    ] = False,
    list_commands: Annotated[
        bool,
        typer.Option("--list_commands", help="Print a command for each run that is not over, for another scheduler."),
    ] = False,
    run: Annotated[
        str | None, typer.Option("--run", help="Train this run alone, by the name of its folder; writes no report.")
    ] = None,
) -> None:
    """Tune v0, warmup, optimizer and learning rate on a grid of runs, confirm the best on fresh seeds, and report.

    A second call with the same folder continues: runs that are over are not repeated, interrupted ones start from scratch or, with
    --resume_runs, go on from their last checkpoint. Calls at the same time, on one machine or several, share the runs. The exit
    status is 0 when every run is over and at least one did not fail, 1 when all failed, 130 when the comparison was stopped.
    """
    require_extra("compare")
    from ..compare.session import Session

    if launcher != "local" and (jobs is not None or devices is not None):
        raise InputError(
            f"jobs and devices are for runs of this call; with launcher={launcher} the file's `slurm` says what a run gets"
        )
    session = Session(CONSOLE, config, output_dir, small, retry_failed, resume_runs)
    if dry_run:
        session.print_plan()
    elif list_commands:
        for line in session.list_commands():
            typer.echo(line)
    else:
        raise typer.Exit(session.train(launcher, jobs, devices) if run is None else session.train_one(run))


def report(
    folder: Annotated[
        Path, typer.Argument(help="The --output_dir of a comparison, or a copy of it in a repository (--summary_dir).")
    ],
    summary_dir: Annotated[
        Path | None,
        typer.Option("--summary_dir", help="Also a copy for a repository: plan, tables, report and figures."),
    ] = None,
) -> None:
    """Write the report on what the folder holds, also while runs go on; start no run."""
    require_extra("compare")
    from ..compare.report import write_report

    CONSOLE.print(f"Report: {write_report(folder, summary_dir)}", soft_wrap=True)
