"""What a comparison keeps in its folder: file names, the states of runs, JSON, and flags that nobody else may read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

PLAN_FILE, RECORD_FILE = "plan.json", "record.json"
RUNS_FOLDER, OUTPUT_FOLDER, LOCKS_FOLDER = "runs", "output", ".locks"
SCRIPT_LOG_FILE = "log.txt"
# What a run leaves in its output folder
LOG_FILE, FINGERPRINT_FILE, V0_FILE = "run_log.jsonl", "fingerprint.json", "v0_init.json"
FINAL_FILE, STATE_FILE = "all_results.json", "trainer_state.json"

BEGINNINGS = {  # what a fingerprint says of a run's beginning, and a difference in it in words
    "initial_weights": "other initial weights",
    "batches": "other first batches",
    "rng": "another random state before the first step",
}

PENDING, RUNNING, FINISHED, DIVERGED = "pending", "running", "finished", "diverged"
FAILED, INTERRUPTED, PRUNED = "failed", "interrupted", "pruned"
STATES = (FINISHED, DIVERGED, PRUNED, FAILED, INTERRUPTED, RUNNING, PENDING)
COUNTED = (FINISHED, DIVERGED, PRUNED)  # the outcome is known, and due to the setting

TUNE, CONFIRM = "tune", "confirm"  # the stages

MASK = "***"
_SECRET = re.compile(r"(token|key|password)$", re.IGNORECASE)


def is_secret(name: str, value: Any = "") -> bool:
    """Whether a flag may not be written anywhere: its name, or one inside its value, ends in token, key or password."""
    if isinstance(value, dict):
        return bool(_SECRET.search(name)) or any(is_secret(str(key), inner) for key, inner in value.items())
    return value is not None and bool(_SECRET.search(name))


def mask_secrets(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags with `***` in place of every value that `is_secret`."""
    return {
        name: (MASK if _SECRET.search(name) or not isinstance(value, dict) else mask_secrets(value))
        if is_secret(name, value)
        else value
        for name, value in flags.items()
    }


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
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_log(output: Path) -> list[dict[str, Any]]:
    """Return the entries of `run_log.jsonl`, or else of the Trainer's state; a line that was cut off is left out."""
    entries = []
    try:
        lines = (output / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries or [e for e in (read_json(output / STATE_FILE) or {}).get("log_history", []) if "step" in e]
