"""One run as a process of its own: started, followed by its log, stopped, and judged at its end.

A run is `finished`; `diverged` if a loss was no finite number (it is stopped then), or the last validation loss is above that of an
evaluation at step 0; `failed` if its script ended with an error; `pruned`; or `interrupted`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
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

from . import files
from .axes import suggest
from .launch import compute_script_hash, kill_tree, make_command, make_environment, signal_group
from .plan import Plan, PlannedRun

GRACE_SECONDS = 10.0  # from SIGINT to SIGKILL
STOPPING_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # schedulers' too
ERROR_LINE = re.compile(r"^((\S+\.py: )?error: |[\w.]*(Error|Exception|Interrupt|Exit)\b)")  # of ours, argparse, Python
LAUNCHER_LINE = re.compile(r"^[\w.]*(ChildFailedError|CalledProcessError)\b")
RANK = re.compile(
    r"^\[rank\d+\]:\s|\s\(process \d+\)$"
)  # by which torch and this package's scripts tell processes apart
_BESIDE = ("_runtime", "_per_second", "_samples", "_model_preparation_time")  # what stands beside metrics
# What `keep_models: false` removes: weights, tokenizers, checkpoints
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "vocab.*",
)
MODEL_FILES += (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MODEL_FILES += ("merges.txt", "*.spm", "spiece.model", "sentencepiece*.model", "chat_template*")
PACKAGES = ("hf_v0init", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "pytorch-warmup")
PACKAGES += ("pytorch-optimizer", "schedulefree", "sacrebleu")


@dataclass
class LossTrace:
    """What a run has logged; `read_new` takes in what `run_log.jsonl` has gained since the last call. Losses are in nats.

    Attributes:
        step: the last optimizer step logged.
        first_step: the first that was logged after the last start.
        epoch: the epoch at that step, None if unknown.
        train_loss, eval_loss: the last ones logged.
        eval_losses: validation losses by optimizer step.
        not_finite: where the first loss that is no finite number occurred, "" if all are.
        clock: step and `time.monotonic()` of the first and the last look at which there was something new.
    """

    step: int = 0
    first_step: int | None = None
    epoch: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_losses: dict[int, float] = field(default_factory=dict)
    not_finite: str = ""
    clock: list[tuple[int, float]] = field(default_factory=list)
    _position: int = 0

    def read_new(self, path: Path) -> bool:
        """Take in the new whole lines of the file; say whether there were any."""
        try:
            with path.open("rb") as file:
                if path.stat().st_size < self._position:
                    self._position = 0  # a continued run has dropped what it will log again
                file.seek(self._position)
                content = file.read()
        except OSError:
            return False
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    self.add(entry)
        if whole:
            self.clock = [*self.clock[:1], (self.step, time.monotonic())]
        return bool(whole)

    def add(self, entry: dict[str, Any]) -> None:
        """Take in one logged entry."""
        step = entry.get("step")
        self.step = max(self.step, int(step)) if isinstance(step, int | float) else self.step
        self.first_step = self.step if self.first_step is None else self.first_step
        self.epoch = entry.get("epoch", self.epoch)
        if "loss" in entry:
            self.train_loss = self._take(entry["loss"], "training")
        if "eval_loss" in entry:
            self.eval_loss = self._take(entry["eval_loss"], "validation")
            self.eval_losses[self.step] = self.eval_loss

    def _take(self, value: Any, kind: str) -> float:
        loss = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not math.isfinite(loss) and not self.not_finite:
            self.not_finite = f"the {kind} loss is {loss} at step {self.step}"
        return loss

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds of wall-clock time per optimizer step, evaluations included; None until two steps have been logged."""
        if len(self.clock) < 2 or self.clock[1][0] <= self.clock[0][0]:
            return None
        return (self.clock[1][1] - self.clock[0][1]) / (self.clock[1][0] - self.clock[0][0])


def read_losses(output: Path) -> LossTrace:
    """Read the losses of an output folder: of `run_log.jsonl`, or else of `trainer_state.json`."""
    trace = LossTrace()
    for entry in files.read_log(output):
        trace.add(entry)
    return trace


def judge_output(output: Path, metric: str) -> tuple[str, str | None]:
    """Judge a run whose script ended with exit status 0.

    Returns:
        State and reason: `diverged` if a loss, or the metric by which runs are compared, was no finite number, or the last validation
        loss is above that of an evaluation at step 0 (a training loss is no measure of it); `failed` if the metric is neither among
        the results nor in the log; else `finished` and None.
    """
    trace, results = read_losses(output), files.read_json(output / files.FINAL_FILE) or {}
    final = results.get("eval_loss", trace.eval_loss)
    if "eval_loss" in results:
        trace.add({"eval_loss": final})
    value = find_metric(output, metric)
    if not trace.not_finite and value is not None and not math.isfinite(value[0]):
        trace.not_finite = f"{metric} is {value[0]} at the end"
    if trace.not_finite:
        return files.DIVERGED, trace.not_finite
    if value is None:
        return files.FAILED, f"the script ended well but left no {metric}, {_describe_found(output, metric)}"
    start = trace.eval_losses.get(0)
    if final is not None and start is not None and trace.step > 0 and final > start:
        return (
            files.DIVERGED,
            f"the final validation loss, {final:.4g}, is above the validation loss at the start, {start:.4g}",
        )
    return files.FINISHED, None


def find_metric(output: Path, name: str) -> tuple[float, int | None] | None:
    """Find a metric in `all_results.json` (its step is then None), or else the last that was logged; None if there is none."""
    value = (files.read_json(output / files.FINAL_FILE) or {}).get(name)
    if isinstance(value, int | float):
        return value, None
    logged = [entry for entry in files.read_log(output) if isinstance(entry.get(name), int | float)]
    return (logged[-1][name], logged[-1].get("step")) if logged else None


def _describe_found(output: Path, metric: str) -> str:
    """Say where the metric was sought, what there was, and what to do."""
    entries = [files.read_json(output / files.FINAL_FILE) or {}, *files.read_log(output)]
    found = sorted({name for entry in entries for name in entry if name.startswith(("eval_", "predict_", "test_"))})
    found = [name for name in found if not name.endswith(_BESIDE)]
    where = f"neither in {files.FINAL_FILE} nor in its log"
    if found:
        return f"{where}{suggest(metric, found)}; it left {', '.join(found[:8])}: name one of them as metric"
    return f"{where}; let it evaluate, by eval_strategy: steps in `arguments` or trainer.evaluate() at the end of the script"


def find_error_line(log: Path) -> str:
    """Return the line of a script's output that says why it failed: the last that names an error, or else the last one.

    What a launcher says about the processes it started names no cause.
    """
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    lines = [RANK.sub("", line).strip() for line in lines if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line) and not LAUNCHER_LINE.match(line)]
    return (errors or lines or [""])[-1][:500]


def find_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint that can be gone on from, with the Trainer's and the optimizer's state; None without one."""
    found = {}
    for folder in output.glob("checkpoint-*"):
        step = folder.name.rsplit("-", 1)[-1]
        has_optimizer = any(folder.glob("optimizer*")) or any(folder.glob("global_step*"))
        if step.isdecimal() and has_optimizer and files.read_json(folder / "trainer_state.json") is not None:
            found[int(step)] = folder
    return found[max(found)] if found else None


def remove_models(output: Path) -> None:
    """Remove weights, tokenizers and checkpoints from an output folder; everything a report reads stays."""
    for pattern in MODEL_FILES:
        for file in output.glob(pattern):
            if file.is_file():
                file.unlink()
    for folder in output.glob("checkpoint-*"):
        if folder.is_dir():
            shutil.rmtree(folder)


# -------------------------------------------------------------------------------------------------------- the process


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


# -------------------------------------------------------------------------------------------- what it was made with


@functools.cache
def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that numbers depend on. Imports none of them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@functools.cache
def describe_hardware() -> dict[str, Any]:
    """Return the system, the CPU, its cores, the memory in GiB, and the names of NVIDIA GPUs if there are any."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": name,
        "cores": os.cpu_count() or 1,
    }
    found["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found["gpus"] = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return found
