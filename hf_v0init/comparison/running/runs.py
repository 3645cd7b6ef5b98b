"""Trains the runs of a comparison that are waiting: a process each, some at a time, each followed to its end.

A run is `finished`; `diverged` if a loss was no finite number (it is stopped then) or the last validation loss is above that at
the start; `failed` if its script ended with an error; `stopped_early` by the plan's `stop_hopeless`; or `interrupted`.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from ...errors import InputError
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
)
from .folder import describe_run
from .launch import is_one_process, kill_tree, make_command, make_environment, signal_group
from .machine import describe_hardware, list_versions
from .run_state import (
    LossTrace,
    find_checkpoint,
    find_difference,
    find_error_line,
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
POLL_SECONDS = 0.2


class Progress(Protocol):
    """What is told while runs go on."""

    def update(self, active: Sequence[ActiveRun], num_waiting: int) -> None:
        """Show the runs in progress; called several times a second."""

    def report_end(self, run: PlannedRun, state: str, reason: str | None, trace: LossTrace, seconds: float) -> None:
        """Show that a run is over."""

    def warn(self, message: str) -> None:
        """Show a warning."""


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
    """Starts the waiting runs, `jobs` at a time, in order; with `resume`, cut-off ones from their newest checkpoint."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        waiting: Sequence[PlannedRun],
        jobs: int,
        progress: Progress,
        resume: bool = False,
    ) -> None:
        self.plan, self.folder, self.jobs, self.progress, self.resume = plan, folder, jobs, progress, resume
        self.waiting = list(waiting)
        self.active: list[ActiveRun] = []
        # Until a run has ended well, the first one is looked at: if the script refuses it, it would refuse all.
        self.on_trial = waiting[0].name if len(waiting) == len(plan.runs) else None
        self.refused: list[ActiveRun] = []
        self.eval_losses: dict[int, dict[str, float]] = {}  # by step and run
        self.fingerprints: dict[tuple, tuple[str, dict[str, Any]]] = {}  # the first of each seed
        self.metrics_missed: set[str] = set()
        for run in plan.runs:
            if run not in self.waiting:
                output = folder / RUNS_FOLDER / run.name / OUTPUT_FOLDER
                self._note_eval_losses(run, read_losses(output))
                self._compare_fingerprint(run, read_json(output / FINGERPRINT_FILE))

    def run(self) -> None:
        """Run until nothing waits.

        Raises:
            InputError: the script refused the first run of the plan; the others are stopped.
            KeyboardInterrupt: after the runs in progress have been stopped and recorded as interrupted.
        """
        try:
            while self.waiting or self.active:
                while self.waiting and len(self.active) < self.jobs:
                    self._start(self.waiting.pop(0))
                self._follow_runs()
                self.progress.update(self.active, len(self.waiting))
                if self.active:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._stop_all()
            raise

    def _start(self, run: PlannedRun) -> None:
        folder = self.folder / RUNS_FOLDER / run.name
        checkpoint = self._find_checkpoint(run, folder)
        earlier = {} if checkpoint is None else read_json(folder / RECORD_FILE) or {}
        if checkpoint is None and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        slot = min(set(range(self.jobs)) - {active.slot for active in self.active})
        arguments = run.arguments | ({} if checkpoint is None else {"resume_from_checkpoint": str(checkpoint)})
        command = make_command(self.plan.launch, self.plan.script, arguments, folder / OUTPUT_FOLDER, self.jobs)
        environment = make_environment(self.plan.launch, self.jobs, slot)
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        set_names = {name: environment[name] for name in names if name in environment}
        record = {
            **describe_run(run),
            "state": RUNNING,
            "reason": None,
            "exit_status": None,
            "command": command,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": None,
            "versions": list_versions(),
            "hardware": {**describe_hardware(), "jobs": self.jobs, **set_names},
        }
        if checkpoint is not None:
            record["resumed_from"] = [*earlier.get("resumed_from", []), checkpoint.name]
        with (folder / SCRIPT_LOG_FILE).open("wb" if checkpoint is None else "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it through `stop` alone, and `stop` reaches what it starts
            )
        active = ActiveRun(run, folder, process, slot, record, time.monotonic() - (earlier.get("seconds") or 0.0))
        self.active.append(active)
        write_json(folder / RECORD_FILE, {**record, "pid": process.pid})

    def _find_checkpoint(self, run: PlannedRun, folder: Path) -> Path | None:
        """Return the checkpoint from which to go on with a run that was cut off; None: it starts anew."""
        state = (read_json(folder / RECORD_FILE) or {}).get("state")
        if not self.resume or state not in (INTERRUPTED, RUNNING):
            return None
        return find_checkpoint(folder / OUTPUT_FOLDER)

    def _follow_runs(self) -> None:
        for active in list(self.active):
            is_over = active.process.poll() is not None
            self._read_progress(active)
            if is_over:
                self._end(active)
            elif time.monotonic() > active.kill_at:
                active.kill()

    def _read_progress(self, active: ActiveRun) -> None:
        if active.fingerprint is None:
            active.fingerprint = read_json(active.output / FINGERPRINT_FILE)
            self._compare_fingerprint(active.run, active.fingerprint)
        if not active.trace.read_new(active.output / LOG_FILE):
            return
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
        self._record_end(active, state, reason, status)
        self.active.remove(active)
        if state in (FINISHED, DIVERGED):
            self.on_trial = None
            self._warn_of_missing_metrics(active)
        if state == FAILED and self.on_trial is not None and self._is_refusal(reason, status):
            self.refused.append(active)
            if active.run.name == self.on_trial:
                for refused in self.refused:  # they are tried again once the cause is gone
                    write_json(refused.folder / RECORD_FILE, {**refused.record, "state": INTERRUPTED})
                words = (reason or "").removeprefix("error: ")
                raise InputError(f"the first run was refused: {words} (log: {active.folder / SCRIPT_LOG_FILE})")

    def _judge(self, active: ActiveRun, status: int) -> tuple[str, str | None]:
        """Return state and reason of a run whose process has ended."""
        if status == 0:
            return judge_run(active.output, self.plan.metric)
        if active.stop_as:
            return active.stop_as
        if active.trace.not_finite:
            return DIVERGED, active.trace.not_finite
        line = find_error_line(active.folder / SCRIPT_LOG_FILE)
        if status > 0:
            return FAILED, line or f"exit status {status} without a word"
        name = next((s.name for s in signal.Signals if s == -status), str(-status))
        hint = ", out of memory?" if name == "SIGKILL" else ""
        return FAILED, f"ended by signal {name}{hint}" + (f"; last line: {line}" if line else "")

    def _is_refusal(self, reason: str | None, status: int) -> bool:
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
        for step in steps if rule else []:
            loss, best = active.trace.eval_losses[step], min(self.eval_losses[step].values())
            if step >= rule.after_step and loss > rule.above * best:
                return f"the validation loss at step {step}, {loss:.4g}, is above {rule.above:g} x the best at that step, {best:.4g}"
        return None

    def _compare_fingerprint(self, run: PlannedRun, fingerprint: dict[str, Any] | None) -> None:
        """Warn if this run did not begin as the first one of its seed with the same arguments of model and data."""
        if fingerprint is None:
            return
        key = (run.seed, list_model_arguments(run))
        name, first = self.fingerprints.setdefault(key, (run.name, fingerprint))
        difference = find_difference(first, fingerprint)
        if difference:
            self.progress.warn(f"{run.name} has {difference} than {name}, though both have seed {run.seed}")

    def _warn_of_missing_metrics(self, active: ActiveRun) -> None:
        missing = find_missing_metrics(active.output, self.plan.test_metrics) - self.metrics_missed
        if missing:
            self.metrics_missed |= missing
            self.progress.warn(
                f"{active.run.name} left no {', '.join(sorted(missing))}, named in test_metrics; does the script test (do_predict)?"
            )
