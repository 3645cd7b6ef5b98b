"""One run as a process of its own: started, followed by its log, stopped, and judged at its end."""

from __future__ import annotations

import contextlib
import platform
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from . import files
from .launch import compute_script_hash, kill_tree, make_command, make_environment, signal_group
from .machine import describe_hardware, list_versions
from .outcome import LossTrace, find_checkpoint, find_error_line, judge_output, remove_models
from .plan import Plan, PlannedRun

GRACE_SECONDS = 10.0  # from SIGINT to SIGKILL
STOPPING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # schedulers' too


@dataclass
class RunProcess:
    """A run whose process has been started and whose end has not been recorded."""

    run: PlannedRun
    folder: Path
    process: subprocess.Popen
    slot: int
    record: dict[str, Any]
    started: float
    checkpoint: Path | None = None  # that it was told to go on from
    fingerprint_stamp: int | None = None  # that of the file before it went on
    seconds_before: float = 0.0  # that it had taken when it was cut off
    trace: LossTrace = field(default_factory=LossTrace)
    fingerprint: dict[str, Any] | None = None
    num_evals_judged: int = 0
    stop_as: tuple[str, str] | None = None  # state and reason, once it has been told to stop
    kill_at: float = float("inf")

    @property
    def output(self) -> Path:
        """The script's output folder."""
        return self.folder / files.OUTPUT_FOLDER

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

    @property
    def seconds_left(self) -> float | None:
        """Seconds until its last step at its own pace, None if unknown."""
        pace, total = self.trace.seconds_per_step, self.num_steps
        return None if pace is None or total is None else max(0, total - self.trace.step) * pace

    def read_progress(self) -> bool:
        """Read what it has logged since; say whether there was anything."""
        if self.fingerprint is None:
            self.fingerprint = files.read_json(self.output / files.FINGERPRINT_FILE)
        return self.trace.read_new(self.output / files.LOG_FILE)

    def has_begun_again(self) -> bool:
        """Whether a run that was told to go on from a checkpoint has begun at step 0 again: it wrote a new fingerprint."""
        return (
            self.checkpoint is not None and _get_stamp(self.output / files.FINGERPRINT_FILE) != self.fingerprint_stamp
        )

    def stop(self, state: str, reason: str) -> None:
        """Ask the process to end, once; `kill` is due after the grace period."""
        if self.stop_as is None:
            self.stop_as = (state, reason)
            self.kill_at = time.monotonic() + GRACE_SECONDS
            signal_group(self.process.pid, signal.SIGINT)

    def kill(self) -> int:
        """End the process and those it started; return the exit status."""
        kill_tree(self.process.pid)
        return self.process.wait()

    def judge(self, status: int, metric: str, is_being_stopped: bool = False) -> tuple[str, str | None]:
        """Return state and reason at the end; `is_being_stopped` by a scheduler, whose signals reach the scripts too."""
        if status == 0:
            return judge_output(self.output, metric)
        if self.stop_as:
            return self.stop_as
        if self.trace.not_finite:
            return files.DIVERGED, self.trace.not_finite
        if is_being_stopped or -status in STOPPING_SIGNALS:
            return files.INTERRUPTED, "it was stopped from outside"
        line = find_error_line(self.folder / files.SCRIPT_LOG_FILE)
        if status > 0:
            return files.FAILED, line or f"exit status {status} without a word"
        name = next((s.name for s in signal.Signals if s == -status), str(-status))
        hint = ", out of memory?" if name == "SIGKILL" else ""
        return files.FAILED, f"ended by signal {name}{hint}" + (f"; last line: {line}" if line else "")

    def write_end(self, state: str, reason: str | None, status: int, keep_models: bool) -> None:
        """Record how it ended."""
        self.record |= {"state": state, "reason": reason, "exit_status": status, "seconds": round(self.seconds, 3)}
        if not keep_models and state != files.INTERRUPTED:
            remove_models(self.output)
            self.record["models_removed"] = True
        files.write_json(self.folder / files.RECORD_FILE, self.record)


def start_process(
    plan: Plan, run: PlannedRun, folder: Path, slot: int, jobs: int, devices: tuple[str, ...] | None, resume: bool
) -> RunProcess:
    """Start a run in its folder: from its newest checkpoint if it is to `resume` and has one, else in an emptied folder."""
    earlier = files.read_json(folder / files.RECORD_FILE) or {}
    checkpoint = None
    if resume and earlier.get("state") in (files.INTERRUPTED, files.RUNNING) and not earlier.get("cannot_resume"):
        checkpoint = find_checkpoint(folder / files.OUTPUT_FOLDER)
    if checkpoint is None and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = run.arguments | ({} if checkpoint is None else {"resume_from_checkpoint": str(checkpoint)})
    command = make_command(plan.launch, plan.script, arguments, folder / files.OUTPUT_FOLDER, jobs)
    environment = make_environment(plan.launch, run.arguments, jobs, slot, devices)
    shares = {name: environment[name] for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if name in environment}
    record = {
        **plan.describe_run(run),
        "state": files.RUNNING,
        "reason": None,
        "exit_status": None,
        "command": command,
        "script_hash": compute_script_hash(plan.script),
        "host": platform.node(),
        "started": datetime.now().astimezone().isoformat(),
        "seconds": None,
        "versions": list_versions(),
        "hardware": {**describe_hardware(), "jobs": jobs, **shares},
    }
    if checkpoint is not None:
        record["resumed_from"] = [*earlier.get("resumed_from", []), checkpoint.name]
    if earlier.get("cannot_resume"):
        record["cannot_resume"] = True
    stamp = _get_stamp(folder / files.OUTPUT_FOLDER / files.FINGERPRINT_FILE)
    with (folder / files.SCRIPT_LOG_FILE).open("wb" if checkpoint is None else "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it through `stop` alone, and `stop` reaches what it starts
        )
    files.write_json(folder / files.RECORD_FILE, {**record, "pid": process.pid})
    before = 0.0 if checkpoint is None else earlier.get("seconds") or 0.0
    started = time.monotonic() - before
    return RunProcess(run, folder, process, slot, record, started, checkpoint, stamp, before)


def end_left_run(folder: Path) -> bool:
    """End the process of a run whose worker was killed, if it is on this machine; call it while holding the run's claim.

    Returns:
        Whether there was one.
    """
    record = files.read_json(folder / files.RECORD_FILE) or {}
    if (
        record.get("state") != files.RUNNING
        or "pid" not in record
        or record.get("host", platform.node()) != platform.node()
    ):
        return False
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(record["pid"])
        # A process of that number that writes elsewhere is another one.
        if any(word.endswith(f"{folder.name}/{files.OUTPUT_FOLDER}") for word in process.cmdline()):
            kill_tree(process.pid)
            process.wait(10)
            return True
    return False


def _get_stamp(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None
