"""A light copy of a comparison: `comparison.json`, `results.csv` and `evaluations.csv`, from which the report can be written anew.

`comparison.json` has what the plan says but the runs, and what they were made with; `results.csv` a row per run; `evaluations.csv`
the validation losses along the runs. Training losses and diagnostics are not in it: figures of them stay as they were drawn. A copy
without `evaluations.csv` has, of the curves, the best loss and the steps to one target that `results.csv` has recorded.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from .results import PENDING, PLAN_FILE, Comparison, RunResult, make_comparison, read_comparison

COPY_FILE, RESULTS_FILE, EVALUATIONS_FILE = "comparison.json", "results.csv", "evaluations.csv"
_TEXTS = ("name", "arm", "v0", "warmup", "optimizer", "state")
_NUMBERS = ("final_loss", "start_loss", "train_seconds", "seconds", "v0_seconds", "v0_extra_steps")
_COUNTS = ("exit_status", "num_steps", "v0_samples", "held_back")
_RECORDED = ("best_loss", "target_loss", "steps_to_target", "steps_to_target_charged", "seconds_to_target")


def read_runs_or_copy(folder: str | Path) -> Comparison:
    """Read a folder of runs, or a light copy of one.

    Raises:
        InputError: it is neither.
    """
    folder = Path(folder)
    if not (folder / PLAN_FILE).is_file() and (folder / COPY_FILE).is_file():
        return read_copy(folder)
    return read_comparison(folder)


def write_copy(comparison: Comparison, folder: Path, figures: Sequence[dict]) -> None:
    """Write `comparison.json` and `evaluations.csv`; `figures` are the name, title and caption of those in the copy."""
    machines: list[dict] = []
    for run in comparison.runs:
        made_with = {"versions": run.versions, "hardware": run.hardware}
        if run.versions or run.hardware:
            known = next((m for m in machines if {k: m[k] for k in made_with} == made_with), None)
            if known is None:
                machines.append(known := {**made_with, "runs": []})
            known["runs"].append(run.name)
    for machine in machines if len(machines) == 1 else ():
        machine["runs"] = None  # all
    content = {key: value for key, value in comparison.plan.items() if key != "runs"}
    content |= {"at_step": comparison.at_step, "machines": machines, "figures": list(figures)}
    content["problems"] = {run.name: run.problems for run in comparison.runs if run.problems}
    (folder / COPY_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not any(run.has_curve for run in comparison.runs):
        return
    with (folder / EVALUATIONS_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "step", "loss", "train_seconds"])
        for run in comparison.runs:
            for row in zip(run.eval_steps, run.eval_losses, run.eval_seconds, strict=True):
                writer.writerow([run.name, *("" if value is None else value for value in row)])


def read_copy(folder: Path) -> Comparison:
    """Read a light copy.

    Raises:
        InputError: a file of it is missing or damaged.
    """
    try:
        content = json.loads((folder / COPY_FILE).read_text(encoding="utf-8"))
        runs = [_read_run(row, content) for row in _read_rows(folder / RESULTS_FILE)]
        _add_curves(runs, folder / EVALUATIONS_FILE)
        comparison = make_comparison(folder, content, runs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{folder}: the copy of a comparison cannot be read ({error!r}); write it anew with `hf-v0init compare ... --report_only "
            "--summary_dir FOLDER`"
        ) from error
    for run in runs:
        run.greater_is_better = comparison.greater_is_better
    return comparison


def list_kept_figures(comparison: Comparison) -> list[dict]:
    """List name, title and caption of the figures that a copy came with; none for a folder of runs."""
    return list(comparison.plan.get("figures") or [])


def _read_run(row: dict[str, str], content: dict) -> RunResult:
    other = json.loads(row["other"]) if row["other"] else {}
    run = RunResult(
        **{name: row[name] for name in _TEXTS},
        other=other,
        learning_rate=float(row["learning_rate"]),
        seed=int(row["seed"]),
        arguments={**(content.get("arguments") or {}), **other},
        reason=row["reason"] or None,
        start_source=row["start_source"] or None,
        **{name: _read_number(row.get(name)) for name in _NUMBERS},
        **{name: int(row[name]) if row.get(name) else None for name in _COUNTS},
        metrics={
            name: value
            for name in content.get("test_metrics") or []
            if (value := _read_number(row.get(name))) is not None
        },
        problems=list((content.get("problems") or {}).get(row["name"], [])),
        recorded={name: _read_number(row.get(name)) for name in _RECORDED},
    )
    if row.get("initial_weights"):
        run.fingerprint = {
            "initial_weights": row["initial_weights"],
            "rng": row["rng"],
            "batches": row["batches"].split(),
        }
    machines = content.get("machines") or []
    for machine in machines if run.state != PENDING else ():
        if machine["runs"] is None or run.name in machine["runs"]:
            run.versions, run.hardware = machine["versions"], machine["hardware"]
    return run


def _add_curves(runs: Sequence[RunResult], path: Path) -> None:
    if not path.is_file():
        return
    by_name = {run.name: run for run in runs}
    for row in _read_rows(path):
        run = by_name[row["name"]]
        run.eval_steps.append(int(float(row["step"])))
        run.eval_losses.append(float(row["loss"]))
        run.eval_seconds.append(_read_number(row["train_seconds"]))


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _read_number(text: str | None) -> float | None:
    return float(text) if text else None
