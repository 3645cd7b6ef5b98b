"""What a run has left in its folder so far: its record, its losses, its fingerprint; and what these say about how it ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...records.checkpoints import find_defect, find_newest_whole, list_checkpoints
from ...records.run_files import RESULTS_FILE, STATE_FILE
from ..planning.axes import suggest
from ..reading.fingerprints import PARTS
from ..reading.results import DIVERGED, FAILED, FINISHED, LOG_FILE

_BESIDE = ("_runtime", "_per_second", "_samples", "_model_preparation_time")  # what stands beside metrics
ERROR_LINE = re.compile(r"^((\S+\.py: )?error: |[\w.]*(Error|Exception|Interrupt|Exit)\b)")  # of ours, argparse, Python
LAUNCHER_LINE = re.compile(r"^[\w.]*(ChildFailedError|CalledProcessError)\b")
RANK = re.compile(
    r"^\[rank\d+\]:\s|\s\(process \d+\)$"
)  # by which torch and this package's scripts tell processes apart
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
OPTIMIZER_STATE = ("optimizer", "global_step")  # the Trainer's and FSDP's, DeepSpeed's
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_FILES += ("vocab.*", "merges.txt", "*.spm", "spiece.model", "sentencepiece*.model", "chat_template*")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping a JSON file holds; None if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping so that no reader meets half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


# -------------------------------------------------------------------------------------------------------- the losses


@dataclass
class LossTrace:
    """The losses a run has logged, in nats; `read_new` takes in what `run_log.jsonl` has gained since the last call.

    Attributes:
        step: the last optimizer step logged.
        epoch: the epoch at that step, None if unknown.
        train_loss, eval_loss: the last ones logged.
        first_train_loss: the first training loss logged.
        eval_losses: validation losses by optimizer step.
        not_finite: where the first loss that is no finite number occurred, "" if all are.
        num_entries: how many entries have been taken in.
    """

    step: int = 0
    epoch: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    first_train_loss: float | None = None
    eval_losses: dict[int, float] = field(default_factory=dict)
    not_finite: str = ""
    num_entries: int = 0
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
        return bool(whole)

    def add(self, entry: dict[str, Any]) -> None:
        """Take in one logged entry."""
        self.num_entries += 1
        step = entry.get("step")
        self.step = max(self.step, int(step)) if isinstance(step, int | float) else self.step
        self.epoch = entry.get("epoch", self.epoch)
        if "loss" in entry:
            self.train_loss = self._take(entry["loss"], "training")
            self.first_train_loss = self.train_loss if self.first_train_loss is None else self.first_train_loss
        if "eval_loss" in entry:
            self.eval_loss = self._take(entry["eval_loss"], "validation")
            self.eval_losses[self.step] = self.eval_loss

    def _take(self, value: Any, kind: str) -> float:
        loss = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not math.isfinite(loss) and not self.not_finite:
            self.not_finite = f"the {kind} loss is {loss} at step {self.step}"
        return loss

    @property
    def start(self) -> tuple[float, str] | None:
        """The loss at the start and what it is: the validation loss at step 0, else the first training loss."""
        if 0 in self.eval_losses:
            return self.eval_losses[0], "the validation loss at the start"
        if self.first_train_loss is not None:
            return self.first_train_loss, "the first training loss"
        return None


def read_losses(output: Path) -> LossTrace:
    """Read the losses of an output folder: of `run_log.jsonl`, or else of `trainer_state.json`."""
    trace = LossTrace()
    if not trace.read_new(output / LOG_FILE):
        for entry in (read_json(output / STATE_FILE) or {}).get("log_history", []):
            trace.add(entry)
    return trace


# ---------------------------------------------------------------------------------------------------------- the end


def judge_run(output: Path, metric: str) -> tuple[str, str | None]:
    """Judge a run whose script ended with exit status 0.

    Returns:
        State and reason: `diverged` if a loss was no finite number or the last validation loss is above that at the start;
        `failed` if the metric by which runs are compared is missing from results and log; else `finished` and None.
    """
    trace, results = read_losses(output), read_json(output / RESULTS_FILE) or {}
    final = results.get("eval_loss", trace.eval_loss)
    if "eval_loss" in results:
        trace.add({"eval_loss": final})
    if trace.not_finite:
        return DIVERGED, trace.not_finite
    if find_metric(output, metric) is None:
        return FAILED, f"the script ended well but left no {metric}, {_describe_found(output, metric)}"
    if final is not None and trace.start is not None and final > trace.start[0]:
        return DIVERGED, f"the final validation loss, {final:.4g}, is above {trace.start[1]}, {trace.start[0]:.4g}"
    return FINISHED, None


@dataclass(frozen=True)
class FoundMetric:
    """A metric's value at the end of a run; `step` is that of the log's entry, None where it is from `all_results.json`."""

    value: float
    step: int | None = None


def find_metric(output: Path, name: str) -> FoundMetric | None:
    """Find a metric in `all_results.json`, or else the last that was logged; None if there is none."""
    value = (read_json(output / RESULTS_FILE) or {}).get(name)
    if value is not None:
        return FoundMetric(value)
    logged = [entry for entry in _read_log(output) if entry.get(name) is not None]
    return FoundMetric(logged[-1][name], logged[-1].get("step")) if logged else None


def count_entries(log: Path, step: int) -> int:
    """Count the entries of a `run_log.jsonl` up to this optimizer step."""
    return sum(entry.get("step", 0) <= step for entry in _read_lines(log))


def _read_log(output: Path) -> list[dict[str, Any]]:
    return _read_lines(output / LOG_FILE) or (read_json(output / STATE_FILE) or {}).get("log_history", [])


def _read_lines(log: Path) -> list[dict[str, Any]]:
    entries = []
    with contextlib.suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                entries += [entry] if isinstance(entry, dict) else []
    return entries


def _describe_found(output: Path, metric: str) -> str:
    """Say where the metric was sought, what there was, and what to do."""
    entries = [read_json(output / RESULTS_FILE) or {}, *_read_log(output)]
    found = sorted({name for entry in entries for name in entry if name.startswith(("eval_", "predict_", "test_"))})
    found = [name for name in found if not name.endswith(_BESIDE)]
    where = f"neither in {RESULTS_FILE} nor in its log"
    if found:
        return f"{where}{suggest(metric, found)}; it left {', '.join(found[:8])}: name one of them as metric"
    return f"{where}; let it evaluate, by eval_strategy: steps in `arguments` or trainer.evaluate() at the end of the script"


def find_missing_metrics(output: Path, names: Iterable[str]) -> set[str]:
    """Return those of the names that `all_results.json` lacks."""
    return set(names) - set(read_json(output / RESULTS_FILE) or {})


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
    """Return the newest whole checkpoint with the optimizer's state: what a cut-off run can go on from; None if there is none."""
    newest, _ = find_newest_whole(list_checkpoints(output), _find_obstacle)
    return None if newest is None else Path(newest)


def _find_obstacle(folder: str) -> str | None:
    defect = find_defect(folder)
    if defect is None and not any(name.startswith(OPTIMIZER_STATE) for name in os.listdir(folder)):
        return "it holds no optimizer state"
    return defect


def remove_models(output: Path) -> None:
    """Remove weights, tokenizers and checkpoints from an output folder; everything a report reads stays."""
    for pattern in MODEL_FILES + TOKENIZER_FILES:
        for file in output.glob(pattern):
            if file.is_file():
                file.unlink()
    for folder in output.glob("checkpoint-*"):
        if folder.is_dir():
            shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------ fingerprints


def find_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Say what `other` has that `one` has not: initial weights, batches or random state; None if they agree.

    A run that ended within four steps has fewer batches, and is compared as far as it goes.
    """
    for part, words in PARTS.items():
        first, second = one.get(part), other.get(part)
        if isinstance(first, list) and isinstance(second, list):
            num_shared = min(len(first), len(second))
            first, second = first[:num_shared], second[:num_shared]
        if first != second:
            return words
    return None
