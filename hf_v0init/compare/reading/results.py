"""Reads a folder of runs: what each was, how it ended, and its losses, clocks, costs and fingerprint.

"Loss" stands throughout for the metric that runs are compared by, also where more of it is better (`greater_is_better`). Nothing but
`plan.json` is required. A run that has not started, is running, was killed or diverged is read as far as its files
go; what is damaged is named in `RunResult.problems`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError
from ...records.report import read_report
from ...records.run_files import RESULTS_FILE, STATE_FILE
from ..planning.metrics import find_direction

PLAN_FILE, RECORD_FILE = "plan.json", "record.json"
RUNS_FOLDER, OUTPUT_FOLDER = "runs", "output"
LOG_FILE, FINGERPRINT_FILE, DIAGNOSTICS_FILE = "run_log.jsonl", "fingerprint.json", "v0_diagnostics.json"

PENDING, RUNNING, FINISHED, DIVERGED = "pending", "running", "finished", "diverged"
FAILED, INTERRUPTED, STOPPED_EARLY = "failed", "interrupted", "stopped_early"
REACHED = "reached_step"  # in a comparison that was taken back to one step: `interim.take_back`
STATES = (FINISHED, REACHED, DIVERGED, STOPPED_EARLY, FAILED, INTERRUPTED, RUNNING, PENDING)
COUNTED = (FINISHED, REACHED, DIVERGED, STOPPED_EARLY)  # runs whose outcome is known and due to the arm

START_SOURCES = {
    "evaluation": "validation loss before the first step",
    "pass": "mean loss of the training samples in the statistics pass, before the first step",
    "training": "first training loss that was logged (median over the runs of the seed)",
}


@dataclass
class RunResult:
    """One run. Losses are means as the script reports them (nats per token for this project's), steps are optimizer steps.

    `train_seconds` is the time of training without evaluations, with the statistics pass; `v0_seconds` that of the pass;
    `v0_samples` the samples it read and `v0_extra_steps` those samples in steps of the run's effective batch. None: not known.
    `held_back` is the length in steps that was measured at the run's beginning, None where none was; its time is in `v0_seconds`.
    `recorded` is what a copy without curves has kept of them: its lowest loss, and what it took to reach one target.
    """

    name: str
    arm: str
    v0: str
    warmup: str
    optimizer: str
    other: dict
    learning_rate: float
    seed: int
    arguments: dict = field(default_factory=dict)
    launch: str = "python"
    state: str = PENDING
    reason: str | None = None
    exit_status: int | None = None
    versions: dict = field(default_factory=dict)
    hardware: dict = field(default_factory=dict)
    num_steps: int | None = None
    train_steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    eval_seconds: list[float | None] = field(default_factory=list)  # clock `train_seconds` at each evaluation
    final_loss: float | None = None
    start_loss: float | None = None
    start_source: str | None = None
    metrics: dict = field(default_factory=dict)
    seconds: float | None = None
    train_seconds: float | None = None
    v0_seconds: float | None = None
    v0_samples: int | None = None
    v0_extra_steps: float | None = None
    held_back: int | None = None
    fingerprint: dict | None = None
    diagnostics_path: Path | None = None
    problems: list[str] = field(default_factory=list)
    greater_is_better: bool = False
    recorded: dict[str, float | None] = field(default_factory=dict)

    @property
    def is_counted(self) -> bool:
        """Whether the run has an outcome: it finished (or reached the step asked about), diverged or was stopped early."""
        return self.state in COUNTED and self.scored_loss is not None

    @property
    def scored_loss(self) -> float | None:
        """The loss the run counts with: its final one; that at start if it diverged (infinitely bad where that is unknown)."""
        if self.state == DIVERGED:
            worst = -math.inf if self.greater_is_better else math.inf
            return worst if self.start_loss is None else self.start_loss
        return self.final_loss

    @property
    def best_loss(self) -> float | None:
        """The best validation loss along the run; `scored_loss` if there is none."""
        finite = [loss for loss in self.eval_losses if math.isfinite(loss)]
        if not finite:
            return self.recorded.get("best_loss", self.scored_loss)
        return max(finite) if self.greater_is_better else min(finite)

    @property
    def has_curve(self) -> bool:
        """Whether the losses between start and end are known."""
        return bool(self.eval_losses)

    def read_diagnostics(self) -> dict | None:
        """Read the run's `v0_diagnostics.json`; None if there is none or it is damaged, which is then among the problems."""
        if self.diagnostics_path is None:
            return None
        content = _read_json(self.diagnostics_path, self.problems)
        if content is None:
            self.diagnostics_path = None  # named once
        return content


@dataclass
class Comparison:
    """A plan and what has come of its runs, in the plan's order; at the end of each, or all `at_step`."""

    folder: Path
    title: str
    pocket: bool
    script: str
    metric: str
    test_metrics: list[str]
    published: list[str]
    runs: list[RunResult]
    plan: dict
    at_step: int | None = None
    greater_is_better: bool = False

    @property
    def learning_rates(self) -> list[float]:
        """The learning rates of the plan, ascending."""
        return sorted({run.learning_rate for run in self.runs})

    @property
    def seeds(self) -> list[int]:
        """The seeds of the plan, ascending."""
        return sorted({run.seed for run in self.runs})

    def count(self, *states: str) -> int:
        """Count the runs in any of these states."""
        return sum(run.state in states for run in self.runs)


def read_comparison(folder: str | Path) -> Comparison:
    """Read `plan.json` of a folder and every run it names, as far as it has come.

    Raises:
        InputError: there is no whole `plan.json`; its metric may get better either way.
    """
    folder = Path(folder)
    try:
        plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        entries = plan["runs"]
        metric = plan.get("metric") or "eval_loss"
        greater = find_direction(metric, plan.get("greater_is_better"))
        runs = [read_result(folder / RUNS_FOLDER / entry["name"], entry, metric, greater) for entry in entries]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: no comparison there ({PLAN_FILE} cannot be read: {error!r}); give the --output_dir of `hf-v0init compare`"
        ) from error
    _share_start_losses(runs, metric)
    return make_comparison(folder, plan, runs)


def make_comparison(folder: Path, plan: dict, runs: list[RunResult]) -> Comparison:
    """Put what the plan says and the runs together."""
    metric = plan.get("metric") or "eval_loss"
    for run in runs:
        run.launch = str(plan.get("launch") or "python")
    return Comparison(
        folder=folder,
        title=plan.get("title") or "Comparison",
        pocket=bool(plan.get("pocket")),
        script=str(plan.get("script") or ""),
        metric=metric,
        test_metrics=list(plan.get("test_metrics") or []),
        published=list(plan.get("published") or []),
        runs=runs,
        plan=plan,
        at_step=plan.get("at_step"),
        greater_is_better=find_direction(metric, plan.get("greater_is_better")),
    )


def read_result(folder: Path, entry: dict, metric: str = "eval_loss", greater_is_better: bool = False) -> RunResult:
    """Read one run's folder; `entry` is the run's entry in the plan, `metric` the validation loss's name.

    A run that finished with a loss that is not a finite number has diverged, whatever its record says.

    Raises:
        KeyError: the entry lacks one of name, arm, learning_rate, seed.
    """
    run = RunResult(
        name=entry["name"],
        arm=entry["arm"],
        v0=str(entry.get("v0") or "zeros"),
        warmup=str(entry.get("warmup") or "none"),
        optimizer=str(entry.get("optimizer") or "adamw"),
        other=dict(entry.get("other") or {}),
        learning_rate=float(entry["learning_rate"]),
        seed=int(entry["seed"]),
        arguments=dict(entry.get("arguments") or {}),
        greater_is_better=greater_is_better,
    )
    record = _read_json(folder / RECORD_FILE, run.problems)
    if record is not None:
        run.state = record.get("state") if record.get("state") in STATES else RUNNING
        run.reason, run.exit_status = record.get("reason"), record.get("exit_status")
        run.seconds = record.get("seconds")
        run.versions, run.hardware = record.get("versions") or {}, record.get("hardware") or {}
    output = folder / OUTPUT_FOLDER
    _add_losses(run, output, metric)
    _add_pass(run, output)
    run.fingerprint = _read_json(output / FINGERPRINT_FILE, run.problems)
    if (output / DIAGNOSTICS_FILE).is_file():
        run.diagnostics_path = output / DIAGNOSTICS_FILE
    if run.state in (FINISHED, STOPPED_EARLY):
        if run.final_loss is None:
            run.problems.append(f"{run.state}, but no {metric} was found")
        elif not math.isfinite(run.final_loss):
            run.state, run.reason = DIVERGED, run.reason or f"final {metric} is {run.final_loss}"
    return run


def _add_losses(run: RunResult, output: Path, metric: str) -> None:
    state = _read_json(output / STATE_FILE, run.problems) or {}
    log = _read_log(output / LOG_FILE, run.problems) or [e for e in state.get("log_history", []) if "step" in e]
    for entry in log:
        step = entry["step"]
        if "loss" in entry and (not run.train_steps or step > run.train_steps[-1]):
            run.train_steps.append(step)
            run.train_losses.append(_to_float(entry["loss"]))
        if metric in entry and (not run.eval_steps or step > run.eval_steps[-1]):
            run.eval_steps.append(step)
            run.eval_losses.append(_to_float(entry[metric]))
            run.eval_seconds.append(entry.get("train_seconds"))
    steps = [entry["step"] for entry in log]
    run.num_steps = state.get("global_step") or (max(steps) if steps else None)
    # The log goes on after training, with the last evaluation; training ends with the entry of its total.
    training = [e for e in log if "train_seconds" in e and ("loss" in e or "train_runtime" in e)]
    clocks = [e["train_seconds"] for e in training] or [s for s in run.eval_seconds if s is not None]
    run.train_seconds = clocks[-1] if clocks else None
    run.metrics = {
        name: value
        for name, value in (_read_json(output / RESULTS_FILE, run.problems) or {}).items()
        if isinstance(value, int | float)
    }
    if run.eval_steps and run.eval_steps[0] == 0 and math.isfinite(run.eval_losses[0]):
        run.start_loss, run.start_source = run.eval_losses[0], "evaluation"
    final = run.metrics.get(metric)
    if final is None:
        run.final_loss = run.eval_losses[-1] if run.eval_losses else None
        return
    # The final evaluation stands for the end of the curve; it differs from the log's where checkpoints are averaged.
    run.final_loss = float(final)
    if run.num_steps is not None:
        if run.eval_steps and run.eval_steps[-1] >= run.num_steps:
            run.eval_losses[-1] = run.final_loss
        else:
            run.eval_steps.append(run.num_steps)
            run.eval_losses.append(run.final_loss)
            run.eval_seconds.append(run.train_seconds)


def _add_pass(run: RunResult, output: Path) -> None:
    try:
        report = read_report(output)
    except InputError as error:
        run.problems.append(str(error))
        return
    length = (report or {}).get("length") or {}
    run.held_back, measuring = length.get("steps"), length.get("seconds") or 0.0
    if report is None or report.get("strategy") == "zeros":
        if run.v0 == "zeros" or run.held_back == 0:
            run.v0_seconds, run.v0_samples, run.v0_extra_steps = measuring, 0, 0.0
        return
    run.v0_seconds, run.v0_samples = report.get("seconds"), report.get("num_samples")
    if run.v0_seconds is not None:
        run.v0_seconds += measuring
    batch = report.get("effective_batch_size")
    if run.v0_samples == 0:
        run.v0_extra_steps = 0.0
    elif run.v0_samples is not None and batch:
        run.v0_extra_steps = run.v0_samples / batch
    if run.start_loss is None and report.get("mean_loss") is not None:
        run.start_loss, run.start_source = report["mean_loss"], "pass"


def _share_start_losses(runs: Sequence[RunResult], metric: str) -> None:
    """Give every run the loss at start of its seed, by the best source there is: the weights at start are the same.

    Another metric than the loss is known at start from an evaluation alone.
    """
    groups: dict[tuple, list[RunResult]] = {}
    for run in runs:
        groups.setdefault((run.seed, list_model_arguments(run)), []).append(run)
    for group in groups.values():
        for source in ("evaluation", "pass") if metric == "eval_loss" else ("evaluation",):
            values = [r.start_loss for r in group if r.start_source == source]
            if values or metric != "eval_loss":
                break
        else:
            source, firsts = "training", [(r.train_steps[0], r.train_losses[0]) for r in group if r.train_steps]
            earliest = min((step for step, _ in firsts), default=None)
            values = [loss for step, loss in firsts if step == earliest and math.isfinite(loss)]
        for run in group:
            run.start_loss, run.start_source = (statistics.median(values), source) if values else (None, None)


def list_model_arguments(run: RunResult) -> tuple[str, ...]:
    """List the run's arguments, `name=value`, that may give it other weights or data than its seed's other runs have."""
    return tuple(f"{name}={value}" for name, value in sorted(run.arguments.items()) if not _leaves_start_alone(name))


# Flags that change neither the initial weights nor the first batches; any other may.
_LEAVE_START_ALONE = (
    "learning_rate", "optim", "adam_", "weight_decay", "max_grad_norm", "warmup_", "untuned_warmup", "lr_scheduler", "v0_", "output_dir",
    "overwrite_output_dir", "max_steps", "num_train_epochs", "logging_", "eval_", "save_", "do_", "report_to", "run_name",
    "label_smoothing_factor", "num_beams", "length_penalty", "average_checkpoints", "predict_", "per_device_eval_",
    "generation_", "disable_tqdm", "seed", "dataloader_num_workers", "use_cpu", "max_eval_samples", "max_predict_samples",
)  # fmt: skip


def _leaves_start_alone(name: str) -> bool:
    return name.startswith(_LEAVE_START_ALONE)


def _read_json(path: Path, problems: list[str]) -> dict | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return None
    if not isinstance(content, dict):
        problems.append(f"{path.name} is no JSON object")
        return None
    return content


def _read_log(path: Path, problems: list[str]) -> list[dict]:
    """Read JSON lines; a last line that a killed run did not finish is left out."""
    if not path.is_file():
        return []
    entries = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            if number < len(lines):
                problems.append(f"{path.name}: line {number} cannot be read")
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries


def _to_float(value) -> float:
    return math.nan if value is None else float(value)
