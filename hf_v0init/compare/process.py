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

from . import files, launch
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
    started: float  # by `time.monotonic`, less the seconds that it had taken before it was cut off
    trace: LossTrace = field(default_factory=LossTrace)
    stop_as: tuple[str, str] | None = None  # state and reason, once it has been told to stop
    kill_at: float = float("inf")

    @property
    def seconds(self) -> float:
        """Seconds it has taken, those before it was cut off included."""
        return time.monotonic() - self.started

    def read_progress(self) -> None:
        """Read what it has logged since."""
        self.trace.read_new(self.folder / files.OUTPUT_FOLDER / files.LOG_FILE)

    def stop(self, state: str, reason: str) -> None:
        """Ask the process to end, once; `kill` is due after the grace period."""
        if self.stop_as is None:
            self.stop_as = (state, reason)
            self.kill_at = time.monotonic() + GRACE_SECONDS
            launch.signal_group(self.process.pid, signal.SIGINT)

    def kill(self) -> int:
        """End the process and those it started; return the exit status."""
        launch.kill_tree(self.process.pid)
        return self.process.wait()

    def write_end(self, plan: Plan) -> str:
        """End what is left of it, record how it ended, and return its state."""
        status = self.kill()
        state, reason = self._judge(status, plan.metric)
        self.record |= {"state": state, "reason": reason, "exit_status": status, "seconds": round(self.seconds, 3)}
        output = self.folder / files.OUTPUT_FOLDER
        if not plan.keep_models and state != files.INTERRUPTED and output.is_dir():  # a refused run has made none
            remove_models(output)
            self.record["models_removed"] = True
        files.write_json(self.folder / files.RECORD_FILE, self.record)
        return state

    def _judge(self, status: int, metric: str) -> tuple[str, str | None]:
        """Return state and reason at the end."""
        if status == 0:
            return judge_output(self.folder / files.OUTPUT_FOLDER, metric)
        if self.stop_as:
            return self.stop_as
        if self.trace.not_finite:
            return files.DIVERGED, self.trace.not_finite
        if -status in STOPPING_SIGNALS:
            return files.INTERRUPTED, "it was stopped from outside"
        line = find_error_line(self.folder / files.SCRIPT_LOG_FILE)
        if status > 0:
            return files.FAILED, line or f"exit status {status} without a word"
        hint = ", out of memory?" if -status == signal.SIGKILL else ""
        return files.FAILED, f"ended by {signal.Signals(-status).name}{hint}; last line: {line}"


def start_process(
    plan: Plan, run: PlannedRun, folder: Path, slot: int, jobs: int, devices: tuple[str, ...] | None, resume: bool
) -> RunProcess:
    """Start a run in its folder: from its newest checkpoint if it is to `resume` and has one, else in an emptied folder."""
    earlier = files.read_json(folder / files.RECORD_FILE) or {}
    checkpoint = None
    if resume and earlier.get("state") in (files.INTERRUPTED, files.RUNNING):
        checkpoint = find_checkpoint(folder / files.OUTPUT_FOLDER)
    if checkpoint is None and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = run.arguments | ({} if checkpoint is None else {"resume_from_checkpoint": str(checkpoint)})
    command = launch.make_command(plan.launch, plan.script, arguments, folder / files.OUTPUT_FOLDER, jobs)
    environment = launch.make_environment(plan.launch, run.arguments, jobs, slot, devices)
    shares = {name: environment[name] for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if name in environment}
    record = {
        **plan.describe_run(run),
        "state": files.RUNNING,
        "reason": None,
        "exit_status": None,
        "command": command,
        "host": platform.node(),
        "started": datetime.now().astimezone().isoformat(),
        "seconds": None,
        "versions": launch.list_versions(),
        "hardware": {**launch.describe_hardware(), "jobs": jobs, **shares},
    }
    if checkpoint is not None:
        record["resumed_from"] = [*earlier.get("resumed_from", []), checkpoint.name]
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
    return RunProcess(run, folder, process, slot, record, time.monotonic() - before)


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
            launch.kill_tree(process.pid)
            process.wait(10)
            return True
    return False
