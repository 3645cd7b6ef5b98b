"""The command `hf-v0init compare`."""

from __future__ import annotations

import contextlib
import shlex
import signal
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
from ..extras import require_extra

if TYPE_CHECKING:
    from ..compare.planning.plan import Plan
    from ..compare.running.runs import RunQueue

EXIT_ALL_FAILED, EXIT_INTERRUPTED = 1, 130
LAUNCHERS = LOCAL, SLURM = "local", "slurm"


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
            "--launcher", help="local, or slurm: an array job over the runs, with what the file says under `slurm`."
        ),
    ] = LOCAL,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving", help="Successive halving: only the better half of each family of arms gets the next seed."
        ),
    ] = False,
    pocket: Annotated[
        bool,
        typer.Option("--pocket", help="The file's pocket scale: the same arms, small and short enough for a laptop."),
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry_failed", help="Start failed runs again.")] = False,
    resume_runs: Annotated[
        bool,
        typer.Option(
            "--resume_runs", help="Go on with interrupted runs from their newest whole checkpoint, if they saved one."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Print the runs and the first command; start none.")
    ] = False,
    list_commands: Annotated[
        bool,
        typer.Option(
            "--list_commands",
            help="Print a command line for each run that is not over, for another scheduler; start none.",
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
        typer.Option(
            "--summary_dir",
            help="Also a copy of the report that is light enough for a repository: tables, three figures.",
        ),
    ] = None,
) -> None:
    """Train a grid of runs (v0 x warmup x optimizer x learning rate x seed) and report whether v0 beats the warmup.

    A second call with the same folder continues: runs that are over are not repeated, interrupted ones start anew or, with
    --resume_runs, go on from their last checkpoint. Calls at the same time, on one machine or several, share the runs. The exit
    status is 0 when every run is over and at least one did not fail, 1 when all failed, 130 when the comparison was stopped.
    """
    require_extra("compare")
    from ..compare.planning.plan import read_plan
    from ..compare.reading.results import FAILED
    from ..compare.running.devices import choose_jobs, list_devices
    from ..compare.running.folder import require_usable_folder

    if jobs is not None and jobs < 1:
        raise InputError(f"jobs={jobs}: must be a whole number >= 1, the runs side by side")
    if launcher not in LAUNCHERS:
        raise InputError(
            f"launcher={launcher!r}: choose {' or '.join(LAUNCHERS)}; for another scheduler there is --list_commands"
        )
    chosen = {"dry_run": dry_run, "report_only": report_only, "list_commands": list_commands, "run": run is not None}
    given = [name for name, is_given in chosen.items() if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each do something else: give one")
    if at_step is not None and not report_only:
        raise InputError(f"at_step={at_step} is for a report on runs that are there: give report_only too")
    if launcher == SLURM and (jobs is not None or devices is not None):
        raise InputError(
            "jobs and devices are for runs on this machine; with launcher=slurm the file's `slurm` says what a run gets"
        )
    if halving and (list_commands or run is not None):
        raise InputError("halving decides seed by seed what is trained: leave it out with list_commands and run")
    console = Console(highlight=False, markup=False)
    plan = read_plan(config, pocket)
    require_usable_folder(plan, output_dir)
    if dry_run:
        _print_plan(console, plan, output_dir)
    elif report_only:
        _report_only(console, plan, output_dir, summary_dir, at_step)
    elif list_commands:
        _list_commands(plan, config, output_dir, pocket, retry_failed)
    elif run is not None:
        _train_one(console, plan, output_dir, run, retry_failed, resume_runs)
    elif launcher == SLURM:
        _submit(console, plan, output_dir, retry_failed, halving)
    else:
        found = list_devices(plan, devices)
        number = jobs or choose_jobs(plan, found)
        states = _train(console, plan, output_dir, summary_dir, number, found, retry_failed, resume_runs, halving)
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


def _train(
    console: Console,
    plan: Plan,
    folder: Path,
    summary_dir: Path | None,
    jobs: int,
    devices: tuple[str, ...] | None,
    retry_failed: bool,
    resume_runs: bool,
    halving: bool,
) -> Counter[str]:
    """Train what is not over, on this machine; return the states of the runs."""
    from ..compare.running.claims import join_folder, list_calls, lock_plan
    from ..compare.running.folder import find_waiting_runs, write_plan
    from ..compare.running.progress import ProgressDisplay
    from ..compare.running.runs import RunQueue

    interrupted, elsewhere = False, []
    with _stop_on_signals():
        with lock_plan(folder):
            num_others = write_plan(plan, folder)
        with join_folder(folder):
            waiting = find_waiting_runs(plan, folder, retry_failed)
            _print_rules(console, plan, len(waiting), jobs, devices)
            _print_others(console, folder, num_others, list_calls(folder))
            try:
                with ProgressDisplay(console, len(plan.runs), len(plan.runs) - len(waiting), jobs) as progress:
                    queue = RunQueue(plan, folder, waiting, jobs, progress, resume_runs, devices, halving)
                    queue.run()
                    elsewhere = queue.list_elsewhere()
            except KeyboardInterrupt:
                interrupted = True
            if halving and not interrupted:
                _print_halving(console, plan, queue)
        with lock_plan(folder):  # another call may be writing its report
            states = _print_outcome(console, plan, folder, summary_dir)
    if interrupted:
        console.print(
            "Stopped. The same command continues; runs that were cut off start anew, or with --resume_runs from their last checkpoint.",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    if elsewhere:
        console.print(
            f"Under way in other calls: {', '.join(elsewhere)}. The last to end reports on all.", soft_wrap=True
        )
    return states


def _count_runs(number: int) -> str:
    return f"{number} run" + ("" if number == 1 else "s")


def _print_others(console: Console, folder: Path, num_others: int, calls: list[str]) -> None:
    if calls:
        console.print(
            f"At work in {folder} too: {', '.join(calls)}. Each run is trained by one of the calls.", soft_wrap=True
        )
    if num_others:
        console.print(f"{num_others} runs in {folder} are not in this plan; they stay there and out of the report.")


def _print_halving(console: Console, plan: Plan, queue: RunQueue) -> None:
    from ..compare.planning.halving import select_runs

    selection = select_runs(plan.runs, queue.scores)
    console.print(
        f"Halving: {len(selection.over)} of {len(plan.runs)} runs were trained; {len(selection.dropped)} of arms and rates in the worse "
        "half of their family were left out. Without --halving the same command trains them too.",
        soft_wrap=True,
    )


def _find_run(plan: Plan, name: str) -> str:
    from ..compare.planning.axes import suggest

    names = [run.name for run in plan.runs]
    if name not in names:
        raise InputError(f"run={name}: the plan has no such run{suggest(name, names)}; --dry_run lists them")
    return name


def _train_one(console: Console, plan: Plan, folder: Path, name: str, retry_failed: bool, resume_runs: bool) -> None:
    """Train one run, as a scheduler's job."""
    from ..compare.reading.results import FAILED, INTERRUPTED
    from ..compare.running.claims import lock_plan
    from ..compare.running.folder import write_plan
    from ..compare.running.slurm import train_one

    _find_run(plan, name)
    with _stop_on_signals():
        with lock_plan(folder):
            write_plan(plan, folder)
        try:
            state = train_one(plan, folder, name, retry_failed, resume_runs)
        except KeyboardInterrupt:
            state = INTERRUPTED
    console.print(f"{name}: {state}.", soft_wrap=True)
    if state == INTERRUPTED:
        raise typer.Exit(EXIT_INTERRUPTED)
    if state == FAILED:
        raise typer.Exit(EXIT_ALL_FAILED)


def _list_commands(plan: Plan, config: Path, folder: Path, pocket: bool, retry_failed: bool) -> None:
    """Print a line for each run that is not over; nothing else, so that it can be piped."""
    from ..compare.running.folder import find_waiting_runs

    options = ["--pocket"] * pocket + ["--retry_failed"] * retry_failed
    program = [sys.executable, "-m", "hf_v0init.cli.main", "compare", str(config), "--output_dir", str(folder)]
    for waiting in find_waiting_runs(plan, folder, retry_failed):
        print(shlex.join([*program, "--run", waiting.name, "--resume_runs", *options]))


def _submit(console: Console, plan: Plan, folder: Path, retry_failed: bool, halving: bool) -> None:
    """Submit the runs that are not over and not in SLURM's queue."""
    from ..compare.planning.halving import select_runs
    from ..compare.running.claims import lock_plan
    from ..compare.running.folder import find_waiting_runs, write_plan
    from ..compare.running.runs import read_scores
    from ..compare.running.slurm import find_queued, make_executor, submit_runs

    executor = make_executor(plan, folder)
    with lock_plan(folder):
        write_plan(plan, folder)
        waiting = find_waiting_runs(plan, folder, retry_failed)
        queued = find_queued(folder, waiting)
        if halving:
            now = {chosen.name for chosen in select_runs(plan.runs, read_scores(plan, folder, waiting)).now}
            waiting = [chosen for chosen in waiting if chosen.name in now]
        new = [chosen for chosen in waiting if chosen.name not in queued]
        if plan.arguments.get("save_strategy") == "no":
            console.print(
                "Note: save_strategy is no, so a run that is preempted or reaches its time limit starts anew. Give save_strategy: steps "
                "and save_steps in `arguments`.",
                soft_wrap=True,
            )
        jobs = submit_runs(plan, folder, new, executor, retry_failed) if new else []
    if jobs:
        first = jobs[0].job_id.split("_")[0]
        console.print(f"Submitted {_count_runs(len(jobs))} as job {first}; logs in {executor.folder}.", soft_wrap=True)
    else:
        console.print("Nothing to submit.")
    if queued:
        console.print(f"{_count_runs(len(queued))} {'is' if len(queued) == 1 else 'are'} in the queue already.")
    if halving and waiting:
        console.print("When they are over, the same command submits what halving leaves of the next seed.")
    console.print(
        "The same command with --report_only instead of --launcher writes the report at any time.", soft_wrap=True
    )


def _print_plan(console: Console, plan: Plan, folder: Path) -> None:
    from ..compare.reading.results import OUTPUT_FOLDER, RUNS_FOLDER
    from ..compare.running.launch import make_command

    table = Table("arm", "learning rate", "seed", Column("folder", overflow="fold"), title=Text(plan.title))
    for run in plan.runs:
        table.add_row(run.arm, f"{run.learning_rate:g}", str(run.seed), run.name)
    console.print(table)
    first = plan.runs[0]
    command = make_command(plan.launch, plan.script, first.arguments, folder / RUNS_FOLDER / first.name / OUTPUT_FOLDER)
    console.print(f"{len(plan.runs)} runs. The first:", soft_wrap=True)
    console.print(shlex.join(command), soft_wrap=True)


def _print_rules(console: Console, plan: Plan, num_waiting: int, jobs: int, devices: tuple[str, ...] | None) -> None:
    console.print(Text(plan.title, style="bold"))
    num_arms, num_seeds = len({run.arm for run in plan.runs}), len({run.seed for run in plan.runs})
    on = f", on device {', '.join(devices)}" if devices else ""
    lines = [
        f"{len(plan.runs)} runs ({num_arms} arms, {num_seeds} seeds), of which {len(plan.runs) - num_waiting} are over; {jobs} at a time{on}.",
        "Same seed: same initial weights, data order and dropout in every arm; checked by a fingerprint of each run.",
        "What v0 cost is charged to it: samples and seconds of a pass before training count as training.",
        f"Selection by {plan.metric}, on validation data; test data are used once, at the end of a run.",
    ]
    if plan.stop_hopeless:
        rule = plan.stop_hopeless
        lines.append(
            f"Stopped early: a validation loss above {rule.above:g} x the best at that step, from step {rule.after_step} on."
        )
    if not plan.keep_models:
        lines.append("Models, tokenizers and checkpoints of runs that are over are removed (keep_models: false).")
    schedules = {str(run.arguments.get("lr_scheduler_type")) for run in plan.runs}
    if "inverse_sqrt" in schedules and len({run.warmup for run in plan.runs}) > 1:
        lines.append(
            "Note: inverse_sqrt takes its decay from the length of the warmup, so arms differ after it too, unless "
            "lr_scheduler_kwargs has a timescale."
        )
    for line in lines:
        console.print(line, soft_wrap=True)


def _report_only(console: Console, plan: Plan, folder: Path, summary_dir: Path | None, at_step: int | None) -> None:
    """Write the report on the runs that are there, those going on included.

    A plan that differs from the folder's takes its place, but not while another call is at work there.
    """
    from ..compare.reading.results import PENDING
    from ..compare.running.claims import lock_plan
    from ..compare.running.folder import PLAN_FILE, read_json, read_run_record, write_plan

    if not any(read_run_record(folder, run).get("state", PENDING) != PENDING for run in plan.runs):
        raise InputError(f"{folder} holds no run of this plan: call without report_only first")
    with lock_plan(folder):
        if read_json(folder / PLAN_FILE) != plan.to_dict():
            write_plan(plan, folder)
        _print_outcome(console, plan, folder, summary_dir, at_step)


def _print_outcome(
    console: Console, plan: Plan, folder: Path, summary_dir: Path | None, at_step: int | None = None
) -> Counter[str]:
    """Count the states; write the report if a run is over or a step is asked about, and say where it is."""
    from ..compare.reading.results import INTERRUPTED, PENDING, RUNNING
    from ..compare.running.folder import read_run_record

    states = Counter(read_run_record(folder, run).get("state", PENDING) for run in plan.runs)
    console.print(", ".join(f"{count} {state}" for state, count in states.items()) + ".", soft_wrap=True)
    if at_step is not None or set(states) - {INTERRUPTED, PENDING, RUNNING}:
        from ..compare.reporting.report import write_report

        console.print(f"Report: {write_report(folder, summary_dir, at_step)}", soft_wrap=True)
    return states
