"""Trains the runs of a comparison on a SLURM cluster: an array job, a task for each run, by the package submitit.

A task that is preempted, or reaches its time limit, is put back into the queue and goes on from the run's newest checkpoint. Any task
may be started twice, on whatever machine: the claim on the run and its record decide what is left to do.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ...errors import InputError
from ..planning.plan import Plan, PlannedRun
from ..planning.slurm import SlurmSettings
from ..reading.results import INTERRUPTED, RUNNING
from .claims import join_folder
from .devices import list_devices
from .folder import find_waiting_runs, read_run_record
from .progress import ProgressDisplay
from .run_state import read_json, write_json
from .runs import RunQueue

if TYPE_CHECKING:
    from submitit import Executor, Job

JOBS_FOLDER, JOBS_FILE = "slurm", "jobs.json"
SECONDS_FOR_SIGNAL = 30.0


@dataclass
class TrainRun:
    """What a task of the array does; pickled by submitit.

    Attributes:
        plan: the comparison.
        folder: its folder, whole path.
        retry_failed: whether a run that has failed is tried again.
    """

    plan: Plan
    folder: Path
    retry_failed: bool = False

    def __call__(self, name: str) -> str:
        """Train the run of this name if it is not over and no other call has it; return its state."""
        state = train_one(self.plan, self.folder, name, self.retry_failed)
        if state == INTERRUPTED:
            # The scheduler has ended the script; its signal to put the task back into the queue is on the way.
            time.sleep(SECONDS_FOR_SIGNAL)
            raise RuntimeError(f"{name} was interrupted; submit it again to go on")
        return state

    def checkpoint(self, name: str):
        """Return what is to be done after the task has been put back into the queue: the same, from the last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(TrainRun(self.plan, self.folder), name)


def train_one(plan: Plan, folder: Path, name: str, retry_failed: bool = False, resume: bool = True) -> str:
    """Train one run of a plan that the folder has, unless it is over or another call has it; return its state."""
    (run,) = (run for run in plan.runs if run.name == name)
    waiting = [other for other in find_waiting_runs(plan, folder, retry_failed) if other is run]
    if waiting:
        console = Console(highlight=False, markup=False)
        with join_folder(folder), ProgressDisplay(console, 1, 0, 1) as progress:
            queue = RunQueue(plan, folder, waiting, 1, progress, resume, list_devices(plan))
            with _notice_sigterm(queue):
                queue.run()
    return read_run_record(folder, run).get("state", RUNNING)


@contextlib.contextmanager
def _notice_sigterm(queue: RunQueue) -> Iterator[None]:
    """Tell the queue when this process gets SIGTERM, which a scheduler sends to the script too: that is then no failure."""
    before = signal.getsignal(signal.SIGTERM)

    def notice(number, frame):
        queue.is_being_stopped = True
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_executor(plan: Plan, folder: Path) -> Executor:
    """Make submitit's executor with what the plan says under `slurm`.

    Raises:
        InputError: submitit is not installed, there is no SLURM here, or an option that it does not know.
    """
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise InputError("launcher=slurm needs submitit; type: pip install 'hf_v0init[cluster]'") from error
    for program in ("sbatch", "srun"):
        if not shutil.which(program):
            raise InputError(
                f"launcher=slurm: there is no {program} here; call it where SLURM is, or use --list_commands for another scheduler"
            )
    settings = plan.slurm or SlurmSettings()
    executor = SlurmExecutor(folder.resolve() / JOBS_FOLDER, max_num_timeout=settings.max_timeouts)
    executor.update_parameters(**_make_parameters(settings, plan.title))
    return executor


def _make_parameters(settings: SlurmSettings, title: str) -> dict:
    parameters = {
        "job_name": re.sub(r"\W+", "-", title)[:40].strip("-") or "compare",
        "time": settings.minutes,
        "gpus_per_node": settings.gpus or None,
        "cpus_per_task": settings.cpus,
        "mem": None if settings.memory_gb is None else f"{round(settings.memory_gb * 1024)}M",
        "setup": list(settings.setup) or None,
        "array_parallelism": settings.max_parallel,
        "additional_parameters": dict(settings.further) or None,
        "stderr_to_stdout": True,
    }
    parameters |= {name: getattr(settings, name) for name in ("partition", "account", "qos", "constraint")}
    return {name: value for name, value in parameters.items() if value is not None}


def submit_runs(
    plan: Plan, folder: Path, runs: Sequence[PlannedRun], executor: Executor, retry_failed: bool = False
) -> list[Job]:
    """Submit a task for each run, in an array if there are several, and note the jobs in `slurm/jobs.json`.

    Raises:
        InputError: SLURM refuses the job.
    """
    try:
        jobs = executor.map_array(TrainRun(plan, folder.resolve(), retry_failed), [run.name for run in runs])
    except (subprocess.CalledProcessError, RuntimeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        raise InputError(f"slurm: the job was refused: {' '.join(said.split())}") from error
    file = folder / JOBS_FOLDER / JOBS_FILE
    known = read_json(file) or {}
    write_json(file, known | {run.digest: job.job_id for run, job in zip(runs, jobs, strict=True)})
    return jobs


def find_queued(folder: Path, runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Return the job ids, by the runs' names, of tasks that SLURM has waiting or at work; none where `squeue` says nothing."""
    known = read_json(folder / JOBS_FOLDER / JOBS_FILE) or {}
    if not known or not shutil.which("squeue"):
        return {}
    answer = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=False)
    queued = set(answer.stdout.split()) if answer.returncode == 0 else set()
    return {run.name: known[run.digest] for run in runs if known.get(run.digest) in queued}
