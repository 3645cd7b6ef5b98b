"""The folder of a comparison: whether it can be used, what plan it has, which of its runs are to be started again.

| a run's record says | the next call |
| --- | --- |
| finished, diverged | keeps it |
| failed | keeps it, or repeats it with `retry_failed` |
| pruned | keeps it while `prune` is in force, else repeats it |
| interrupted, running (its worker is gone), nothing | starts it from scratch in an emptied folder, or resumes it |

An interrupted run starts from scratch also if its script saves checkpoints: its clock and its curve are then those of one process.
With `resume_runs` it goes on from the newest checkpoint. A run that another worker is training is left to it (see `claims`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from . import files
from .claims import list_workers
from .executor import read_record
from .plan import Plan


def require_usable_folder(plan: Plan, folder: Path) -> None:
    """Refuse a folder that holds something else. Changes nothing.

    Raises:
        InputError: a file; a folder with files but no plan; one with the runs of another comparison and none of this one.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={folder} is a file; give another --output_dir")
    if not folder.is_dir() or {file.name for file in folder.iterdir()} <= {files.LOCKS_FOLDER}:
        return
    stored = files.read_json(folder / files.PLAN_FILE)
    if stored is None:
        raise InputError(f"output_dir={folder} is not empty and holds no comparison; give another --output_dir")
    digests = {_get_digest(place) for place in _list_run_folders(folder)}
    if digests and stored.get("title") != plan.title and not digests & {run.digest for run in plan.runs}:
        raise InputError(
            f"output_dir={folder} holds another comparison, {stored.get('title')!r}, that shares no run with this one; give "
            "another --output_dir"
        )


def _list_run_folders(folder: Path) -> list[Path]:
    runs = folder / files.RUNS_FOLDER
    return sorted(place for place in runs.iterdir() if place.is_dir()) if runs.is_dir() else []


def _get_digest(place: Path) -> str:
    return place.name.rsplit("_", 1)[-1]


def write_plan(plan: Plan, folder: Path) -> int:
    """Write `plan.json`; runs of equal arguments that the folder has keep their results and get this plan's names.

    To be called while holding `claims.lock_plan`.

    Returns:
        The number of runs in the folder that are not in the plan; they stay, and no report shows them.

    Raises:
        InputError: the folder has another first stage planned, and another worker is at work on it.
    """
    new, stored = plan.to_dict(), files.read_json(folder / files.PLAN_FILE)
    if stored is not None and _list_tuned(stored) != _list_tuned(new):
        others = list_workers(folder)
        if others:
            raise InputError(
                f"output_dir={folder}: another compare ({', '.join(others)}) is at work there on a plan with other runs; wait for it, "
                "stop it with Ctrl-C, or give another --output_dir"
            )
    planned = {run.digest: run for run in plan.runs}
    num_others = 0
    for place in _list_run_folders(folder):
        run, record = planned.get(_get_digest(place)), files.read_json(place / files.RECORD_FILE)
        if run is None:
            num_others += 1
        elif record is not None:
            entry = plan.describe_run(run)
            if place.name != run.name:
                place = place.rename(place.with_name(run.name))
            if any(record.get(key) != value for key, value in entry.items()):
                files.write_json(place / files.RECORD_FILE, {**record, **entry})
    files.write_json(folder / files.PLAN_FILE, new)
    return num_others


def _list_tuned(plan: dict[str, Any]) -> list[str]:
    """The names of the grid's own runs; those that results have added follow from them."""
    stages = {entry["stage"] for entry in plan["runs"]}
    seeds = set(plan.get("confirm_seeds") or [])
    return [
        e["name"]
        for e in plan["runs"]
        if e["stage"] == files.TUNE or files.TUNE not in stages or e["seed"] not in seeds
    ]


def release_failed(plan: Plan, folder: Path) -> None:
    """Have runs that failed started again: as such that were interrupted."""
    for run in plan.runs:
        record = read_record(folder, run)
        if record.get("state") == files.FAILED:
            files.write_json(
                folder / files.RUNS_FOLDER / run.name / files.RECORD_FILE, {**record, "state": files.INTERRUPTED}
            )
