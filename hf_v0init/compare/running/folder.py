"""The folder of a comparison: what plan it has, which of its runs are over.

| a run's record says | the next call |
| --- | --- |
| finished, diverged | keeps it |
| failed | keeps it, or repeats it with `retry_failed` |
| stopped_early | keeps it while `stop_hopeless` is in force, else repeats it |
| interrupted, running (the call that started it is gone), nothing | starts it anew in an emptied folder |

An interrupted run starts anew also if its script saves checkpoints: its clock and its curve are then those of one process. With
`resume_runs` it goes on from the newest whole checkpoint that holds the optimizer's state, if there is one. A run that another call
is training is left to it (see `claims`).
"""

from __future__ import annotations

import contextlib
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from ...errors import InputError
from ..planning.plan import Plan, PlannedRun
from ..reading.results import (
    DIVERGED,
    FAILED,
    FINISHED,
    OUTPUT_FOLDER,
    PLAN_FILE,
    RECORD_FILE,
    RUNNING,
    RUNS_FOLDER,
    STOPPED_EARLY,
)
from .claims import LOCKS_FOLDER, list_calls
from .launch import compute_script_hash, kill_tree
from .run_state import read_json, write_json


def require_usable_folder(plan: Plan, folder: Path) -> None:
    """Refuse a folder that holds something else. Changes nothing.

    Raises:
        InputError: a file; a folder with files but no plan; one with the runs of another comparison and none of this one.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={folder} is a file; give another --output_dir")
    if not folder.is_dir() or {file.name for file in folder.iterdir()} <= {LOCKS_FOLDER}:
        return
    stored = read_json(folder / PLAN_FILE)
    if stored is None:
        raise InputError(f"output_dir={folder} is not empty and holds no comparison; give another --output_dir")
    digests = {get_digest(place) for place in list_run_folders(folder)}
    if digests and stored.get("title") != plan.title and not digests & {run.digest for run in plan.runs}:
        raise InputError(
            f"output_dir={folder} holds another comparison, {stored.get('title')!r}, that shares no run with this one; give "
            "another --output_dir"
        )


def list_run_folders(folder: Path) -> list[Path]:
    """List the folders of runs, also of such that are in no plan any more."""
    runs = folder / RUNS_FOLDER
    return sorted(place for place in runs.iterdir() if place.is_dir()) if runs.is_dir() else []


def get_digest(place: Path) -> str:
    """Return the end of a run's folder name, the hash of its arguments."""
    return place.name.rsplit("_", 1)[-1]


def write_plan(plan: Plan, folder: Path) -> int:
    """Write `plan.json`; runs of equal arguments that the folder has keep their results and get this plan's names.

    To be called while holding `claims.lock_plan`.

    Returns:
        The number of runs in the folder that are not in the plan; they stay, and no report shows them.

    Raises:
        InputError: the folder has other runs planned, and another call is at work on those.
    """
    stored = read_json(folder / PLAN_FILE)
    if stored is not None and stored.get("runs") != plan.to_dict()["runs"]:
        others = list_calls(folder)
        if others:
            raise InputError(
                f"output_dir={folder}: another compare ({', '.join(others)}) is at work there on a plan with other runs; wait for it, "
                "stop it with Ctrl-C, or give another --output_dir"
            )
    planned = {run.digest: run for run in plan.runs}
    num_others = 0
    for place in list_run_folders(folder):
        run, record = planned.get(get_digest(place)), read_json(place / RECORD_FILE)
        if run is None:
            num_others += 1
        elif record is not None:
            entry = describe_run(run)
            if place.name != run.name:
                place = place.rename(place.with_name(run.name))
            if any(record.get(key) != value for key, value in entry.items()):
                write_json(place / RECORD_FILE, {**record, **entry})
    write_json(folder / PLAN_FILE, plan.to_dict())
    return num_others


def describe_run(run: PlannedRun) -> dict[str, Any]:
    """Return the plan's entry of a run as plain JSON types."""
    return json.loads(json.dumps(asdict(run)))


def list_final_states(plan: Plan, retry_failed: bool = False) -> set[str]:
    """Return the states in which a run is left as it is; see the table at the top."""
    over = {FINISHED, DIVERGED}
    over |= set() if retry_failed else {FAILED}
    return over | (set() if plan.stop_hopeless is None else {STOPPED_EARLY})


def find_waiting_runs(plan: Plan, folder: Path, retry_failed: bool) -> list[PlannedRun]:
    """Return the runs that are to be started, in the order of the plan, those that other calls are training included."""
    over = list_final_states(plan, retry_failed)
    return [run for run in plan.runs if read_run_record(folder, run).get("state") not in over]


def find_changed_script(plan: Plan, folder: Path) -> list[str]:
    """Return the names of the runs that are over and were made by a script file that has changed since."""
    now = compute_script_hash(plan.script)
    records = [(run.name, read_run_record(folder, run)) for run in plan.runs]
    hashes = [
        (name, r.get("script_hash")) for name, r in records if r.get("state") in (FINISHED, DIVERGED, STOPPED_EARLY)
    ]
    return [name for name, found in hashes if None not in (found, now) and found != now]


def read_run_record(folder: Path, run: PlannedRun) -> dict[str, Any]:
    """Read a run's `record.json`; empty if it has none."""
    return read_json(folder / RUNS_FOLDER / run.name / RECORD_FILE) or {}


def end_left_run(place: Path) -> bool:
    """End the process of a run whose call was killed, if it is on this machine; call it while holding the run's claim.

    Returns:
        Whether there was one.
    """
    record = read_json(place / RECORD_FILE) or {}
    if record.get("state") != RUNNING or "pid" not in record or record.get("host", platform.node()) != platform.node():
        return False
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(record["pid"])
        # A process of that number that writes elsewhere is another one.
        if any(word.endswith(f"{place.name}/{OUTPUT_FOLDER}") for word in process.cmdline()):
            kill_tree(process.pid)
            process.wait(10)
            return True
    return False
