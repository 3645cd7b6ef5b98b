"""How a run is started, and ended by force: the script, the launcher, the command line, the environment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from ...errors import InputError
from ..planning.axes import suggest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
PYTHON = "python"


def find_script(name: str, folder: Path) -> Path:
    """Find a script by its name in the checkout's `scripts/`, or by its path from here or from `folder`.

    Raises:
        InputError: there is none.
    """
    if re.fullmatch(r"\w+", name):
        found = SCRIPTS / f"{name}.py"
        if found.is_file():
            return found
        if not SCRIPTS.is_dir():
            raise InputError(
                f"script: {name}: the package was installed without its scripts; give the path of scripts/{name}.py in a "
                "checkout, or of your own script"
            )
        known = sorted(file.stem for file in SCRIPTS.glob("run_*.py"))
        raise InputError(
            f"script: there is no {name} in {SCRIPTS}{suggest(name, known)}; give the path of your script, or one of "
            f"{', '.join(known)}"
        )
    for place in (Path(name), folder / name):
        if place.is_file():
            return place.resolve()
    raise InputError(f"script: there is no file {name}; give the path of a script, or run_translation or run_clm")


def split_launch(launch: str) -> list[str]:
    """Split a launcher into words: `python` is this interpreter, another program is sought beside it first.

    Raises:
        InputError: there is no such program.
    """
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise InputError(f"launch: {launch!r} cannot be read: {error}") from error
    if words and words[0] == PYTHON:
        return [sys.executable, *words[1:]]
    found = None
    if words:
        beside = Path(sys.executable).parent / words[0]
        found = str(beside) if beside.is_file() else shutil.which(words[0])
    if not found:
        raise InputError(f"launch: there is no program {launch!r}; write python, or 'accelerate launch ...'")
    return [found, *words[1:]]


def is_one_process(launch: str) -> bool:
    """Whether the launcher is the interpreter itself."""
    return launch.split()[:1] == [PYTHON]


def make_command(launch: str, script: str, arguments: dict[str, Any], output: Path, jobs: int = 1) -> list[str]:
    """Return the command line of a run that writes into `output`.

    With several runs side by side, `accelerate launch` is told to find a free port for each.
    """
    words = split_launch(launch)
    if jobs > 1 and launch.split()[:2] == ["accelerate", "launch"] and "--main_process_port" not in launch:
        words += ["--main_process_port", "0"]
    flags = make_flags({**arguments, "output_dir": str(output), "v0_record_run": True})
    return [*words, str(find_script(script, Path())), *flags]


def make_flags(arguments: dict[str, Any]) -> list[str]:
    """Write flags as words of a command line, `--flag=value`; lists as several words, mappings as JSON."""
    words = []
    for key, value in arguments.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(_write_value, value)]
        else:
            words.append(f"--{key}={_write_value(value)}")
    return words


def _write_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def make_environment(launch: str, jobs: int, slot: int) -> dict[str, str]:
    """Return the environment of the run in a slot.

    A run of one process gets its share of the cores as `OMP_NUM_THREADS`, unless that is set, and one of several
    `CUDA_VISIBLE_DEVICES`; other launchers deal out threads and devices themselves.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if is_one_process(launch):
        environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // jobs)))
        devices = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
        if len(devices) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


def count_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a process that leads its group, and to the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def kill_tree(pid: int) -> None:
    """End a process that leads its group, the group, and what it started outside of it, as launchers do."""
    descendants = []
    with contextlib.suppress(psutil.Error):
        descendants = psutil.Process(pid).children(recursive=True)
    signal_group(pid, signal.SIGKILL)
    for process in descendants:
        with contextlib.suppress(psutil.Error):
            process.kill()
