"""The command `hf-v0init compare`."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..errors import InputError
from .report import require_packages

if TYPE_CHECKING:
    from ..compare.plan import Plan

EXIT_ALL_FAILED, EXIT_INTERRUPTED = 1, 130
LAUNCHERS = LOCAL, SUBMITIT, SLURM = "local", "submitit", "slurm"


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
    summary_dir: Annotated[
        Path | None,
        typer.Option("--summary_dir", help="Also a copy for a repository: plan, tables, report and figures."),
    ] = None,
) -> None:
    """Tune v0, warmup, optimizer and learning rate on a grid of runs, confirm the best on fresh seeds, and report.

    A second call with the same folder continues: runs that are over are not repeated, interrupted ones start from scratch or, with
    --resume_runs, go on from their last checkpoint. Calls at the same time, on one machine or several, share the runs. The exit
    status is 0 when every run is over and at least one did not fail, 1 when all failed, 130 when the comparison was stopped.
    """
    require_packages()
    from ..compare.files import FAILED
    from ..compare.folder import require_usable_folder
    from ..compare.plan import read_plan

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
    console = Console(highlight=False, markup=False)
    plan = read_plan(config, small)
    require_usable_folder(plan, output_dir)
    if dry_run:
        _print_plan(console, plan, output_dir)
    elif report_only:
        _report_only(console, plan, output_dir, summary_dir, at_step)
    elif list_commands:
        _list_commands(plan, config, output_dir, small, retry_failed)
    elif run is not None:
        _train_one(console, plan, output_dir, run, retry_failed, resume_runs)
    else:
        states = _train(
            console, plan, config, output_dir, summary_dir, jobs, devices, launcher, small, retry_failed, resume_runs
        )
        if set(states) == {FAILED}:
            raise typer.Exit(EXIT_ALL_FAILED)


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command("compare")(compare)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal as Ctrl-C. Signals that are ignored (nohup, a script's `&`) stay so.

    But runs would inherit an ignored SIGINT and not stop; a handler that does nothing is not inherited.
    """

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, old in before.items():
            if old is not signal.SIG_IGN:
                signal.signal(number, interrupt)
            elif number == signal.SIGINT:
                signal.signal(number, lambda number, frame: None)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# --------------------------------------------------------------------------------------------------------- training


def _train(
    console: Console,
    plan: Plan,
    config: Path,
    folder: Path,
    summary_dir: Path | None,
    jobs: int | None,
    devices: str | None,
    launcher: str,
    small: bool,
    retry_failed: bool,
    resume_runs: bool,
) -> Counter[str]:
    """Train what is not over, stage by stage; return the states of the runs."""
    from ..compare.claims import join_folder, list_workers, lock_plan
    from ..compare.cluster import SubmititExecutor
    from ..compare.executor import LocalExecutor
    from ..compare.folder import release_failed, write_plan
    from ..compare.launch import choose_jobs, list_devices
    from ..compare.progress import ProgressDisplay
    from ..compare.stages import lay_out_stages

    found = list_devices(plan, devices) if launcher == LOCAL else None
    number = jobs or choose_jobs(plan, found)
    interrupted, tried = False, set()
    with _stop_on_signals():
        _print_rules(console, plan, number, found)
        with lock_plan(folder):  # makes the folder
            pass
        with join_folder(folder):
            others = list_workers(folder)
            if others:
                console.print(
                    f"At work in {folder} too: {', '.join(others)}. Each run is trained by one worker.", soft_wrap=True
                )
            try:
                with ProgressDisplay(console, number) as progress:
                    if launcher == LOCAL:
                        executor = LocalExecutor(plan, folder, number, progress, found, resume_runs)
                    else:
                        cluster = SLURM if launcher == SLURM else LOCAL
                        executor = SubmititExecutor(plan, folder, config, progress, cluster, small)
                    while True:
                        with lock_plan(folder):
                            if retry_failed and not tried:
                                release_failed(lay_out_stages(plan, folder)[0], folder)
                            known, runs = lay_out_stages(plan, folder)
                            num_others = write_plan(known, folder)
                        runs = [run for run in runs if run.name not in tried]
                        if num_others and not tried:
                            progress.tell(
                                f"{num_others} runs in {folder} are not in this plan; they stay there and out of the report."
                            )
                        if not runs:
                            break
                        tried |= {run.name for run in runs}
                        progress.begin_stage(known, runs)
                        executor.run(known, runs)
            except KeyboardInterrupt:
                interrupted = True
        with lock_plan(folder):  # another worker may be writing its report
            states = _print_outcome(console, folder, summary_dir)
    if interrupted:
        words = "leaves submitted jobs in the queue" if launcher != LOCAL else "stopped its runs"
        console.print(
            f"Stopped; this {words}. The same command continues: runs that were cut off start from scratch, or with --resume_runs from "
            "their last checkpoint.",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    return states


def _train_one(console: Console, plan: Plan, folder: Path, name: str, retry_failed: bool, resume_runs: bool) -> None:
    """Train one run, as a scheduler's job."""
    from ..compare.axes import suggest
    from ..compare.claims import lock_plan
    from ..compare.cluster import train_one
    from ..compare.files import FAILED, INTERRUPTED
    from ..compare.folder import release_failed, write_plan
    from ..compare.stages import lay_out_stages

    plan, _ = lay_out_stages(plan, folder)
    names = [run.name for run in plan.runs]
    if name not in names:
        raise InputError(f"run={name}: the plan has no such run{suggest(name, names)}; --list_commands lists them")
    with _stop_on_signals():
        with lock_plan(folder):
            if retry_failed:
                release_failed(plan, folder)
            write_plan(plan, folder)
        try:
            state = train_one(plan, folder, name, resume_runs)
        except KeyboardInterrupt:
            state = INTERRUPTED
    console.print(f"{name}: {state}.", soft_wrap=True)
    if state in (INTERRUPTED, FAILED):
        raise typer.Exit(EXIT_INTERRUPTED if state == INTERRUPTED else EXIT_ALL_FAILED)


def _list_commands(plan: Plan, config: Path, folder: Path, small: bool, retry_failed: bool) -> None:
    """Print a line for each run of the stage that is not over; nothing else, so that it can be piped.

    A line works from any directory, and goes back to this one, where the paths in the file begin.
    """
    from ..compare.executor import read_record
    from ..compare.files import FAILED
    from ..compare.stages import lay_out_stages

    plan, runs = lay_out_stages(plan, folder)
    if retry_failed:
        runs += [known for known in plan.runs if read_record(folder, known).get("state") == FAILED]
    options = ["--small"] * small + ["--retry_failed"] * retry_failed
    program = [sys.executable, "-m", "hf_v0init.cli.main", "compare", str(config.resolve())]
    program += ["--output_dir", str(folder.resolve())]
    for waiting in runs:
        print(
            f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join([*program, '--run', waiting.name, '--resume_runs', *options])}"
        )


# ---------------------------------------------------------------------------------------------------------- printing


def _print_rules(console: Console, plan: Plan, jobs: int, devices: tuple[str, ...] | None) -> None:
    console.print(Text(plan.title, style="bold"))
    lines = [
        f"Runs at a time: {jobs}" + (f", on device {', '.join(devices)}" if devices else "") + ".",
        f"Selection by {plan.metric}, on validation data; verdicts from fresh seeds; test data are used once, at the end of a run.",
    ]
    if not plan.keep_models:
        lines.append("Models, tokenizers and checkpoints of runs that are over are removed (keep_models: false).")
    schedules = {str(run.arguments.get("lr_scheduler_type")) for run in plan.runs}
    if "inverse_sqrt" in schedules and len({run.warmup for run in plan.runs}) > 1:
        lines.append(
            "Note: inverse_sqrt takes its decay from the length of the warmup, so settings differ after it too, unless "
            "lr_scheduler_kwargs has a timescale."
        )
    for line in lines:
        console.print(line, soft_wrap=True)


def _print_plan(console: Console, plan: Plan, folder: Path) -> None:
    """Print the runs of the first stage and the first command, and have the script check the flags of each setting.

    Raises:
        InputError: the script refuses some.
    """
    from ..compare.files import OUTPUT_FOLDER, RUNS_FOLDER, TUNE
    from ..compare.launch import make_command

    table = Table(
        "setting", "family", "learning rate", "seed", Column("folder", overflow="fold"), title=Text(plan.title)
    )
    for run in plan.runs:
        table.add_row(run.setting, run.family, f"{run.learning_rate:g}", str(run.seed), run.name)
    console.print(table)
    first = plan.runs[0]
    command = make_command(plan.launch, plan.script, first.arguments, folder / RUNS_FOLDER / first.name / OUTPUT_FOLDER)
    num_later = len({(run.condition, run.family) for run in plan.list_runs(TUNE)}) * len(plan.confirm_seeds)
    later = (
        f", then at most {num_later} to confirm on seeds {', '.join(map(str, plan.confirm_seeds))}" if num_later else ""
    )
    console.print(f"{len(plan.runs)} runs{later}. The first:", soft_wrap=True)
    console.print(shlex.join(command), soft_wrap=True)
    _check_flags(console, plan)


def _check_flags(console: Console, plan: Plan) -> None:
    """Start the script once and let it read the flags of one run of each setting and rate; nothing is trained."""
    from ..compare.launch import SCRIPT_MODULES, STARTER, make_flags

    parsers = r"^\s*(import|from)\b.*\b(HfArgumentParser|argparse)\b"
    if plan.script not in SCRIPT_MODULES and not re.search(
        parsers, Path(plan.script).read_text(encoding="utf-8"), re.MULTILINE
    ):
        words = "The script's flags were not checked: it uses neither HfArgumentParser nor argparse."
        console.print(words, soft_wrap=True)
        return
    runs = list({(run.setting, run.learning_rate): run for run in plan.runs}.values())
    fixed = {"output_dir": "dry_run", "v0_record_run": True}
    given = json.dumps([make_flags({**run.arguments, **fixed}) for run in runs])
    command = [sys.executable, "-m", STARTER, "--check", plan.script]
    answer = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in answer.stdout.splitlines() if line == "null" or line.startswith('"')]
    if len(said) < len(runs):
        raise InputError(f"the script could not be started: {(answer.stderr.strip().splitlines() or ['no word'])[-1]}")
    refused = [(run, words) for run, words in zip(runs, said, strict=True) if words]
    if refused:
        run, words = refused[0]
        raise InputError(
            f"the script refuses the flags of {len(refused)} of {len(runs)} settings; {run.setting}: {words}"
        )
    console.print(f"The script accepts the flags of all {len(runs)} settings.")


def _report_only(console: Console, plan: Plan, folder: Path, summary_dir: Path | None, at_step: int | None) -> None:
    """Write the report on the runs that are there, those going on included.

    A plan that differs from the folder's takes its place, but not while another worker is at work there.
    """
    from ..compare.claims import lock_plan
    from ..compare.executor import read_record
    from ..compare.files import PLAN_FILE, read_json
    from ..compare.folder import write_plan
    from ..compare.stages import lay_out_stages

    plan, _ = lay_out_stages(plan, folder)
    if not any(read_record(folder, run) for run in plan.runs):
        raise InputError(f"{folder} holds no run of this plan: call without report_only first")
    with lock_plan(folder):
        if read_json(folder / PLAN_FILE) != plan.to_dict():
            write_plan(plan, folder)
        _print_outcome(console, folder, summary_dir, at_step)


def _print_outcome(
    console: Console, folder: Path, summary_dir: Path | None, at_step: int | None = None
) -> Counter[str]:
    """Count the states; write the report if a run is over or a step is asked about, and print what it concludes."""
    from ..compare.files import COUNTED, FAILED
    from ..compare.report import read_conclusion, write_report
    from ..compare.results import read_comparison

    states = Counter(read_comparison(folder).runs["state"])
    console.print(", ".join(f"{count} {state}" for state, count in states.items()) + ".", soft_wrap=True)
    if at_step is not None or set(states) & {*COUNTED, FAILED}:
        report = write_report(folder, summary_dir, at_step)
        console.print(f"\n{read_conclusion(report.parent)}\n", soft_wrap=True)
        console.print(f"Report: {report}", soft_wrap=True)
    return states
