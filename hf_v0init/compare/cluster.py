"""Trains runs as jobs of the package submitit: an array on SLURM, or processes of its own on this machine.

A task that is preempted, or reaches its time limit, is put back into the queue and goes on from the run's newest checkpoint. Any task
may be started twice, on whatever machine: the claim on the run and its record decide what is left to do.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .executor import is_over, read_record
from .files import LOG_FILE, OUTPUT_FOLDER, find_run
from .plan import Plan, PlannedRun
from .process import LossTrace
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from .session import TrainRun

# What a task asks for unless the file's `slurm` says otherwise: minutes until it is put back into the queue, how often that may be.
DEFAULT_OPTIONS = {"time": 60, "gpus_per_node": 1, "cpus_per_task": 8, "stderr_to_stdout": True, "max_num_timeout": 10}
POLL_SECONDS = 2.0


class SubmititExecutor:
    """Submits runs and waits for them; a call that is stopped leaves them in the queue, and the next one takes up from there.

    `task` trains a run by its name. With `submitit` as launcher, in place of `slurm`, submitit starts processes on this machine.

    Raises:
        InputError: submitit is not installed, there is no SLURM here, or an option that it does not know.
    """

    def __init__(self, plan: Plan, task: TrainRun, progress: ProgressDisplay, launcher: str) -> None:
        try:
            import submitit
        except ImportError as error:
            raise InputError(f"launcher={launcher} needs submitit; type: pip install 'hf_v0init[cluster]'") from error
        self.task, self.folder, self.progress, self.is_slurm = task, task.folder, progress, launcher == "slurm"
        place, options = self.folder / "jobs", {**DEFAULT_OPTIONS, **plan.slurm}
        if self.is_slurm:
            options["job_name"] = re.sub(r"\W+", "-", plan.title)[:40].strip("-") or "compare"
            try:
                self.executor = submitit.SlurmExecutor(place, max_num_timeout=options.pop("max_num_timeout"))
                self.executor.update_parameters(**options)
            except RuntimeError as error:  # there is no SLURM
                raise InputError(f"launcher=slurm: {error} --list_commands is for other schedulers") from error
            except (NameError, ValueError, TypeError) as error:
                raise InputError(f"slurm: {' '.join(str(error).split())}") from error
        else:
            self.executor = submitit.LocalExecutor(place)

    def run(self, plan: Plan, runs: Sequence[PlannedRun]) -> None:
        """Submit the runs that are not in the queue, and wait until all are over or their jobs have ended.

        Raises:
            InputError: SLURM refuses the job.
        """
        jobs = self._find_queued(runs)
        if jobs:
            self.progress.tell(f"{len(jobs)} runs are in the queue already.")
        jobs |= self._submit([run for run in runs if run.digest not in jobs])
        waiting = list(runs)
        while waiting:
            for run in list(waiting):
                has_ended = jobs[
                    run.digest
                ].done()  # asked first: what a job has ended with is then in the record that is read
                record, trace = read_record(self.folder, run), LossTrace()
                if is_over(record.get("state")):
                    trace.read_new(find_run(self.folder, run.name) / OUTPUT_FOLDER / LOG_FILE)
                    seconds = record.get("seconds") or 0.0
                    self.progress.report_end(run, record["state"], record.get("reason"), trace, seconds)
                elif has_ended:
                    self.progress.warn(
                        f"the job of {run.name} ended without it: see {self.executor.folder}; the same command submits it again"
                    )
                else:
                    continue
                waiting.remove(run)
            self.progress.update([], len(waiting))
            time.sleep(POLL_SECONDS if waiting else 0)

    def _submit(self, runs: Sequence[PlannedRun]) -> dict[str, Any]:
        """Submit a task for each run, in an array on SLURM; return the jobs by the runs' digests."""
        if not runs:
            return {}
        try:
            jobs = self.executor.map_array(self.task, [run.name for run in runs])
        except (subprocess.CalledProcessError, RuntimeError) as error:
            said = getattr(error, "stderr", None) or str(error)
            said = said.decode(errors="replace") if isinstance(said, bytes) else said
            raise InputError(f"slurm: the job was refused: {' '.join(said.split())}") from error
        self.progress.tell(
            f"Submitted {len(jobs)} runs as job {jobs[0].job_id.split('_')[0]}; logs in {self.executor.folder}. This call waits for "
            "them; Ctrl-C leaves them in the queue, and the same command takes up from there."
        )
        return {run.digest: job for run, job in zip(runs, jobs, strict=True)}

    def _find_queued(self, runs: Sequence[PlannedRun]) -> dict[str, Any]:
        """Return the jobs of these runs that SLURM has waiting or at work; none where `squeue` says nothing."""
        if not self.is_slurm or not shutil.which("squeue"):
            return {}
        from submitit import SlurmJob
        from submitit.helpers import DelayedSubmission

        answer = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=False)
        tasks = {job: self.executor.folder / f"{job}_submitted.pkl" for job in answer.stdout.split()}  # submitit's
        names = {job: DelayedSubmission.load(task).args[0] for job, task in tasks.items() if task.is_file()}
        jobs = {name.rsplit("_", 1)[-1]: SlurmJob(self.executor.folder, job) for job, name in names.items()}
        return {run.digest: jobs[run.digest] for run in runs if run.digest in jobs}
