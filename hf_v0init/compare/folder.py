"""The folder of a comparison: whether it can be used, what plan it has, which of its runs are to be started again.

| a run's record says | the next call |
| --- | --- |
| finished, diverged | keeps it |
| failed | keeps it, or repeats it with `retry_failed` |
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


def require_usable_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a comparison. Changes nothing.

    Raises:
        InputError: it has files, but no plan.
    """
    is_used = folder.is_dir() and {file.name for file in folder.iterdir()} - {files.LOCKS_FOLDER}
    if is_used and files.read_json(folder / files.PLAN_FILE) is None:
        raise InputError(f"output_dir={folder} is not empty and holds no comparison; give another --output_dir")


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
    for place in sorted((folder / files.RUNS_FOLDER).glob("*")):
        run, record = planned.get(place.name.rsplit("_", 1)[-1]), files.read_json(place / files.RECORD_FILE)
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
    return [entry["name"] for entry in plan["runs"] if entry["stage"] == files.TUNE or files.TUNE not in stages]


def release_failed(plan: Plan, folder: Path) -> None:
    """Have runs that failed started again: as such that were interrupted."""
    for run in plan.runs:
        record = read_record(folder, run)
        if record.get("state") == files.FAILED:
            place = folder / files.RUNS_FOLDER / run.name
            files.write_json(place / files.RECORD_FILE, {**record, "state": files.INTERRUPTED})
