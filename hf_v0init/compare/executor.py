"""Trains runs on this machine: a process each, `jobs` at a time, in the order of the plan, each followed to its end.

Other workers, on this machine or another, may be at work on the same runs. Each run is claimed before it is started; what another
worker brings to its end is left out, and what one that has died leaves behind is taken over when its lease has lapsed.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import files
from .axes import has_v0
from .claims import LEASE_SECONDS, RunClaims
from .launch import compute_script_hash, is_one_process
from .outcome import LossTrace, find_metric, read_losses
from .plan import Plan, PlannedRun
from .process import RunProcess, end_left_run, start_process

if TYPE_CHECKING:
    from .progress import ProgressDisplay

EXIT_BAD_INPUT = 2
POLL_SECONDS = 0.2
CLAIM_SECONDS = 5.0  # until a run that another worker is training is asked for again


def read_record(folder: Path, run: PlannedRun) -> dict[str, Any]:
    """Read a run's `record.json`; empty if it has none."""
    return files.read_json(folder / files.RUNS_FOLDER / run.name / files.RECORD_FILE) or {}


def is_over(plan: Plan, state: str | None) -> bool:
    """Whether a run in this state is left as it is: the others start (again) in an emptied folder, or are resumed."""
    return state in {files.FINISHED, files.DIVERGED, files.FAILED} | ({files.PRUNED} if plan.prune else set())


def find_waiting(plan: Plan, folder: Path, runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that are not over, those that other workers are training included."""
    return [run for run in runs if not is_over(plan, read_record(folder, run).get("state"))]


class Checks:
    """What runs say about each other, told once each: other beginnings, a changed script, what they did not leave."""

    def __init__(self, plan: Plan, folder: Path, progress: ProgressDisplay) -> None:
        self.plan, self.folder, self.progress = plan, folder, progress
        self.told: set[str] = set()
        self.fingerprints: dict[tuple, tuple[str, dict[str, Any]]] = {}  # the first of each seed and condition
        self.eval_losses: dict[int, dict[str, float]] = {}  # by step and run

    def warn_once(self, message: str, key: str | None = None) -> None:
        """Warn unless this has been said."""
        if (key or message) not in self.told:
            self.told.add(key or message)
            self.progress.warn(message)

    def take_in(self, run: PlannedRun) -> None:
        """Take in what a run that is over, or that another worker is training, says about the others."""
        output = self.folder / files.RUNS_FOLDER / run.name / files.OUTPUT_FOLDER
        self.note_losses(run, read_losses(output))
        self.compare_fingerprint(run, files.read_json(output / files.FINGERPRINT_FILE))

    def note_losses(self, run: PlannedRun, trace: LossTrace) -> None:
        """Take in a run's validation losses."""
        for step, loss in trace.eval_losses.items():
            self.eval_losses.setdefault(step, {})[run.name] = loss

    def find_hopeless(self, active: RunProcess, others: Iterable[PlannedRun]) -> str | None:
        """Judge the validation losses that are new since the last look by the plan's `prune`; None for a run to go on."""
        steps = list(active.trace.eval_losses)[active.num_evals_judged :]
        active.num_evals_judged += len(steps)
        rule = self.plan.prune
        if not steps or rule is None or active.run.stage != files.TUNE:
            return None
        for run in others:
            self.take_in(run)
        for step in steps:
            loss, best = active.trace.eval_losses[step], min(self.eval_losses[step].values())
            if step >= rule.after_step and loss > rule.above * best:
                return f"the validation loss at step {step}, {loss:.4g}, is above {rule.above:g} x the best at that step, {best:.4g}"
        return None

    def compare_fingerprint(self, run: PlannedRun, fingerprint: dict[str, Any] | None) -> None:
        """Warn if this run did not begin as the first one of its seed."""
        if fingerprint is None:
            return
        name, first = self.fingerprints.setdefault((run.seed, run.condition), (run.name, fingerprint))
        difference = find_difference(first, fingerprint)
        if difference:
            self.warn_once(f"{run.name} has {difference} than {name}, though both have seed {run.seed}")

    def look_at_script(self) -> None:
        """Warn if runs that are over were made by a script file that has changed since."""
        now, changed = compute_script_hash(self.plan.script), []
        for run in self.plan.runs:
            record = read_record(self.folder, run)
            if record.get("state") in (files.FINISHED, files.DIVERGED, files.PRUNED) and record.get(
                "script_hash"
            ) not in (None, now):
                changed.append(run.name)
        if changed:
            self.warn_once(
                f"{self.plan.script} has changed since {len(changed)} of the runs were made ({', '.join(changed[:3])}"
                f"{', ...' if len(changed) > 3 else ''}), so they say nothing about those made from now on. To train them from scratch, "
                f"give another --output_dir, or delete their folders in {self.folder / files.RUNS_FOLDER}",
                f"script {now}",
            )

    def look_at_what_is_missing(self, active: RunProcess) -> None:
        """Name what a run that ended well did not leave."""
        name, output, plan = active.run.name, active.output, self.plan
        for metric in sorted(set(plan.test_metrics) - set(files.read_json(output / files.FINAL_FILE) or {})):
            self.warn_once(
                f"{name} left no {metric}, named in test_metrics; does the script test (do_predict)?", f"no {metric}"
            )
        found = find_metric(output, plan.metric)
        if found is not None and found[1] is not None and found[1] < active.trace.step:
            self.warn_once(
                f"{name} was last evaluated at step {found[1]}, and training went on to step {active.trace.step}: its "
                f"{plan.metric} is of step {found[1]}. Write trainer.evaluate() at the end of the script",
                "evaluated before the end",
            )
        if has_v0(active.run.arguments) and not (output / files.V0_FILE).is_file():
            self.warn_once(
                f"{name} left no {files.V0_FILE}, so what its v0 cost is unknown: the report charges nothing for it and says so. Train "
                "with V0InitTrainer or V0InitMixin, or write the report of initialize_v0 there",
                f"no {files.V0_FILE}",
            )


def find_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Say what `other` has that `one` has not: initial weights, batches or random state; None if they agree.

    A run that ended within four steps has fewer batches, and is compared as far as it goes.
    """
    for part, words in files.BEGINNINGS.items():
        first, second = one.get(part), other.get(part)
        if isinstance(first, list) and isinstance(second, list):
            num_shared = min(len(first), len(second))
            first, second = first[:num_shared], second[:num_shared]
        if first != second:
            return words
    return None


class LocalExecutor:
    """Trains runs as processes of this machine.

    Args:
        plan: the comparison.
        folder: its folder.
        jobs: runs side by side.
        progress: what is told how they go on.
        devices: as `launch.list_devices` returns them.
        resume: whether runs that were cut off go on from their newest checkpoint.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        jobs: int,
        progress: ProgressDisplay,
        devices: tuple[str, ...] | None = None,
        resume: bool = False,
    ) -> None:
        self.plan, self.folder, self.jobs, self.progress = plan, folder, jobs, progress
        self.devices, self.resume = devices, resume
        self.waiting: list[PlannedRun] = []
        self.active: list[RunProcess] = []
        self.claims = RunClaims(folder)
        self.checks = Checks(plan, folder, progress)
        self.retry_claim_at: dict[str, float] = {}
        self.is_being_stopped = False  # by a scheduler, whose signals reach the scripts too
        # The first run goes alone until it has logged something: if the script refuses it, it would refuse all.
        self.is_on_trial = len(find_waiting(plan, folder, plan.runs)) == len(plan.runs)
        self.any_began = False

    def run(self, plan: Plan, runs: Sequence[PlannedRun]) -> None:
        """Train runs of a plan until all are over; those of other workers are waited for.

        Raises:
            InputError: the first run of the comparison could not begin; the others are stopped.
            KeyboardInterrupt: after the runs in progress have been stopped and recorded as interrupted.
        """
        self.plan = self.checks.plan = plan
        self.waiting = find_waiting(plan, self.folder, runs)
        for run in plan.runs:
            if run not in self.waiting:
                self.checks.take_in(run)
        self.checks.look_at_script()
        try:
            while self.waiting or self.active:
                self._start_waiting()
                self._tell_of_others()
                self._follow_runs()
                self.progress.update(self.active, len(self.waiting))
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop_all()
            raise

    # ---- what is started -----------------------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        while len(self.active) < self.jobs and not (self.active and self.is_on_trial and not self.any_began):
            now = time.monotonic()
            candidates = [run for run in self.waiting if self.retry_claim_at.get(run.digest, 0.0) <= now]
            run = next((run for run in candidates if self._claim(run)), None)
            if run is None:
                return
            self.waiting.remove(run)
            self._start(run)

    def _claim(self, run: PlannedRun) -> bool:
        """Claim a run; False if another worker has it, or has brought it to its end."""
        if not self.claims.acquire(run.digest):
            self.retry_claim_at[run.digest] = time.monotonic() + CLAIM_SECONDS
            return False
        record = read_record(self.folder, run)
        state = record.get("state")
        if not is_over(self.plan, state):
            return True
        self.claims.release(run.digest)
        self.waiting.remove(run)
        self.checks.take_in(run)
        self.progress.report_end(run, state, record.get("reason"), None, record.get("seconds") or 0.0)
        return False

    def _start(self, run: PlannedRun) -> None:
        folder = self.folder / files.RUNS_FOLDER / run.name
        if end_left_run(folder):
            self.progress.warn(f"ended what a worker that was killed had left running: {run.name}")
        self.checks.look_at_script()
        slot = min(set(range(self.jobs)) - {active.slot for active in self.active})
        self.active.append(start_process(self.plan, run, folder, slot, self.jobs, self.devices, self.resume))

    def _tell_of_others(self) -> None:
        """Say once what is waited for, when nothing of one's own is left to do."""
        held = [run for run in self.waiting if run.digest in self.retry_claim_at]
        if self.active or len(held) < len(self.waiting) or not held:
            return
        names = ", ".join(f"{run.name} ({self.claims.describe_holder(run.digest)})" for run in held)
        if names not in self.checks.told:
            self.checks.told.add(names)
            self.progress.tell(
                f"Waiting for other workers: {names}. The run of one that has died is taken over when it has been silent for "
                f"{LEASE_SECONDS:g} s."
            )

    # ---- what is in progress -------------------------------------------------------------------------------------

    def _follow_runs(self) -> None:
        for active in list(self.active):
            if self.claims.is_lost(active.run.digest):
                self._give_up(active)
                continue
            has_ended = active.process.poll() is not None
            self._read_progress(active)
            if has_ended:
                self._end(active)
            elif time.monotonic() > active.kill_at:
                active.kill()

    def _give_up(self, active: RunProcess) -> None:
        """End the process of a run that another worker has taken over, and leave its folder alone."""
        active.kill()
        self.active.remove(active)
        self.claims.release(active.run.digest)
        self.progress.warn(
            f"{active.run.name} was taken over by another worker, since this one was silent for too long"
        )

    def _read_progress(self, active: RunProcess) -> None:
        had_fingerprint = active.fingerprint is not None
        has_logged = active.read_progress()
        if not had_fingerprint:
            self.checks.compare_fingerprint(active.run, active.fingerprint)
        if active.has_begun_again():
            active.stop(files.INTERRUPTED, f"it did not go on from {active.checkpoint.name}")
        if not has_logged:
            return
        self.any_began = True
        self.checks.note_losses(active.run, active.trace)
        if active.trace.not_finite:
            active.stop(files.DIVERGED, active.trace.not_finite)
        reason = self.checks.find_hopeless(active, self.waiting)
        if reason:
            active.stop(files.PRUNED, reason)

    def _end(self, active: RunProcess) -> None:
        """Record how a run ended whose process is gone, and draw what consequences it has."""
        status = active.process.wait()
        active.kill()  # what its script may have left behind
        has_begun_again = active.has_begun_again()
        state, reason = active.judge(status, self.plan.metric, self.is_being_stopped)
        if has_begun_again:
            self._note_that_it_cannot_resume(active)
        self._write_end(active, state, reason, status)
        self.active.remove(active)
        self.claims.release(active.run.digest)
        if has_begun_again and state == files.INTERRUPTED:
            self.waiting.insert(0, active.run)  # in an emptied folder, with nothing of the earlier attempt in it
        elif state in (files.FINISHED, files.DIVERGED):
            self.is_on_trial = False
            self.checks.look_at_what_is_missing(active)
        elif state == files.FAILED and self.is_on_trial and self._is_refusal(active, reason, status):
            # The next call tries it again.
            files.write_json(active.folder / files.RECORD_FILE, {**active.record, "state": files.INTERRUPTED})
            words = (reason or "").removeprefix("error: ")
            was_refused = self._has_refused_input(reason, status)
            what = "was refused" if was_refused else "failed before it had logged anything"
            raise InputError(f"the first run {what}: {words} (log: {active.folder / files.SCRIPT_LOG_FILE})")
        elif state == files.INTERRUPTED and self.is_being_stopped:
            raise KeyboardInterrupt
        elif state == files.INTERRUPTED:
            self.progress.warn(f"{active.run.name} was interrupted; the same command trains it again")

    def _note_that_it_cannot_resume(self, active: RunProcess) -> None:
        active.record |= {"resumed_from": active.record["resumed_from"][:-1], "cannot_resume": True}
        active.started += active.seconds_before
        self.resume = False
        self.checks.warn_once(
            f"{active.run.name} was told to go on from {active.checkpoint.name} and began at step 0 again: {self.plan.script} does not "
            "resume, so runs that were cut off start from scratch. For it to resume, write "
            "trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)"
        )

    def _is_refusal(self, active: RunProcess, reason: str | None, status: int) -> bool:
        """Whether the script would fail so for all runs: it refused its input, left no metric, or ended before it logged anything."""
        return self._has_refused_input(reason, status) or active.trace.first_step is None

    def _has_refused_input(self, reason: str | None, status: int) -> bool:
        """Whether the script refused its input, or left no metric; a launcher has exit statuses of its own."""
        if not is_one_process(self.plan.launch) and (reason or "").startswith("error: "):
            return True
        return status in (0, EXIT_BAD_INPUT)

    def _write_end(self, active: RunProcess, state: str, reason: str | None, status: int) -> None:
        active.write_end(state, reason, status, self.plan.keep_models)
        self.progress.report_end(active.run, state, reason, active.trace, active.seconds)

    def _stop_all(self) -> None:
        """Stop the runs in progress, by force after the grace period or at a second Ctrl-C, and record them."""
        for active in self.active:
            active.stop(files.INTERRUPTED, "the comparison was stopped")
        with contextlib.suppress(KeyboardInterrupt):
            for active in self.active:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    active.process.wait(max(0.0, active.kill_at - time.monotonic()))
        for active in self.active:
            status = active.kill()
            if active.record["state"] == files.RUNNING:
                self._write_end(active, *active.judge(status, self.plan.metric, self.is_being_stopped), status)
            self.claims.release(active.run.digest)
        self.active = []
