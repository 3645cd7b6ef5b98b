"""Finished runs of a comparison for a tracker, TensorBoard or trackio, after the fact.

| destination | where | again |
| --- | --- | --- |
| `tensorboard` | `tensorboard/<run>` inside the folder of the comparison | written anew |
| `trackio` | a project named after the comparison's title | only runs that were not exported before (`exported.json`) |
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import InputError
from ..reading.results import DIVERGED, FINISHED, STOPPED_EARLY, Comparison, RunResult

EXPORTED_FILE, TENSORBOARD_FOLDER = "exported.json", "tensorboard"
ENDED = (FINISHED, DIVERGED, STOPPED_EARLY)


def require_destinations(names: Sequence[str]) -> None:
    """Refuse a destination that there is not, or whose package is not installed.

    Raises:
        InputError: either.
    """
    for name in names:
        if name not in DESTINATIONS:
            raise InputError(f"report_to={name}: there is no such destination; choose {', '.join(DESTINATIONS)}")
        _import(name)


def export_runs(comparison: Comparison, names: Sequence[str]) -> dict[str, int]:
    """Write the losses of every run that has ended to each destination.

    Returns the number of runs written, by destination.

    Raises:
        InputError: as `require_destinations`.
    """
    require_destinations(names)
    runs = [run for run in comparison.runs if run.state in ENDED]
    return {name: DESTINATIONS[name](comparison, runs) for name in dict.fromkeys(names)}


def list_entries(run: RunResult, metric: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (optimizer step, finite values by name) of the training loss and of the metric, ascending; last, the final numbers."""
    by_step: dict[int, dict[str, float]] = {}
    for name, steps, values in (
        ("train/loss", run.train_steps, run.train_losses),
        (name_value(metric), run.eval_steps, run.eval_losses),
    ):
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(step, {})[name] = value
    last = run.num_steps or max(by_step, default=0)
    final = {f"final/{name.replace('predict_', 'test_')}": value for name, value in run.metrics.items()}
    by_step.setdefault(last, {}).update(final)
    for step in sorted(by_step):
        finite = {name: value for name, value in by_step[step].items() if math.isfinite(value)}
        if finite:
            yield step, finite


def name_value(metric: str) -> str:
    """Name a metric as trackers group it: eval_loss is eval/loss."""
    return f"eval/{metric.removeprefix('eval_')}"


def describe_settings_of(run: RunResult) -> dict[str, Any]:
    """Return what the run was, for a tracker's table: place in the grid, outcome and flags."""
    place = {
        name: getattr(run, name) for name in ("arm", "v0", "warmup", "optimizer", "learning_rate", "seed", "state")
    }
    return {**run.arguments, **place}


def _export_to_tensorboard(comparison: Comparison, runs: Sequence[RunResult]) -> int:
    writer_class = _import("tensorboard")
    root = comparison.folder / TENSORBOARD_FOLDER
    for run in runs:
        aside, place = root / f".{run.name}.partial", root / run.name
        shutil.rmtree(aside, ignore_errors=True)
        writer = writer_class(log_dir=str(aside))
        try:
            rows = "\n".join(f"| {name} | {value} |" for name, value in describe_settings_of(run).items())
            writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")
            for step, values in list_entries(run, comparison.metric):
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
        finally:
            writer.close()
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)
    return len(runs)


def _export_to_trackio(comparison: Comparison, runs: Sequence[RunResult]) -> int:
    trackio = _import("trackio")
    path = comparison.folder / EXPORTED_FILE
    project = re.sub(r"[^\w.-]+", "-", comparison.title).strip("-") or "comparison"
    exported = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    done = set(exported.get(f"trackio:{project}", []))
    new = [run for run in runs if run.name not in done]
    for run in new:
        trackio.init(project=project, name=run.name, config=describe_settings_of(run))
        try:
            for step, values in list_entries(run, comparison.metric):
                trackio.log(values, step=step)
        finally:
            trackio.finish()
        done.add(run.name)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(
            json.dumps({**exported, f"trackio:{project}": sorted(done)}, indent=1) + "\n", encoding="utf-8"
        )
        partial.replace(path)
    return len(new)


def _import(name: str) -> Any:
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter
        import trackio

        return trackio
    except ImportError as error:
        raise InputError(f"report_to={name}: {name} is not installed; pip install {name}") from error


DESTINATIONS = {"tensorboard": _export_to_tensorboard, "trackio": _export_to_trackio}
