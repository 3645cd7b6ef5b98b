"""One run as a process of its own: started, followed by its log, stopped, judged by what it leaves, and cleaned up after.

A run is `finished`; `diverged` if a loss was no finite number (it is stopped then), or the last validation loss is above that of an
evaluation at step 0; `failed` if its script ended with an error; or `interrupted`.
"""

from __future__ import annotations

import contextlib
import math
import platform
import re
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
from .plan import Plan, PlannedRun

GRACE_SECONDS = 10.0  # from SIGINT to SIGKILL
STOPPING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # schedulers' too
ERROR_LINE = re.compile(r"^((\S+\.py: )?error: |[\w.]*(Error|Exception|Interrupt|Exit)\b)")  # of ours, argparse, Python
LAUNCHER_LINE = re.compile(r"^[\w.]*(ChildFailedError|CalledProcessError)\b")
# By which torch and this package's scripts tell processes apart
RANK = re.compile(r"^\[rank\d+\]:\s|\s\(process \d+\)$")
LARGE = 2**20  # bytes of a file, from which on `keep_models: false` removes it


@dataclass
class LossTrace:
    """What a run has logged; `read_new` takes in what `run_log.jsonl` has gained since the last call. Losses are in nats.

    Attributes:
        has_logged: whether it has logged anything since it was started.
        step: the last optimizer step logged.
        epoch: the epoch at that step, None if unknown.
        train_loss, eval_loss: the last ones logged.
        start_loss: the validation loss at step 0, None if there is none.
        not_finite: where the first loss that is no finite number occurred, "" if all are.
    """

    has_logged: bool = False
    step: int = 0
    epoch: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    start_loss: float | None = None
    not_finite: str = ""
    _position: int = 0

    def read_new(self, path: Path) -> None:
        """Take in the new whole lines of the file."""
        with contextlib.suppress(OSError), path.open("rb") as file:
            if path.stat().st_size < self._position:
                self._position = 0  # a continued run has dropped what it will log again
            file.seek(self._position)
            for line in file:
                if line.endswith(b"\n"):
                    self._position += len(line)
                    self.has_logged = True
                    self.add(files.parse_entry(line))

    def add(self, entry: dict[str, Any]) -> None:
        """Take in one logged entry."""
        step = entry.get("step")
        self.step = max(self.step, int(step)) if isinstance(step, int | float) else self.step
        self.epoch = entry.get("epoch", self.epoch)
        if "loss" in entry:
            self.train_loss = self._take(entry["loss"], "training")
        if "eval_loss" in entry:
            self.eval_loss = self._take(entry["eval_loss"], "validation")
            self.start_loss = self.eval_loss if step == 0 else self.start_loss

    def _take(self, value: Any, kind: str) -> float:
        loss = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not math.isfinite(loss) and not self.not_finite:
            self.not_finite = f"the {kind} loss is {loss} at step {self.step}"
        return loss


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
    def output(self) -> Path:
        """The folder that its script writes into."""
        return self.folder / files.OUTPUT_FOLDER

    @property
    def seconds(self) -> float:
        """Seconds it has taken, those before it was cut off included."""
        return time.monotonic() - self.started

    def stop(self, state: str, reason: str) -> None:
        """Ask the process to end, once and if it has not; `kill` is due after the grace period."""
        if self.stop_as is None and self.process.poll() is None:
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
        if not plan.keep_models and state != files.INTERRUPTED and self.output.is_dir():  # a refused run has made none
            remove_models(self.output)
            self.record["models_removed"] = True
        files.write_json(self.folder / files.RECORD_FILE, self.record)
        return state

    def _judge(self, status: int, metric: str) -> tuple[str, str | None]:
        """Return state and reason at the end."""
        if self.stop_as:  # also where its script ends well on SIGINT, before it is through
            return self.stop_as
        if status == 0:
            return judge_output(self.output, metric)
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
    record, here = files.read_json(folder / files.RECORD_FILE) or {}, platform.node()
    if (record.get("state"), record.get("host", here)) != (files.RUNNING, here) or "pid" not in record:
        return False
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(record["pid"])
        # A process of that number that writes elsewhere is another one.
        if any(word.endswith(f"{folder.name}/{files.OUTPUT_FOLDER}") for word in process.cmdline()):
            launch.kill_tree(process.pid)
            process.wait(10)
            return True
    return False


def judge_output(output: Path, metric: str) -> tuple[str, str | None]:
    """Judge a run whose script ended with exit status 0.

    Returns:
        State and reason: `diverged` if a loss, or the metric by which runs are compared, was no finite number, or the last validation
        loss is above that of an evaluation at step 0 (a training loss is no measure of it); `failed` if the metric is neither among
        the results nor in the log; else `finished` and None.
    """
    trace, log, results = LossTrace(), files.read_log(output), files.read_json(output / files.FINAL_FILE) or {}
    for entry in [*log, {key: value for key, value in results.items() if key == "eval_loss"}]:
        trace.add(entry)
    value = next((e[metric] for e in [results, *reversed(log)] if isinstance(e.get(metric), int | float)), None)
    if not trace.not_finite and value is not None and not math.isfinite(value):
        trace.not_finite = f"{metric} is {value} at the end"
    if trace.not_finite:
        return files.DIVERGED, trace.not_finite
    if value is None:
        found = dict.fromkeys(sorted(name for entry in [results, *log] for name in entry if name.startswith("eval_")))
        return files.FAILED, (
            f"the script ended well but left no {metric}, neither in {files.FINAL_FILE} nor in its log"
            f" ({', '.join(found) or 'nothing was evaluated: set eval_strategy, or call trainer.evaluate()'})"
        )
    start, final = trace.start_loss, trace.eval_loss
    if final is not None and start is not None and trace.step > 0 and final > start:
        return files.DIVERGED, f"the final validation loss, {final:.4g}, is above that at the start, {start:.4g}"
    return files.FINISHED, None


def find_error_line(log: Path) -> str:
    """Return the line of a script's output that says why it failed: the last that names an error, or else the last one.

    What a launcher says about the processes it started names no cause.
    """
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    lines = [RANK.sub("", line).strip() for line in lines if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line) and not LAUNCHER_LINE.match(line)]
    return (errors or lines or [""])[-1][:500]


def find_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint that can be gone on from, with the Trainer's and the optimizer's state; None without one."""
    found = {}
    for folder in output.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        has_optimizer = any(folder.glob("optimizer*")) or any(folder.glob("global_step*"))
        if step.isdecimal() and has_optimizer and files.read_json(folder / files.STATE_FILE) is not None:
            found[int(step)] = folder
    return found[max(found)] if found else None


def remove_models(output: Path) -> None:
    """Remove checkpoints and large files, as weights are, from an output folder; everything a report reads stays."""
    for path in output.iterdir():
        if path.is_dir() and path.name.startswith("checkpoint-"):
            shutil.rmtree(path)
        elif path.is_file() and path.stat().st_size >= LARGE and path.name not in files.READ_BY_REPORTS:
            path.unlink()
