"""How a run is started, and ended by force: the script, the launcher, the command line, the environment, the machine."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..errors import InputError
from .files import is_secret

if TYPE_CHECKING:
    from .plan import Plan

# The scripts that come with the package, by the name that a comparison's file gives.
SCRIPT_MODULES = {
    "run_translation": "hf_v0init.tasks.translation.script",
    "run_clm": "hf_v0init.tasks.language_modeling.script",
    "run_mlm": "hf_v0init.tasks.language_modeling.masked_script",
    "run_image_classification": "hf_v0init.tasks.images.script",
    "run_dcgan": "hf_v0init.tasks.gan.script",
}
MODULE_FLAGS = {"deepspeed": "--module"}  # what stands before a module's name; `-m` for the other launchers
PACKAGES = (
    "hf_v0init torch transformers accelerate datasets tokenizers numpy pytorch-warmup pytorch-optimizer schedulefree sacrebleu"
).split()
STARTER, SECRET_FLAGS = "hf_v0init.compare.start_script", "HF_V0INIT_SECRET_FLAGS"


def find_script(name: str, folder: Path) -> str:
    """Return what a run of this script is known by: its name in `SCRIPT_MODULES`, or the whole path of a file here or in `folder`.

    Raises:
        InputError: there is none.
    """
    if name in SCRIPT_MODULES:
        return name
    for place in (Path(name), folder / name):
        if place.is_file():
            return str(place.resolve())
    raise InputError(
        f"script: there is no file {name}, here or in {folder}; give the path of your script, or one of {', '.join(SCRIPT_MODULES)}"
    )


def split_launch(launch: str) -> list[str]:
    """Split a launcher into words: `python` is this interpreter, another program is sought beside it first.

    Raises:
        InputError: there is no such program, or a quote is left open.
    """
    try:
        program, *words = shlex.split(launch) or [""]
    except ValueError as error:
        raise InputError(
            f"launch: {launch!r} cannot be split into words ({str(error).lower()}); close the quote"
        ) from None
    if program == "python":
        return [sys.executable, *words]
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.is_file() else shutil.which(program)
    if not found:
        raise InputError(f"launch: there is no program {launch!r}; write python, or 'accelerate launch ...'")
    return [found, *words]


def is_one_process(launch: str) -> bool:
    """Whether the launcher is the interpreter itself."""
    return launch.split()[:1] == ["python"]


# ------------------------------------------------------------------------------------------------------ the command


def make_command(launch: str, script: str, arguments: Mapping[str, Any], output: Path, jobs: int = 1) -> list[str]:
    """Return the command line of a run that writes into `output`; secret flags are not in it (`make_environment` has them).

    With several runs side by side, `accelerate launch` is told to find a free port for each.
    """
    words = split_launch(launch)
    module = MODULE_FLAGS.get(launch.split()[0], "-m")
    if jobs > 1 and launch.split()[:2] == ["accelerate", "launch"] and "--main_process_port" not in launch:
        words += ["--main_process_port", "0"]
    open_flags = {key: value for key, value in arguments.items() if not is_secret(key, value)}
    if len(open_flags) < len(arguments):
        words += [module, STARTER, script]
    elif script in SCRIPT_MODULES:
        words += [module, SCRIPT_MODULES[script]]
    else:
        words.append(script)
    return [*words, *make_flags({**open_flags, "output_dir": str(output), "v0_record_run": True})]


def make_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Write flags as words of a command line, `--flag=value`; lists as several words, mappings as JSON."""
    words: list[str] = []
    for key, given in arguments.items():
        values = given if isinstance(given, list) else [given]
        written = [json.dumps(value) if isinstance(value, bool | dict) else str(value) for value in values]
        words += [f"--{key}", *written] if isinstance(given, list) else [f"--{key}={written[0]}"]
    return words


def make_environment(
    launch: str, arguments: Mapping[str, Any], jobs: int, slot: int, devices: Sequence[str] | None = None
) -> dict[str, str]:
    """Return the environment of the run in a slot.

    A run of one process gets its share of the cores as `OMP_NUM_THREADS`, unless that is set, and one of the devices as
    `CUDA_VISIBLE_DEVICES`: with several the Trainer would split each batch over them (`DataParallel`), which no one asked for.
    Other launchers deal out threads and devices themselves, among those of `devices`.

    Args:
        arguments: the run's flags; the secret ones reach its script through this environment.
        slot: the run's place among `jobs` side by side, from 0.
        devices: ids as in `CUDA_VISIBLE_DEVICES`; () for none; None leaves the variable as it is.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    secrets = {key: value for key, value in arguments.items() if is_secret(key, value)}
    if secrets:
        environment[SECRET_FLAGS] = json.dumps(make_flags(secrets))
    if is_one_process(launch):
        environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // jobs)))
        devices = devices and [devices[slot % len(devices)]]
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment


def choose_jobs(plan: Plan, devices: tuple[str, ...] | None) -> int:
    """Return how many runs go side by side if nobody says: one for each device, or 1 where a launcher takes them all."""
    return max(1, len(devices or ())) if is_one_process(plan.launch) else 1


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


# ---------------------------------------------------------------------------------------------------- the machine


def list_devices(plan: Plan, wanted: str | None = None) -> tuple[str, ...] | None:
    """Return the ids of the devices to hand out, as `CUDA_VISIBLE_DEVICES` names them.

    Those of `wanted`, comma separated, or `none`. Without it those of `CUDA_VISIBLE_DEVICES`, else those that `nvidia-smi` lists (MIG
    instances and devices of other makers have to be named); a plan whose runs all have `use_cpu` needs none.

    Returns:
        The ids; () if there are to be none; None if nothing is known of any, which leaves the environment as it is.
    """
    if wanted is not None:
        return () if wanted.strip() == "none" else tuple(dict.fromkeys(wanted.replace(",", " ").split()))
    if all(run.arguments.get("use_cpu") for run in plan.runs):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.replace(",", " ").split() if visible is not None else _ask_driver("index")) or None


def _ask_driver(what: str) -> list[str]:
    """Ask the driver for a property of each NVIDIA GPU; none where there is no driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def count_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that numbers depend on. Imports none of them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@functools.cache
def describe_hardware() -> dict[str, Any]:
    """Return the system, the CPU, its cores, the memory in GiB, and the names of NVIDIA GPUs if there are any."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    found = {"system": f"{platform.system()} {platform.machine()}", "cpu": name, "cores": os.cpu_count() or 1}
    found["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    gpus = _ask_driver("name")
    return found | ({"gpus": gpus} if gpus else {})
