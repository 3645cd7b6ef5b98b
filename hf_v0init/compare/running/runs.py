"""Trains the runs of a comparison that are waiting: a process each, some at a time, each followed to its end.

A run is `finished`; `diverged` if a loss was no finite number (it is stopped then) or the last validation loss is above that at
the start; `failed` if its script ended with an error; `stopped_early` by the plan's `stop_hopeless`; or `interrupted`.

Other calls, on this machine or another, may be at work on the same runs. Each run is claimed before it is started, and what another
call has brought to its end meanwhile is left out.
"""

from __future__ import annotations

import contextlib
import math
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from ...errors import InputError
from ...records.report import REPORT_FILE
from ..planning.axes import NO_V0
from ..planning.halving import select_runs
from ..planning.plan import Plan, PlannedRun
from ..reading.results import (
    DIVERGED,
    FAILED,
    FINGERPRINT_FILE,
    FINISHED,
    INTERRUPTED,
    LOG_FILE,
    OUTPUT_FOLDER,
    RECORD_FILE,
    RUNNING,
    RUNS_FOLDER,
    STOPPED_EARLY,
    list_model_arguments,
    read_result,
)
from .claims import RunClaims
from .folder import describe_run, end_left_run, find_changed_script, list_final_states, read_run_record
from .launch import compute_script_hash, is_one_process, kill_tree, make_command, make_environment, signal_group
from .machine import describe_hardware, list_versions
from .run_state import (
    LossTrace,
    count_entries,
    find_checkpoint,
    find_difference,
    find_error_line,
    find_metric,
    find_missing_metrics,
    judge_run,
    read_json,
    read_losses,
    remove_models,
    write_json,
)

SCRIPT_LOG_FILE = "log.txt"
EXIT_BAD_INPUT = 2
GRACE_SECONDS = 10.0  # from SIGINT to SIGKILL
STOPPING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # schedulers' too
POLL_SECONDS = 0.2
CLAIM_SECONDS = 5.0  # until a run that another call is training is asked for again


class Progress(Protocol):
    """What is told while runs go on."""

    def update(self, active: Sequence[ActiveRun], num_waiting: int) -> None:
        """Show the runs in progress; called several times per second."""

    def report_end(self, run: PlannedRun, state: str, reason: str | None, trace: LossTrace, seconds: float) -> None:
        """Show that a run is over."""

    def report_elsewhere(self, run: PlannedRun, state: str) -> None:
        """Show that another call has brought a run to its end."""

    def warn(self, message: str) -> None:
        """Show a warning."""


@dataclass(frozen=True)
class ResumePoint:
    """What a run had left when it was told to go on from a checkpoint, to see whether its script does."""

    checkpoint: Path
    seconds: float  # the run had taken
    num_entries: int  # of its log, up to the checkpoint
    fingerprint: tuple[int, int] | None  # inode and time of its file, which is written only at the start of a run

    @property
    def step(self) -> int:
        """The optimizer step of the checkpoint."""
        return int(self.checkpoint.name.rsplit("-", 1)[-1])


@dataclass
class ActiveRun:
    """A run whose process has been started and whose end has not been recorded."""

    run: PlannedRun
    folder: Path
    process: subprocess.Popen
    slot: int
    record: dict[str, Any]
    started: float
    trace: LossTrace = field(default_factory=LossTrace)
    num_evals_judged: int = 0
    fingerprint: dict[str, Any] | None = None
    resumed: ResumePoint | None = None
    began_anew: bool = False  # although it was told to resume
    stop_as: tuple[str, str] | None = None  # state and reason, once it has been told to stop
    kill_at: float = float("inf")

    @property
    def output(self) -> Path:
        """The script's output folder."""
        return self.folder / OUTPUT_FOLDER

    @property
    def seconds(self) -> float:
        """Seconds it has taken, those before it was cut off included."""
        return time.monotonic() - self.started

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps of the whole run; an estimate from the epochs if `max_steps` is not set; None if unknown."""
        arguments = self.run.arguments
        if arguments.get("max_steps", -1) > 0:
            return int(arguments["max_steps"])
        if self.trace.epoch and self.trace.step:
            return round(self.trace.step / self.trace.epoch * float(arguments.get("num_train_epochs", 3)))
        return None

    def stop(self, state: str, reason: str) -> None:
        """Ask the process to end, once; `kill` is due after the grace period."""
        if self.stop_as is None:
            self.stop_as = (state, reason)
            self.kill_at = time.monotonic() + GRACE_SECONDS
            signal_group(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End the process and those it started."""
        kill_tree(self.process.pid)


class RunQueue:
    """Starts the waiting runs, `jobs` at a time, in order.

    Args:
        plan: the comparison.
        folder: its folder.
        waiting: the runs to be started.
        jobs: runs side by side.
        progress: what is told how they go on.
        resume: whether runs that were cut off go on from their newest checkpoint.
        devices: as `devices.list_devices` returns them.
        halving: whether only the better half of each family gets the next seed; see `planning.halving`.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        waiting: Sequence[PlannedRun],
        jobs: int,
        progress: Progress,
        resume: bool = False,
        devices: Sequence[str] | None = None,
        halving: bool = False,
    ) -> None:
        self.plan, self.folder, self.jobs, self.progress, self.resume = plan, folder, jobs, progress, resume
        self.devices, self.halving = devices, halving
        self.waiting = list(waiting)
        self.active: list[ActiveRun] = []
        self.claims = RunClaims(folder)
        self.retry_claim_at: dict[str, float] = {}
        # A run that had failed is tried again once, not again after another call has done so.
        self.failed_before = {run.name: read_run_record(folder, run).get("started") for run in waiting}
        # The first run goes alone until it has logged something: if the script refuses it, it would refuse all.
        self.on_trial = waiting[0].name if len(waiting) == len(plan.runs) else None
        self.any_began = False
        self.refused: list[ActiveRun] = []
        self.eval_losses: dict[int, dict[str, float]] = {}  # by step and run
        self.scores: dict[str, float] = {}  # by run that is over, lower is better
        self.fingerprints: dict[tuple, tuple[str, dict[str, Any]]] = {}  # the first of each seed
        self.told: set[str] = set()  # what has been warned of
        self.is_being_stopped = False  # by a scheduler, whose signals reach the scripts too
        for run in plan.runs:
            if run not in self.waiting:
                self._take_in(run)
        self._look_at_script()

    def run(self) -> None:
        """Run until nothing waits but what other calls are training.

        Raises:
            InputError: the first run of the plan could not begin; the others are stopped.
            KeyboardInterrupt: after the runs in progress have been stopped and recorded as interrupted.
        """
        try:
            while True:
                self._start_waiting()
                if not self.active and not self._start_waiting(at_once=True) and not self._must_wait():
                    break
                self._follow_runs()
                self.progress.update(self.active, len(self.waiting))
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop_all()
            raise

    def list_elsewhere(self) -> list[str]:
        """List the runs that other calls are training, as 'name (process 12 on node7)'."""
        return [f"{run.name} ({self.claims.describe_holder(run.digest)})" for run in self._list_wanted()]

    # ---- what is started -----------------------------------------------------------------------------------------

    def _list_wanted(self) -> list[PlannedRun]:
        if not self.halving:
            return self.waiting
        now = {run.name for run in select_runs(self.plan.runs, self.scores).now}
        return [run for run in self.waiting if run.name in now]

    def _must_wait(self) -> bool:
        """Whether what comes next depends on runs that other calls are training."""
        return self.halving and bool(self._list_wanted())

    def _start_waiting(self, at_once: bool = False) -> bool:
        """Start what can be started; with `at_once` ask again for what another call had a moment ago. Say whether any was."""
        any_started = False
        while len(self.active) < self.jobs and not (self.active and self.on_trial and not self.any_began):
            now = time.monotonic()
            candidates = [r for r in self._list_wanted() if at_once or self.retry_claim_at.get(r.digest, 0.0) <= now]
            run = next((run for run in candidates if self._claim(run)), None)
            if run is None:
                break
            self.waiting.remove(run)
            self._start(run)
            any_started = True
        return any_started

    def _claim(self, run: PlannedRun) -> bool:
        """Claim a run; False if another call has it, or has brought it to its end."""
        if not self.claims.acquire(run.digest):
            self.retry_claim_at[run.digest] = time.monotonic() + CLAIM_SECONDS
            return False
        record = read_run_record(self.folder, run)
        state = record.get("state")
        failed_before = state == FAILED and record.get("started") == self.failed_before[run.name]
        if state not in list_final_states(self.plan) or failed_before:
            return True
        self.claims.release(run.digest)
        self.waiting.remove(run)
        self._take_in(run)
        self.progress.report_elsewhere(run, state)
        return False

    def _start(self, run: PlannedRun) -> None:
        if self.on_trial and not self.any_began:
            self.on_trial = run.name  # another call may have the first of the plan
        folder = self.folder / RUNS_FOLDER / run.name
        if end_left_run(folder):
            self.progress.warn(f"ended what a call that was killed had left running: {run.name}")
        earlier = read_run_record(self.folder, run)
        resumed = self._find_resume_point(folder, earlier)
        if resumed is None and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._look_at_script()
        slot = min(set(range(self.jobs)) - {active.slot for active in self.active})
        arguments = run.arguments | ({} if resumed is None else {"resume_from_checkpoint": str(resumed.checkpoint)})
        command = make_command(self.plan.launch, self.plan.script, arguments, folder / OUTPUT_FOLDER, self.jobs)
        environment = make_environment(self.plan.launch, self.jobs, slot, self.devices)
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        set_names = {name: environment[name] for name in names if name in environment}
        record = {
            **describe_run(run),
            "state": RUNNING,
            "reason": None,
            "exit_status": None,
            "command": command,
            "script_hash": compute_script_hash(self.plan.script),
            "host": platform.node(),
            "started": datetime.now().astimezone().isoformat(),
            "seconds": None,
            "versions": list_versions(),
            "hardware": {**describe_hardware(), "jobs": self.jobs, **set_names},
        }
        if resumed is not None:
            record["resumed_from"] = [*earlier.get("resumed_from", []), resumed.checkpoint.name]
        if earlier.get("cannot_resume"):
            record["cannot_resume"] = True
        with (folder / SCRIPT_LOG_FILE).open("wb" if resumed is None else "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it through `stop` alone, and `stop` reaches what it starts
            )
        started = time.monotonic() - (0.0 if resumed is None else resumed.seconds)
        self.active.append(ActiveRun(run, folder, process, slot, record, started, resumed=resumed))
        write_json(folder / RECORD_FILE, {**record, "pid": process.pid})

    def _find_resume_point(self, folder: Path, record: dict[str, Any]) -> ResumePoint | None:
        """Return where to go on with a run that was cut off; None: it starts anew."""
        if not self.resume or record.get("state") not in (INTERRUPTED, RUNNING) or record.get("cannot_resume"):
            return None
        output = folder / OUTPUT_FOLDER
        checkpoint = find_checkpoint(output)
        if checkpoint is None:
            return None
        point = ResumePoint(checkpoint, record.get("seconds") or 0.0, 0, _get_stamp(output / FINGERPRINT_FILE))
        return replace(point, num_entries=count_entries(output / LOG_FILE, point.step))

    def _look_at_script(self) -> None:
        """Warn if runs that are over were made by a script file that has changed since, once for each change."""
        changed = find_changed_script(self.plan, self.folder)
        if changed:
            self._warn_once(
                f"{self.plan.script} has changed since {len(changed)} of the runs were made ({', '.join(changed[:3])}"
                f"{', ...' if len(changed) > 3 else ''}), so they say nothing about those made from now on. To make them anew, give another "
                f"--output_dir, or delete their folders in {self.folder / RUNS_FOLDER}",
                compute_script_hash(self.plan.script),
            )

    def _warn_once(self, message: str, key: str | None = None) -> None:
        if (key or message) not in self.told:
            self.told.add(key or message)
            self.progress.warn(message)

    def _take_in(self, run: PlannedRun) -> None:
        """Take in what a run that is over says about the others."""
        output = self.folder / RUNS_FOLDER / run.name / OUTPUT_FOLDER
        self._note_eval_losses(run, read_losses(output))
        self._compare_fingerprint(run, read_json(output / FINGERPRINT_FILE))
        self._note_score(run)

    def _note_score(self, run: PlannedRun) -> None:
        if not self.halving:
            return
        self.scores[run.name] = read_score(self.plan, self.folder, run)

    # ---- what is in progress -------------------------------------------------------------------------------------

    def _follow_runs(self) -> None:
        for active in list(self.active):
            if self.claims.is_lost(active.run.digest):
                self._give_up(active)
                continue
            is_over = active.process.poll() is not None
            self._read_progress(active)
            if is_over:
                self._end(active)
            elif time.monotonic() > active.kill_at:
                active.kill()

    def _give_up(self, active: ActiveRun) -> None:
        """End the process of a run that another call has taken over, and leave its folder alone."""
        active.kill()
        active.process.wait()
        self.active.remove(active)
        self.claims.release(active.run.digest)
        self.progress.warn(f"{active.run.name} was taken over by another call, since this one was silent for too long")

    def _read_progress(self, active: ActiveRun) -> None:
        if active.fingerprint is None:
            active.fingerprint = read_json(active.output / FINGERPRINT_FILE)
            self._compare_fingerprint(active.run, active.fingerprint)
        has_logged = active.trace.read_new(active.output / LOG_FILE)
        if not active.began_anew and _has_begun_anew(active, has_logged):
            active.began_anew = True
            active.stop(INTERRUPTED, f"it did not go on from {active.resumed.checkpoint.name}")
        if not has_logged:
            return
        self.any_began = True
        self._note_eval_losses(active.run, active.trace)
        if active.trace.not_finite:
            active.stop(DIVERGED, active.trace.not_finite)
        reason = self._find_hopeless(active)
        if reason:
            active.stop(STOPPED_EARLY, reason)

    def _end(self, active: ActiveRun) -> None:
        """Record how a run ended whose process is gone, and draw what consequences it has."""
        status = active.process.wait()
        active.kill()  # what its script may have left behind
        state, reason = self._judge(active, status)
        if active.began_anew:
            self._note_that_it_cannot_resume(active)
        self._record_end(active, state, reason, status)
        self.active.remove(active)
        self.claims.release(active.run.digest)
        if active.began_anew and state == INTERRUPTED:
            self.waiting.insert(0, active.run)  # in an emptied folder, with nothing of the earlier attempt in it
            return
        self._note_score(active.run)
        if state in (FINISHED, DIVERGED):
            self.on_trial = None
            self._warn_of_what_is_missing(active)
        if state == FAILED and self.on_trial is not None and self._is_refusal(active, reason, status):
            self.refused.append(active)
            if active.run.name == self.on_trial:
                for refused in self.refused:  # they are tried again once the cause is gone
                    write_json(refused.folder / RECORD_FILE, {**refused.record, "state": INTERRUPTED})
                words = (reason or "").removeprefix("error: ")
                what = (
                    "was refused" if self._has_refused_input(reason, status) else "failed before it had logged anything"
                )
                raise InputError(f"the first run {what}: {words} (log: {active.folder / SCRIPT_LOG_FILE})")

    def _note_that_it_cannot_resume(self, active: ActiveRun) -> None:
        resumed = active.resumed
        active.record |= {"resumed_from": active.record["resumed_from"][:-1], "cannot_resume": True}
        active.started += resumed.seconds
        self.resume = False
        self._warn_once(
            f"{active.run.name} was told to go on from {resumed.checkpoint.name} and began at step 0 again: {self.plan.script} does not "
            "resume, so runs that were cut off start anew. For it to resume, write "
            "trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)"
        )

    def _judge(self, active: ActiveRun, status: int) -> tuple[str, str | None]:
        """Return state and reason of a run whose process has ended."""
        if status == 0:
            return judge_run(active.output, self.plan.metric)
        if active.stop_as:
            return active.stop_as
        if active.trace.not_finite:
            return DIVERGED, active.trace.not_finite
        if self.is_being_stopped or -status in STOPPING_SIGNALS:
            return INTERRUPTED, "it was stopped from outside"
        line = find_error_line(active.folder / SCRIPT_LOG_FILE)
        if status > 0:
            return FAILED, line or f"exit status {status} without a word"
        name = next((s.name for s in signal.Signals if s == -status), str(-status))
        hint = ", out of memory?" if name == "SIGKILL" else ""
        return FAILED, f"ended by signal {name}{hint}" + (f"; last line: {line}" if line else "")

    def _is_refusal(self, active: ActiveRun, reason: str | None, status: int) -> bool:
        """Whether the script would fail so for all runs: it refused its input, left no metric, or ended before it logged anything."""
        return self._has_refused_input(reason, status) or not active.trace.num_entries

    def _has_refused_input(self, reason: str | None, status: int) -> bool:
        """Whether the script refused its input, or left no metric; a launcher has exit statuses of its own."""
        if not is_one_process(self.plan.launch) and (reason or "").startswith("error: "):
            return True
        return status in (0, EXIT_BAD_INPUT)

    def _record_end(self, active: ActiveRun, state: str, reason: str | None, status: int) -> None:
        active.record |= {"state": state, "reason": reason, "exit_status": status, "seconds": round(active.seconds, 3)}
        if not self.plan.keep_models and state != INTERRUPTED:
            remove_models(active.output)
            active.record["models_removed"] = True
        write_json(active.folder / RECORD_FILE, active.record)
        self.progress.report_end(active.run, state, reason, active.trace, active.seconds)

    def _stop_all(self) -> None:
        """Stop the runs in progress, by force after the grace period or at a second Ctrl-C, and record them."""
        for active in self.active:
            active.stop(INTERRUPTED, "the comparison was stopped")
        with contextlib.suppress(KeyboardInterrupt):
            for active in self.active:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    active.process.wait(max(0.0, active.kill_at - time.monotonic()))
        for active in self.active:
            active.kill()
            status = active.process.wait()
            if active.record["state"] == RUNNING:
                self._record_end(active, *self._judge(active, status), status)
            self.claims.release(active.run.digest)
        self.active = []

    # ---- what runs say about each other --------------------------------------------------------------------------

    def _note_eval_losses(self, run: PlannedRun, trace: LossTrace) -> None:
        for step, loss in trace.eval_losses.items():
            self.eval_losses.setdefault(step, {})[run.name] = loss

    def _find_hopeless(self, active: ActiveRun) -> str | None:
        """Look at the validation losses that are new since the last look."""
        steps = list(active.trace.eval_losses)[active.num_evals_judged :]
        active.num_evals_judged += len(steps)
        rule = self.plan.stop_hopeless
        if steps and rule:
            self._read_other_calls()
        for step in steps if rule else []:
            loss, best = active.trace.eval_losses[step], min(self.eval_losses[step].values())
            if step >= rule.after_step and loss > rule.above * best:
                return f"the validation loss at step {step}, {loss:.4g}, is above {rule.above:g} x the best at that step, {best:.4g}"
        return None

    def _read_other_calls(self) -> None:
        """Read the losses of runs that other calls are training."""
        for run in self.waiting:
            self._note_eval_losses(run, read_losses(self.folder / RUNS_FOLDER / run.name / OUTPUT_FOLDER))

    def _compare_fingerprint(self, run: PlannedRun, fingerprint: dict[str, Any] | None) -> None:
        """Warn if this run did not begin as the first one of its seed with the same arguments of model and data."""
        if fingerprint is None:
            return
        key = (run.seed, list_model_arguments(run))
        name, first = self.fingerprints.setdefault(key, (run.name, fingerprint))
        difference = find_difference(first, fingerprint)
        if difference:
            self.progress.warn(f"{run.name} has {difference} than {name}, though both have seed {run.seed}")

    def _warn_of_what_is_missing(self, active: ActiveRun) -> None:
        """Name what a run that ended well did not leave, once for each thing."""
        name, output = active.run.name, active.output
        for metric in sorted(find_missing_metrics(output, self.plan.test_metrics)):
            self._warn_once(
                f"{name} left no {metric}, named in test_metrics; does the script test (do_predict)?", f"no {metric}"
            )
        found = find_metric(output, self.plan.metric)
        if found is not None and found.step is not None and found.step < active.trace.step:
            self._warn_once(
                f"{name} was last evaluated at step {found.step}, and training went on to step {active.trace.step}: its "
                f"{self.plan.metric} is of step {found.step}. Write trainer.evaluate() at the end of the script",
                "evaluated before the end",
            )
        if active.run.v0 != NO_V0 and not (output / REPORT_FILE).is_file():
            self._warn_once(
                f"{name} left no {REPORT_FILE}, so what its v0 cost is unknown: the report charges nothing for it and says so. Train "
                "with V0InitTrainer or V0InitMixin, or write the report of initialize_v0 there",
                f"no {REPORT_FILE}",
            )


def read_scores(plan: Plan, folder: Path, waiting: Sequence[PlannedRun]) -> dict[str, float]:
    """Read the scores of the runs that do not wait, by name."""
    return {run.name: read_score(plan, folder, run) for run in plan.runs if run not in waiting}


def read_score(plan: Plan, folder: Path, run: PlannedRun) -> float:
    """Read what halving ranks a run that is over by, lower is better: its final loss; infinite if it diverged or failed.

    A metric of which more is better is negated.
    """
    result = read_result(folder / RUNS_FOLDER / run.name, describe_run(run), plan.metric)
    if result.state in (DIVERGED, FAILED) or result.final_loss is None:
        return math.inf
    return -result.final_loss if plan.greater_is_better else result.final_loss


def _get_stamp(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _has_begun_anew(active: ActiveRun, has_logged: bool) -> bool:
    """Whether a run that was told to resume has begun at step 0 again."""
    resumed = active.resumed
    if resumed is None:
        return False
    if _get_stamp(active.output / FINGERPRINT_FILE) != resumed.fingerprint:
        return True
    return has_logged and count_entries(active.output / LOG_FILE, resumed.step) < resumed.num_entries
