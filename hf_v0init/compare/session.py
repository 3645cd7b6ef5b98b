"""What one call of `hf-v0init compare` does: train the stages, train one run, list commands, check flags.

| a run's record says | the next call |
| --- | --- |
| finished, diverged | keeps it |
| failed | keeps it, or repeats it with `retry_failed` |
| interrupted, running (its worker is gone), nothing | starts it from scratch in an emptied folder, or resumes it |

An interrupted run starts from scratch also if its script saves checkpoints: its clock and its curve are then those of one process.
With `resume_runs` it goes on from the newest checkpoint. A run that another worker is training is left to it (see `executor`).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from . import files
from .axes import suggest
from .cluster import SubmititExecutor
from .comparison_file import read_plan
from .executor import LocalExecutor, lock_plan, read_record, stop_on_signals
from .launch import SCRIPT_MODULES, STARTER, choose_jobs, list_devices, make_command, make_flags
from .plan import Plan, PlannedRun
from .progress import ProgressDisplay
from .report import read_conclusion, write_report
from .results import read_comparison
from .stages import lay_out_stages

SECONDS_FOR_SIGNAL = 30.0
EXIT_OK, EXIT_ALL_FAILED, EXIT_INTERRUPTED = 0, 1, 130
PARSERS = re.compile(r"^\s*(import|from)\b.*\b(HfArgumentParser|argparse)\b", re.MULTILINE)


def require_usable_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a comparison. Changes nothing.

    Raises:
        InputError: it has files, but no plan.
    """
    is_used = folder.is_dir() and {file.name for file in folder.iterdir()} - {files.LOCKS_FOLDER}
    if is_used and files.read_json(folder / files.PLAN_FILE) is None:
        raise InputError(f"output_dir={folder} is not empty and holds no comparison; give another --output_dir")


def update_plan(
    plan: Plan, folder: Path, retry_failed: bool = False, only: str | None = None
) -> tuple[Plan, list[PlannedRun]]:
    """Write the plan with all runs that are known by now; return it, and those to be trained next.

    With `retry_failed` runs that failed (or `only` the one of this name) are started again, as such that were interrupted.
    """
    with lock_plan(folder):
        for run in lay_out_stages(plan, folder)[0].runs if retry_failed else ():
            record, file = read_record(folder, run), files.find_run(folder, run.name) / files.RECORD_FILE
            if record.get("state") == files.FAILED and only in (None, run.name):
                files.write_json(file, {**record, "state": files.INTERRUPTED})
        known, runs = lay_out_stages(plan, folder)
        files.write_json(folder / files.PLAN_FILE, known.to_dict())
    return known, runs


def train_stages(
    plan: Plan, folder: Path, executor: LocalExecutor | SubmititExecutor, retry_failed: bool = False
) -> None:
    """Train what is not over, stage by stage; each run is tried once."""
    tried: set[str] = set()
    while True:
        known, runs = update_plan(plan, folder, retry_failed and not tried)
        runs = [run for run in runs if run.name not in tried]
        if not runs:
            return
        tried |= {run.name for run in runs}
        executor.progress.begin_stage(known, runs)
        executor.run(known, runs)


@dataclass
class Session:
    """One call of the command: `config` is the comparison's file, `folder` its folder; the rest are options of the command.

    Raises:
        InputError: a file that cannot be read as a comparison, or a folder that holds something else.
    """

    console: Console
    config: Path
    folder: Path
    small: bool = False
    retry_failed: bool = False
    resume_runs: bool = False
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = read_plan(self.config, self.small)
        require_usable_folder(self.folder)

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, launcher: str = "local", jobs: int | None = None, devices: str | None = None) -> int:
        """Train both stages and report; return the exit status."""
        plan, folder = self.plan, self.folder
        found = list_devices(plan, devices) if launcher == "local" else None
        at_once = (
            choose_jobs(plan, found) if launcher == "local" else plan.slurm.get("array_parallelism", len(plan.runs))
        )
        jobs = jobs or at_once
        was_stopped = False
        with stop_on_signals():
            self.console.print(Text(plan.title, style="bold"))
            self._tell(f"Runs at a time: {jobs}" + (f", on device {', '.join(found)}" if found else "") + ".")
            try:
                with ProgressDisplay(self.console, jobs) as progress:
                    if launcher == "local":
                        executor = LocalExecutor(folder, jobs, progress, found, self.resume_runs)
                    else:
                        task = TrainRun(self.config.resolve(), folder.resolve(), self.small)
                        executor = SubmititExecutor(plan, task, progress, launcher)
                    train_stages(plan, folder, executor, self.retry_failed)
            except KeyboardInterrupt:
                was_stopped = True
            update_plan(plan, folder)
            with lock_plan(folder):  # another worker may be writing its report
                states = self._print_outcome()
        if was_stopped:
            words = "its runs" if launcher == "local" else "but jobs that were submitted stay in the queue"
            self._tell(
                f"Stopped, {words}. The same command continues: runs that were cut off start from scratch, or with --resume_runs from "
                "their last checkpoint."
            )
            return EXIT_INTERRUPTED
        return EXIT_ALL_FAILED if states == {files.FAILED} else EXIT_OK

    def train_one(self, name: str) -> int:
        """Train one run, as a scheduler's job; return the exit status."""
        runs = {run.name: run for run in lay_out_stages(self.plan, self.folder)[0].runs}
        if name not in runs:
            raise InputError(f"run={name}: the plan has no such run{suggest(name, runs)}; --list_commands lists them")
        plan, _ = update_plan(self.plan, self.folder, self.retry_failed, only=name)
        with ProgressDisplay(self.console, 1) as progress, stop_on_signals(), contextlib.suppress(KeyboardInterrupt):
            executor = LocalExecutor(self.folder, 1, progress, list_devices(plan), self.resume_runs)
            executor.run(plan, [runs[name]])
        state = read_record(self.folder, runs[name]).get("state", files.RUNNING)
        self._tell(f"{name}: {state}.")
        return {files.INTERRUPTED: EXIT_INTERRUPTED, files.FAILED: EXIT_ALL_FAILED}.get(state, EXIT_OK)

    def list_commands(self) -> list[str]:
        """List a command line for each run of the stage that is not over.

        A line works from any directory, and goes back to this one, where the paths in the file begin.
        """
        plan, runs = lay_out_stages(self.plan, self.folder)
        if self.retry_failed:
            runs += [known for known in plan.runs if read_record(self.folder, known).get("state") == files.FAILED]
        program = [sys.executable, "-m", "hf_v0init.cli.main", "compare", str(self.config.resolve())]
        program += ["--output_dir", str(self.folder.resolve())]
        options = ["--resume_runs", *["--small"] * self.small, *["--retry_failed"] * self.retry_failed]
        here = shlex.quote(str(Path.cwd()))
        return [f"cd {here} && {shlex.join([*program, '--run', run.name, *options])}" for run in runs]

    # ---- without training ----------------------------------------------------------------------------------------

    def print_plan(self) -> None:
        """Print the runs of the first stage and the first command, and have the script check the flags of each setting.

        Raises:
            InputError: the script refuses some.
        """
        plan, first = self.plan, self.plan.runs[0]
        table = Table("setting", "family", "learning rate", "seed", title=Text(plan.title))
        for run in plan.runs:
            table.add_row(run.setting, run.family, f"{run.learning_rate:g}", str(run.seed))
        self.console.print(table)
        num_later = len({(run.condition, run.family) for run in plan.list_runs(files.TUNE)}) * len(plan.confirm_seeds)
        seeds = ", ".join(map(str, plan.confirm_seeds))
        later = f", then at most {num_later} to confirm on seeds {seeds}" if num_later else ""
        output = self.folder / files.RUNS_FOLDER / first.name / files.OUTPUT_FOLDER
        self._tell(f"{len(plan.runs)} {'run' if len(plan.runs) == 1 else 'runs'}{later}. The first:")
        self._tell(shlex.join(make_command(plan.launch, plan.script, first.arguments, output)))
        self._check_flags()

    def _check_flags(self) -> None:
        """Start the script once and let it read the flags of one run of each setting and rate; nothing is trained."""
        plan = self.plan
        if plan.script not in SCRIPT_MODULES and not PARSERS.search(Path(plan.script).read_text(encoding="utf-8")):
            self._tell("The script's flags were not checked: it uses neither HfArgumentParser nor argparse.")
            return
        runs = list({(run.setting, run.learning_rate): run for run in plan.runs}.values())
        with tempfile.TemporaryDirectory() as place:  # for what a script writes before it has read all of its flags
            fixed = {"output_dir": f"{place}/output", "v0_record_run": True}
            given = json.dumps([make_flags({**run.arguments, **fixed}) for run in runs])
            command = [sys.executable, "-m", STARTER, "--check", plan.script]
            answer = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        said = [json.loads(line) for line in answer.stdout.splitlines() if line == "null" or line.startswith('"')]
        if len(said) < len(runs):
            words = (answer.stderr.strip().splitlines() or ["no word"])[-1]
            raise InputError(f"the script could not be started: {words}")
        refused = [(run, words) for run, words in zip(runs, said, strict=True) if words]
        if refused:
            run, words = refused[0]
            raise InputError(
                f"the script refuses the flags of {len(refused)} of {len(runs)} settings; {run.setting}: {words}"
            )
        self._tell(f"The script accepts the flags of all {len(runs)} settings.")

    # ---- printing ------------------------------------------------------------------------------------------------

    def _tell(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def _print_outcome(self) -> set[str]:
        """Write the report if a run is over, print what it concludes, and return the states of the runs."""
        states = list(read_comparison(self.folder).runs["state"])
        self._tell(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) + ".")
        if set(states) & {*files.COUNTED, files.FAILED}:
            report = write_report(self.folder)
            self._tell(f"\n{read_conclusion(report.parent)}\n")
            self._tell(f"Report: {report}")
        return set(states)


@dataclass
class TrainRun:
    """What a task of `SubmititExecutor` does; pickled. It reads the comparison's file itself, so no secret of it is written anywhere."""

    config: Path
    folder: Path
    small: bool = False

    def __call__(self, name: str) -> None:
        """Train the run of this name if it is not over and no other worker has it."""
        console = Console(highlight=False, markup=False)
        status = Session(console, self.config, self.folder, self.small, resume_runs=True).train_one(name)
        if status == EXIT_INTERRUPTED:
            # The scheduler has ended the script; its signal to put the task back into the queue is on the way.
            time.sleep(SECONDS_FOR_SIGNAL)
            raise RuntimeError(f"{name} was interrupted; submit it again to go on")

    def checkpoint(self, name: str):
        """Return what is to be done after the task has been put back into the queue: the same, from the last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, name)
