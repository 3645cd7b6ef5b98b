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
from .files import read_json, write_json
from .plan import Plan, PlannedRun
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from .session import TrainRun

# What a task asks for unless the file's `slurm` says otherwise: minutes until it is put back into the queue, how often that may be.
DEFAULT_OPTIONS = {"time": 60, "gpus_per_node": 1, "cpus_per_task": 8, "stderr_to_stdout": True, "max_num_timeout": 10}
JOBS_FOLDER, JOBS_FILE = "jobs", "jobs.json"
POLL_SECONDS = 2.0


class SubmititExecutor:
    """Submits runs and waits for them; a call that is stopped leaves them in the queue, and the next one takes up from there.

    Args:
        plan: the comparison, with what a run asks of the cluster.
        task: what trains a run by its name (`session.TrainRun`), in `task.folder`.
        progress: what is told how the runs go on.
        launcher: `slurm`, or `submitit` for processes that submitit starts on this machine.

    Raises:
        InputError: submitit is not installed, there is no SLURM here, or an option that it does not know.
    """

    def __init__(self, plan: Plan, task: TrainRun, progress: ProgressDisplay, launcher: str) -> None:
        try:
            import submitit
        except ImportError as error:
            raise InputError(f"launcher={launcher} needs submitit; type: pip install 'hf_v0init[cluster]'") from error
        if launcher == "slurm" and not shutil.which("sbatch"):
            raise InputError(
                "launcher=slurm: there is no sbatch here; call it where SLURM is, or use --list_commands for another scheduler"
            )
        self.task, self.folder, self.progress, self.is_slurm = task, task.folder, progress, launcher == "slurm"
        place, options = self.folder / JOBS_FOLDER, {**DEFAULT_OPTIONS, **plan.slurm}
        if self.is_slurm:
            self.executor = submitit.SlurmExecutor(place, max_num_timeout=options.pop("max_num_timeout"))
            options["job_name"] = re.sub(r"\W+", "-", plan.title)[:40].strip("-") or "compare"
            try:
                self.executor.update_parameters(**options)
            except (NameError, ValueError, TypeError) as error:
                raise InputError(f"slurm: {' '.join(str(error).split())}") from error
        else:
            self.executor = submitit.LocalExecutor(place)

    def run(self, plan: Plan, runs: Sequence[PlannedRun]) -> None:
        """Submit the runs that are not in the queue, and wait until all are over or their jobs have ended.

        Raises:
            InputError: SLURM refuses the job.
        """
        queued = self._find_queued(runs)
        if queued:
            self.progress.tell(f"{len(queued)} runs are in the queue already.")
        new = [run for run in runs if run.name not in queued]
        jobs = self._submit(new) if new else []
        if jobs:
            self.progress.tell(
                f"Submitted {len(jobs)} runs as job {jobs[0].job_id.split('_')[0]}; logs in {self.executor.folder}. This call waits for "
                "them; Ctrl-C leaves them in the queue, and the same command takes up from there."
            )
        by_name = {run.name: job for run, job in zip(new, jobs, strict=True)}
        waiting = list(runs)
        while waiting:
            for run in list(waiting):
                # In this order: what a job has ended with is then in the record that is read.
                has_ended = by_name[run.name].done() if run.name in by_name else not self._find_queued([run])
                record = read_record(self.folder, run)
                if is_over(record.get("state")):
                    self.progress.report_end(
                        run, record["state"], record.get("reason"), None, record.get("seconds") or 0.0
                    )
                elif has_ended:
                    self.progress.warn(
                        f"the job of {run.name} ended without it: see {self.executor.folder}; the same command submits it again"
                    )
                else:
                    continue
                waiting.remove(run)
            self.progress.update([], len(waiting))
            time.sleep(POLL_SECONDS if waiting else 0)

    def _submit(self, runs: Sequence[PlannedRun]) -> list[Any]:
        """Submit a task for each run, in an array on SLURM, and note the jobs in `jobs/jobs.json`."""
        try:
            jobs = self.executor.map_array(self.task, [run.name for run in runs])
        except (subprocess.CalledProcessError, RuntimeError) as error:
            said = getattr(error, "stderr", None) or str(error)
            said = said.decode(errors="replace") if isinstance(said, bytes) else said
            raise InputError(f"slurm: the job was refused: {' '.join(said.split())}") from error
        file = self.folder / JOBS_FOLDER / JOBS_FILE
        known = read_json(file) or {}
        write_json(file, known | {run.digest: job.job_id for run, job in zip(runs, jobs, strict=True)})
        return jobs

    def _find_queued(self, runs: Sequence[PlannedRun]) -> set[str]:
        """Return the names of the runs whose tasks SLURM has waiting or at work; none where `squeue` says nothing."""
        known = read_json(self.folder / JOBS_FOLDER / JOBS_FILE) or {}
        if not self.is_slurm or not known or not shutil.which("squeue"):
            return set()
        answer = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=False)
        queued = set(answer.stdout.split()) if answer.returncode == 0 else set()
        return {run.name for run in runs if known.get(run.digest) in queued}
