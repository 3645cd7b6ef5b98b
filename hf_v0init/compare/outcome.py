"""What a run leaves: its log as it grows, how it ended, checkpoints and models.

A run is `finished`; `diverged` if a loss was no finite number (it is stopped then), or the last validation loss is above that of an
evaluation at step 0; `failed` if its script ended with an error; `pruned`; or `interrupted`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files
from .axes import suggest

ERROR_LINE = re.compile(r"^((\S+\.py: )?error: |[\w.]*(Error|Exception|Interrupt|Exit)\b)")  # of ours, argparse, Python
LAUNCHER_LINE = re.compile(r"^[\w.]*(ChildFailedError|CalledProcessError)\b")
# By which torch and this package's scripts tell processes apart
RANK = re.compile(r"^\[rank\d+\]:\s|\s\(process \d+\)$")
BESIDE_METRICS = ("_runtime", "_per_second", "_samples", "_model_preparation_time")
# What `keep_models: false` removes: weights, tokenizers, checkpoints
MODEL_FILES = (
    "*.safetensors *.safetensors.index.json *.bin *.bin.index.json *.pt *.pth *.ckpt vocab.* tokenizer.json tokenizer.model "
    "tokenizer_config.json special_tokens_map.json added_tokens.json merges.txt *.spm spiece.model sentencepiece*.model chat_template*"
).split()


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
    found = [name for name in found if not name.endswith(BESIDE_METRICS)]
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
