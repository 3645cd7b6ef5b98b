"""The commands `hf-v0init compare` and `hf-v0init report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..extras import require_extra
from .console import CONSOLE

LAUNCHERS = LOCAL, SUBMITIT, SLURM = "local", "submitit", "slurm"
SummaryDir = Annotated[
    Path | None, typer.Option("--summary_dir", help="Also a copy for a repository: plan, tables, report and figures.")
]


def compare(
    config: Annotated[Path, typer.Argument(help="YAML file of the comparison, such as configs/compare/tiny.yaml.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the runs and the report.")],
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="Runs side by side. [default: one for each GPU; 1 without]")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            help="GPUs to use, such as 0,1, or none; a run of one process gets one of them. [default: all that are visible]",
        ),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(
            "--launcher",
            help="local; slurm: an array job over the runs, with what the file says under `slurm`; submitit: its jobs on this machine.",
        ),
    ] = LOCAL,
    small: Annotated[
        bool,
        typer.Option("--small", help="The file's small scale: the same settings, small and short enough for a laptop."),
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry_failed", help="Start failed runs again.")] = False,
    resume_runs: Annotated[
        bool,
        typer.Option(
            "--resume_runs", help="Go on with interrupted runs from their newest checkpoint, if they saved one."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry_run", help="Print the runs and the first command, and let the script check its flags; train none."
        ),
    ] = False,
    list_commands: Annotated[
        bool,
        typer.Option(
            "--list_commands",
            help="Print a command line for each run of the stage that is not over, for another scheduler.",
        ),
    ] = False,
    run: Annotated[
        str | None, typer.Option("--run", help="Train this run alone, by the name of its folder; writes no report.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report_only", help="Write the report on what the folder holds; start no run.")
    ] = False,
    at_step: Annotated[
        int | None,
        typer.Option(
            "--at_step",
            help="With report_only: on every run as it stood after this optimizer step, those under way or cut off included.",
        ),
    ] = None,
    summary_dir: SummaryDir = None,
) -> None:
    """Tune v0, warmup, optimizer and learning rate on a grid of runs, confirm the best on fresh seeds, and report.

    A second call with the same folder continues: runs that are over are not repeated, interrupted ones start from scratch or, with
    --resume_runs, go on from their last checkpoint. Calls at the same time, on one machine or several, share the runs. The exit
    status is 0 when every run is over and at least one did not fail, 1 when all failed, 130 when the comparison was stopped.
    """
    require_extra("compare")
    from ..compare.session import Session

    if jobs is not None and jobs < 1:
        raise InputError(f"jobs={jobs}: must be a whole number >= 1, the runs side by side")
    if launcher not in LAUNCHERS:
        raise InputError(
            f"launcher={launcher!r}: choose {', '.join(LAUNCHERS)}; for another scheduler there is --list_commands"
        )
    chosen = {"dry_run": dry_run, "report_only": report_only, "list_commands": list_commands, "run": run is not None}
    given = [name for name, is_given in chosen.items() if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each do something else: give one")
    if at_step is not None and not report_only:
        raise InputError(f"at_step={at_step} is for a report on runs that are there: give report_only too")
    if launcher != LOCAL and (jobs is not None or devices is not None):
        raise InputError(
            f"jobs and devices are for runs of this call; with launcher={launcher} the file's `slurm` says what a run gets"
        )
    session = Session(CONSOLE, config, output_dir, small, retry_failed, resume_runs, summary_dir)
    if dry_run:
        session.print_plan()
    elif report_only:
        session.report(at_step)
    elif list_commands:
        for line in session.list_commands():
            typer.echo(line)
    else:
        status = session.train(launcher, jobs, devices) if run is None else session.train_one(run)
        raise typer.Exit(status)


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
    summary_dir: SummaryDir = None,
) -> None:
    """Write the report on what the folder holds, without the YAML file; start no run.

    `hf-v0init compare CONFIG --report_only` does so after a change of the plan.
    """
    require_extra("compare")
    from ..compare.report import write_report

    CONSOLE.print(f"Report: {write_report(folder, summary_dir, at_step)}", soft_wrap=True)


def add_commands(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("report")(report)
    app.command("compare")(compare)
