"""The command `hf-v0init compare`."""

from __future__ import annotations

import contextlib
import shlex
import signal
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
    from ..comparison.planning.plan import Plan

EXIT_ALL_FAILED, EXIT_INTERRUPTED = 1, 130


def compare(
    config: Annotated[Path, typer.Argument(help="YAML file of the comparison, such as configs/compare/tiny.yaml.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the runs and the report.")],
    jobs: Annotated[int, typer.Option("--jobs", help="Runs side by side.")] = 1,
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
    --resume_runs, go on from their last checkpoint. The exit status is 0 when every run is over and at least one did not fail, 1
    when all failed, 130 when the comparison was stopped.
    """
    require_extra("compare")
    from ..comparison.planning.plan import read_plan
    from ..comparison.reading.results import FAILED
    from ..comparison.running.folder import (
        end_left_runs,
        find_waiting_runs,
        lock_folder,
        require_usable_folder,
        write_plan,
    )
    from ..comparison.running.progress import ProgressDisplay
    from ..comparison.running.runs import RunQueue

    if jobs < 1:
        raise InputError(f"jobs={jobs}: must be a whole number >= 1, the runs side by side")
    if dry_run and report_only:
        raise InputError("dry_run and report_only both start no run: give one")
    if at_step is not None and not report_only:
        raise InputError(f"at_step={at_step} is for a report on runs that are there: give report_only too")
    console = Console(highlight=False, markup=False)
    plan = read_plan(config, pocket)
    require_usable_folder(plan, output_dir)
    if dry_run:
        _print_plan(console, plan, output_dir)
        return
    if report_only:
        _report_only(console, plan, output_dir, summary_dir, at_step)
        return
    interrupted = False
    with lock_folder(output_dir), _stop_on_signals():
        left = end_left_runs(output_dir)
        num_others = write_plan(plan, output_dir)
        waiting = find_waiting_runs(plan, output_dir, retry_failed)
        _print_rules(console, plan, len(waiting), jobs)
        if left:
            console.print(f"Ended what a call that was killed had left running: {', '.join(left)}.", soft_wrap=True)
        if num_others:
            console.print(
                f"{num_others} runs in {output_dir} are not in this plan; they stay there and out of the report."
            )
        try:
            with ProgressDisplay(console, len(plan.runs), len(plan.runs) - len(waiting), jobs) as progress:
                RunQueue(plan, output_dir, waiting, jobs, progress, resume_runs).run()
        except KeyboardInterrupt:
            interrupted = True
        states = _print_outcome(console, plan, output_dir, summary_dir)
    if interrupted:
        console.print(
            "Stopped. The same command continues; runs that were cut off start anew, or with --resume_runs from their last checkpoint.",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED)
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


def _print_plan(console: Console, plan: Plan, folder: Path) -> None:
    from ..comparison.reading.results import OUTPUT_FOLDER, RUNS_FOLDER
    from ..comparison.running.launch import make_command

    table = Table("arm", "learning rate", "seed", Column("folder", overflow="fold"), title=Text(plan.title))
    for run in plan.runs:
        table.add_row(run.arm, f"{run.learning_rate:g}", str(run.seed), run.name)
    console.print(table)
    first = plan.runs[0]
    command = make_command(plan.launch, plan.script, first.arguments, folder / RUNS_FOLDER / first.name / OUTPUT_FOLDER)
    console.print(f"{len(plan.runs)} runs. The first:", soft_wrap=True)
    console.print(shlex.join(command), soft_wrap=True)


def _print_rules(console: Console, plan: Plan, num_waiting: int, jobs: int) -> None:
    console.print(Text(plan.title, style="bold"))
    num_arms, num_seeds = len({run.arm for run in plan.runs}), len({run.seed for run in plan.runs})
    lines = [
        f"{len(plan.runs)} runs ({num_arms} arms, {num_seeds} seeds), of which {len(plan.runs) - num_waiting} are over; {jobs} at a time.",
        "Same seed: same initial weights, data order and dropout in every arm; checked by a fingerprint of each run.",
        "The statistics pass is charged to v0: its samples and seconds count as training.",
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
    from ..comparison.reading.results import PENDING
    from ..comparison.running.folder import PLAN_FILE, lock_folder, read_json, read_run_record, write_plan

    if not any(read_run_record(folder, run).get("state", PENDING) != PENDING for run in plan.runs):
        raise InputError(f"{folder} holds no run of this plan: call without report_only first")
    if read_json(folder / PLAN_FILE) != plan.to_dict():
        with lock_folder(folder):
            write_plan(plan, folder)
    _print_outcome(console, plan, folder, summary_dir, at_step)


def _print_outcome(
    console: Console, plan: Plan, folder: Path, summary_dir: Path | None, at_step: int | None = None
) -> Counter[str]:
    """Count the states; write the report if a run is over or a step is asked about, and say where it is."""
    from ..comparison.reading.results import INTERRUPTED, PENDING, RUNNING
    from ..comparison.running.folder import read_run_record

    states = Counter(read_run_record(folder, run).get("state", PENDING) for run in plan.runs)
    console.print(", ".join(f"{count} {state}" for state, count in states.items()) + ".", soft_wrap=True)
    if at_step is not None or set(states) - {INTERRUPTED, PENDING, RUNNING}:
        from ..comparison.reporting.report import write_report

        console.print(f"Report: {write_report(folder, summary_dir, at_step)}", soft_wrap=True)
    return states
