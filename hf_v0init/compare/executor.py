"""Trains runs on this machine: a process each, `jobs` at a time, in the order of the plan, each followed to its end.

Other workers, on this machine or another, may be at work on the same runs. Each run is claimed before it is started; what another
worker brings to its end is left out, and what one that has died leaves behind is taken over when its lease has lapsed.

`.locks/` holds a lock for the plan, taken for the moment in which it is written, and one for each run in progress. They are leases
of the package filelock: files that their holder refreshes. A holder that was killed on this machine is noticed at once, one on
another machine when its file has not been refreshed for `LEASE_SECONDS` (by the clock of whoever looks). So any file system will
do that all machines see.
"""

from __future__ import annotations

import contextlib
import platform
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import SoftFileLease, Timeout

from ..errors import InputError
from . import files
from .plan import Plan, PlannedRun
from .process import RunProcess, end_left_run, start_process

if TYPE_CHECKING:
    from .progress import ProgressDisplay

POLL_SECONDS = 0.2
CLAIM_SECONDS = 5.0  # until a run that another worker is training is asked for again
LEASE_SECONDS = 60.0
PLAN_SECONDS = 600.0  # how long to wait for a worker that is writing the plan or the report


def make_lease(folder: Path, name: str) -> SoftFileLease:
    """Make the lock of this name, not yet taken: `plan`, or `run_` and a run's digest, so that it outlives a change of its name."""
    return SoftFileLease(folder / files.LOCKS_FOLDER / f"{name}.lock", lease_duration=LEASE_SECONDS, thread_local=False)


def describe_holder(lease: SoftFileLease) -> str:
    """Say in words which worker holds a lock."""
    owner = lease.owner  # read once: it may be gone at the next look
    if owner is None:
        return "another worker"
    return f"process {owner.pid}" + ("" if owner.hostname == platform.node() else f" on {owner.hostname}")


def lock_plan(folder: Path) -> contextlib.AbstractContextManager:
    """Hold what all workers share, the plan and the report, while they are written; the folder is made if need be.

    Raises:
        InputError: it cannot be written, or another worker holds it and goes on doing so.
    """
    lease = make_lease(folder, "plan")
    try:
        Path(lease.lock_file).parent.mkdir(parents=True, exist_ok=True)
        return lease.acquire(timeout=PLAN_SECONDS)
    except Timeout:
        raise InputError(
            f"output_dir={folder}: {describe_holder(lease)} has been writing plan or report for {PLAN_SECONDS:g} s; try again"
        ) from None
    except OSError as error:
        raise InputError(
            f"output_dir={folder} cannot be written ({error.strerror}); give another --output_dir"
        ) from error


def read_record(folder: Path, run: PlannedRun) -> dict[str, Any]:
    """Read a run's `record.json`; empty if it has none."""
    return files.read_json(files.find_run(folder, run.name) / files.RECORD_FILE) or {}


def is_over(state: str | None) -> bool:
    """Whether a run in this state is left as it is: the others start (again) in an emptied folder, or are resumed."""
    return state in (files.FINISHED, files.DIVERGED, files.FAILED)


def find_waiting(folder: Path, runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that are not over, those that other workers are training included."""
    return [run for run in runs if not is_over(read_record(folder, run).get("state"))]


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
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


class LocalExecutor:
    """Trains runs as processes of this machine, `jobs` side by side, on `devices` as `launch.list_devices` returns them.

    With `resume` runs that were cut off go on from their newest checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int,
        progress: ProgressDisplay,
        devices: tuple[str, ...] | None = None,
        resume: bool = False,
    ) -> None:
        self.folder, self.jobs, self.progress = folder, jobs, progress
        self.devices, self.resume = devices, resume
        self.waiting: list[PlannedRun] = []
        self.active: list[RunProcess] = []
        # They are kept, since a lease remembers since when another's has been silent.
        self.leases: dict[str, SoftFileLease] = {}
        self.retry_claim_at: dict[str, float] = {}

    def run(self, plan: Plan, runs: Sequence[PlannedRun]) -> None:
        """Train runs of a plan until all are over; those of other workers are waited for.

        Raises:
            InputError: the first run of the comparison could not begin; the others are stopped.
            KeyboardInterrupt: after the runs in progress have been stopped and recorded as interrupted.
        """
        self.plan, self.waiting = plan, find_waiting(self.folder, runs)
        # Until a run has ended well, one goes alone until it has logged something: if the script refuses it, it would refuse all.
        self.is_on_trial = len(find_waiting(self.folder, plan.runs)) == len(plan.runs)
        try:
            while self.waiting or self.active:
                self._start_waiting()
                self._follow_runs()
                self.progress.update(self.active, len(self.waiting))
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop_all()
            raise

    # ---- what is started -----------------------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        while len(self.active) < self.jobs:
            has_begun = any(active.trace.has_logged for active in self.active)
            if self.active and self.is_on_trial and not has_begun:
                return
            now = time.monotonic()
            candidates = [run for run in self.waiting if self.retry_claim_at.get(run.digest, 0.0) <= now]
            run = next((run for run in candidates if self._claim(run)), None)
            if run is None:
                return
            self.waiting.remove(run)
            folder = files.find_run(self.folder, run.name)
            if end_left_run(folder):
                self.progress.warn(f"ended what a worker that was killed had left running: {run.name}")
            slot = min(set(range(self.jobs)) - {active.slot for active in self.active})
            self.active.append(start_process(self.plan, run, folder, slot, self.jobs, self.devices, self.resume))

    def _claim(self, run: PlannedRun) -> bool:
        """Claim a run; False if another worker has it, or has brought it to its end."""
        lease = self.leases.setdefault(run.digest, make_lease(self.folder, f"run_{run.digest}"))
        try:
            lease.acquire(blocking=False)
        except Timeout:
            if run.digest not in self.retry_claim_at:
                self.progress.tell(
                    f"{run.name} is left to {describe_holder(lease)}; it is taken over when that has been silent for {LEASE_SECONDS:g} s."
                )
            self.retry_claim_at[run.digest] = time.monotonic() + CLAIM_SECONDS
            return False
        record = read_record(self.folder, run)
        state = record.get("state")
        if not is_over(state):
            return True
        lease.release()
        self.waiting.remove(run)
        self.progress.report_end(run, state, record.get("reason"), None, record.get("seconds") or 0.0)
        return False

    # ---- what is in progress -------------------------------------------------------------------------------------

    def _follow_runs(self) -> None:
        for active in list(self.active):
            if self.leases[active.run.digest].compromise:  # its folder is the other worker's now
                active.kill()
                self.active.remove(active)
                self.leases[active.run.digest].release()
                self.progress.warn(
                    f"{active.run.name} was taken over by another worker, since this one was silent for too long"
                )
                continue
            has_ended = active.process.poll() is not None
            active.trace.read_new(active.output / files.LOG_FILE)
            if active.trace.not_finite:
                active.stop(files.DIVERGED, active.trace.not_finite)
            if has_ended:
                self._end(active)
            elif time.monotonic() > active.kill_at:
                active.kill()

    def _end(self, active: RunProcess) -> None:
        """Record how a run ended whose process is gone, and draw what consequences it has."""
        state = self._write_end(active)
        self.active.remove(active)
        self.leases[active.run.digest].release()
        if state in files.COUNTED:
            self.is_on_trial = False
        elif state == files.INTERRUPTED:
            self.progress.warn(f"{active.run.name} was interrupted; the same command trains it again")
        elif self.is_on_trial and (not active.trace.has_logged or active.record["exit_status"] == 0):
            # The script refused its input or left no metric, as it would of all runs. The next call tries it again.
            files.write_json(active.folder / files.RECORD_FILE, {**active.record, "state": files.INTERRUPTED})
            words = (active.record["reason"] or "").removeprefix("error: ")
            raise InputError(f"the first run failed: {words} (log: {active.folder / files.SCRIPT_LOG_FILE})")

    def _write_end(self, active: RunProcess) -> str:
        """Record how a run ended, after ending what its script may have left behind; return its state."""
        state = active.write_end(self.plan)
        self.progress.report_end(active.run, state, active.record["reason"], active.trace, active.seconds)
        return state

    def _stop_all(self) -> None:
        """Stop the runs in progress, by force after the grace period or at a second Ctrl-C, and record them."""
        for active in self.active:
            active.stop(files.INTERRUPTED, "the comparison was stopped")
        with contextlib.suppress(KeyboardInterrupt):
            for active in self.active:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    active.process.wait(max(0.0, active.kill_at - time.monotonic()))
        for active in self.active:
            if active.record["state"] == files.RUNNING:
                self._write_end(active)
            self.leases[active.run.digest].release()
        self.active = []
