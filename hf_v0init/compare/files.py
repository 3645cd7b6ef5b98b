"""What a comparison keeps in its folder: file names, the states of runs, JSON, and flags that nobody else may read."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLAN_FILE, RECORD_FILE = "plan.json", "record.json"
RUNS_FOLDER, OUTPUT_FOLDER, LOCKS_FOLDER = "runs", "output", ".locks"
SCRIPT_LOG_FILE = "log.txt"
# What a run leaves in its output folder
LOG_FILE, FINGERPRINT_FILE = "run_log.jsonl", "fingerprint.json"
FINAL_FILE, STATE_FILE = "all_results.json", "trainer_state.json"
READ_BY_REPORTS = (LOG_FILE, FINGERPRINT_FILE, FINAL_FILE, STATE_FILE)

PENDING, RUNNING, FINISHED, DIVERGED = "pending", "running", "finished", "diverged"
FAILED, INTERRUPTED = "failed", "interrupted"
STATES = (FINISHED, DIVERGED, FAILED, INTERRUPTED, RUNNING, PENDING)
COUNTED = (FINISHED, DIVERGED)  # the outcome is known, and due to the setting

TUNE, CONFIRM = "tune", "confirm"  # the stages

MASK = "***"
_SECRET = re.compile(r"(token|key|password)$", re.IGNORECASE)


def mask_secrets(value: Any) -> Any:
    """Return flags with `***` in place of every value whose name ends in token, key or password, inside mappings and lists too."""
    if isinstance(value, list):
        return [mask_secrets(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    hidden = {name for name, one in value.items() if one is not None and _SECRET.search(str(name))}
    return {name: MASK if name in hidden else mask_secrets(one) for name, one in value.items()}


def is_secret(name: str, value: Any) -> bool:
    """Whether a flag, or a part of its value, may not be written anywhere."""
    return mask_secrets({name: value}) != {name: value}


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


def find_run(folder: Path, name: str) -> Path:
    """Return the folder of a run; it is known by the hash that ends its name, whatever its setting was called when it was made."""
    runs = folder / RUNS_FOLDER
    return next(runs.glob(f"*_{name.rsplit('_', 1)[-1]}"), runs / name)


def parse_entry(line: bytes) -> dict[str, Any]:
    """Parse a line of `run_log.jsonl`; empty if it was cut off."""
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        return entry if isinstance(entry, dict) else {}
    return {}


def read_log(output: Path) -> list[dict[str, Any]]:
    """Return the entries of `run_log.jsonl`, or else of the Trainer's state."""
    entries = []
    with contextlib.suppress(OSError):
        entries = [
            entry for entry in map(parse_entry, (output / LOG_FILE).read_bytes().splitlines()) if "step" in entry
        ]
    return entries or [e for e in (read_json(output / STATE_FILE) or {}).get("log_history", []) if "step" in e]
