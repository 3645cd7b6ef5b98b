"""Reads the runs of a comparison into tables, and writes those beside them: all that a report needs.

| file | content |
| --- | --- |
| `plan.json` | what the file said, and the runs of both stages |
| `results.csv` | a row for each run: its place in the grid, how it ended, losses, times, its fingerprint |
| `evaluations.csv` | the validation losses along the runs |
| `machines.json` | versions and hardware |

A folder that has no `runs/` (a copy in a repository) is read from these files, which are then left as they are. "Loss" stands
throughout for the metric that runs are compared by, also where more of it is better.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import InputError
from . import files

RESULTS_FILE, EVALUATIONS_FILE, MACHINES_FILE = "results.csv", "evaluations.csv", "machines.json"
PLACE = ("name", "stage", "condition", "family", "setting", "v0", "warmup", "optimizer")
FINGERPRINT = ("initial_weights", "rng", "batches")
TEXTS = (*PLACE, "other", "state", "reason", *FINGERPRINT, "problems")
COUNTS = ("exit_status", "num_steps", "final_loss", "scored_loss", "start_loss", "seconds", "train_seconds")
NUMBERS = ("learning_rate", "seed", *COUNTS)
EVALUATIONS = ("name", "step", "loss", "train_seconds")


@dataclass
class Comparison:
    """A plan and what has come of its runs.

    Attributes:
        folder: where it was read.
        plan: the content of `plan.json`.
        runs: a row for each run, in the plan's order. Steps are optimizer steps; `train_seconds` is the time of training with the
            pass before it and without evaluations. NaN where it is not known.
        evaluations: a row for each validation loss along a run.
        machines: what the runs were made with.
    """

    folder: Path
    plan: dict[str, Any]
    runs: pd.DataFrame
    evaluations: pd.DataFrame
    machines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return bool(self.plan.get("greater_is_better"))

    def get_counted(self, stage: str) -> pd.DataFrame:
        """The runs of a stage whose outcome is known and due to their setting."""
        return self.runs[self.runs["state"].isin(files.COUNTED) & (self.runs["stage"] == stage)]


def read_comparison(folder: str | Path) -> Comparison:
    """Read a folder: from its runs, as far as they have come, or without any from the tables.

    Raises:
        InputError: there is no whole plan.
    """
    folder = Path(folder)
    plan = files.read_json(folder / files.PLAN_FILE)
    if plan is None or not isinstance(plan.get("runs"), list):
        raise InputError(
            f"{folder}: no comparison there ({files.PLAN_FILE} is missing or damaged); give the --output_dir of `hf-v0init compare`"
        )
    if (folder / files.RUNS_FOLDER).is_dir() or not (folder / RESULTS_FILE).is_file():
        return collect_runs(plan, folder)
    runs = pd.read_csv(folder / RESULTS_FILE, dtype=dict.fromkeys(TEXTS, str))
    runs = runs.fillna(dict.fromkeys(TEXTS, "")).astype(dict.fromkeys(NUMBERS, float)).astype({"seed": int})
    has_evaluations = (folder / EVALUATIONS_FILE).is_file()
    evaluations = pd.read_csv(folder / EVALUATIONS_FILE) if has_evaluations else pd.DataFrame(columns=list(EVALUATIONS))
    machines = (files.read_json(folder / MACHINES_FILE) or {}).get("machines", [])
    return Comparison(folder, plan, runs, evaluations, machines)


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Write the tables, and the plan where it is not."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / files.PLAN_FILE, comparison.plan)
    files.write_json(folder / MACHINES_FILE, {"machines": comparison.machines})
    comparison.runs.to_csv(folder / RESULTS_FILE, index=False, lineterminator="\n")
    if len(comparison.evaluations):
        comparison.evaluations.to_csv(folder / EVALUATIONS_FILE, index=False, lineterminator="\n")


def collect_runs(plan: dict[str, Any], folder: Path) -> Comparison:
    """Read the folders of a plan's runs, whatever they have left so far; damage is named in the column `problems`."""
    rows, evaluations, machines = [], [], []
    for entry in plan["runs"]:
        row, of_run, made_with = _read_run(files.find_run(folder, entry["name"]), entry, plan)
        rows.append(row)
        evaluations += [{"name": row["name"], **evaluation} for evaluation in of_run]
        if any(made_with.values()) and made_with not in machines:
            machines.append(made_with)
    metrics = list(plan.get("test_metrics") or [])
    columns = [*PLACE, "other", "learning_rate", "seed", "state", "reason", *COUNTS, *metrics]
    runs = pd.DataFrame(rows, columns=list(dict.fromkeys([*columns, *FINGERPRINT, "problems"])))
    runs = runs.astype(dict.fromkeys([*NUMBERS, *metrics], float)).astype({"seed": int})
    # The weights at the start are the same for all runs of a seed, and so is the loss there.
    shared = runs.groupby(["seed", "condition"], dropna=False)["start_loss"].transform("median")
    runs["start_loss"] = runs["start_loss"].fillna(shared)
    runs["scored_loss"] = runs["final_loss"].where(runs["state"] != files.DIVERGED, runs["start_loss"])
    runs.loc[~runs["state"].isin(files.COUNTED), "scored_loss"] = math.nan
    return Comparison(folder, plan, runs, pd.DataFrame(evaluations, columns=list(EVALUATIONS)), machines)


def _read_run(folder: Path, entry: dict, plan: dict) -> tuple[dict[str, Any], list[dict], dict]:
    """Read a run: its row, its evaluations, and what it was made with."""
    output, metric, problems = folder / files.OUTPUT_FOLDER, plan.get("metric") or "eval_loss", []

    def read(path: Path) -> dict[str, Any]:
        content = files.read_json(path)
        if content is None and path.is_file():
            problems.append(f"{path.name} cannot be read")
        return content or {}

    record, results = read(folder / files.RECORD_FILE), read(output / files.FINAL_FILE)
    trainer, fingerprint = read(output / files.STATE_FILE), read(output / files.FINGERPRINT_FILE)
    state = record.get("state", files.RUNNING if record else files.PENDING)
    row = {key: entry.get(key) or "" for key in PLACE} | {
        "learning_rate": entry["learning_rate"],
        "seed": entry["seed"],
        "other": json.dumps(entry["other"]) if entry.get("other") else "",
        "state": state if state in files.STATES else files.RUNNING,
        "reason": record.get("reason") or "",
        "exit_status": record.get("exit_status"),
        "seconds": record.get("seconds"),
        "initial_weights": str(fingerprint.get("initial_weights") or ""),
        "rng": str(fingerprint.get("rng") or ""),
        "batches": " ".join(map(str, fingerprint.get("batches") or [])),
    }
    evaluations = _add_losses(row, files.read_log(output), metric, trainer.get("global_step"), results.get(metric))
    test_metrics = plan.get("test_metrics") or []
    row |= {name: results[name] for name in test_metrics if isinstance(results.get(name), int | float)}
    if row["state"] == files.FINISHED:
        problems += [f"left no {name}" for name in test_metrics if name not in row]
        if evaluations and evaluations[-1]["step"] < row["num_steps"]:
            problems.append(f"last evaluated at step {evaluations[-1]['step']}; call trainer.evaluate() at the end")
    row["problems"] = "; ".join(dict.fromkeys(problems))
    return row, evaluations, {name: record.get(name) or {} for name in ("versions", "hardware")}


def _add_losses(row: dict[str, Any], log: list[dict], metric: str, num_steps: int | None, final: Any) -> list[dict]:
    """Add losses and times to a row, and return the evaluations; `num_steps` and `final` are the Trainer's, at the end."""
    curve: dict[int, dict[str, Any]] = {}
    for entry in log:
        if metric in entry:
            loss = float(entry[metric]) if isinstance(entry[metric], int | float) else math.nan
            clock = entry.get("train_seconds")
            curve.setdefault(entry["step"], {"step": entry["step"], "loss": loss, "train_seconds": clock})
    row["num_steps"] = num_steps or max((entry["step"] for entry in log), default=None)
    # The log goes on after training, with the last evaluation; training ends with the entry of its total.
    clocks = [e["train_seconds"] for e in log if "train_seconds" in e and ("loss" in e or "train_runtime" in e)]
    clocks = clocks or [e["train_seconds"] for e in curve.values() if e["train_seconds"] is not None]
    row["train_seconds"] = clocks[-1] if clocks else None
    start = curve.get(0, {}).get("loss", math.nan)
    row["start_loss"] = start if math.isfinite(start) else None
    if isinstance(final, int | float) and row["num_steps"] is not None:
        # The final evaluation stands for the end of the curve; it differs from the log's where checkpoints are averaged.
        end = {"step": int(row["num_steps"]), "train_seconds": row["train_seconds"]}
        curve.setdefault(end["step"], end)["loss"] = float(final)
    losses = [float(final)] if isinstance(final, int | float) else [evaluation["loss"] for evaluation in curve.values()]
    row["final_loss"] = losses[-1] if losses else None
    return list(curve.values())


def find_odd_beginnings(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Find the runs that did not begin like the others of their seed and condition: `names` that differ in a `part` of `FINGERPRINT`.

    Nothing in a comparison may change how a run begins: runs that differ in optimizer, warmup, learning rate or v0 must have equal
    fingerprints. A run that ended within four steps has fewer batches, and is compared as far as it goes.
    """
    found = []
    for (seed, condition), group in runs[runs["initial_weights"] != ""].groupby(["seed", "condition"], dropna=False):
        for part in FINGERPRINT:
            usual = group[part].mode()[0]
            odd = [
                name
                for name, of in zip(group["name"], group[part], strict=True)
                if of[: len(usual)] != usual[: len(of)]
            ]
            if odd:
                found.append({"seed": seed, "condition": condition, "part": part, "names": odd, "total": len(group)})
    return found
