"""What the runs of this machine share: its cores and GPUs; and what they were made with: versions and hardware."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..errors import InputError

if TYPE_CHECKING:
    from .plan import Plan

NO_DEVICES = "none"
PACKAGES = (
    "hf_v0init torch transformers accelerate datasets tokenizers numpy pytorch-warmup pytorch-optimizer schedulefree sacrebleu"
).split()


def list_devices(plan: Plan, wanted: str | None = None) -> tuple[str, ...] | None:
    """Return the ids of the devices to hand out, as `CUDA_VISIBLE_DEVICES` names them.

    Args:
        plan: the comparison; one whose runs all have `use_cpu` needs none.
        wanted: the ids, comma separated, or `none`. Without it those of `CUDA_VISIBLE_DEVICES`, else those that `nvidia-smi` lists
            (a MIG instance counts as a device). Devices of other makers have to be named.

    Returns:
        The ids; () if there are to be none; None if nothing is known of any, which leaves the environment as it is.

    Raises:
        InputError: an id given twice, or none where ids were to be.
    """
    if wanted is not None:
        if wanted.strip() == NO_DEVICES:
            return ()
        devices = _split(wanted)
        if not devices or len(set(devices)) < len(devices):
            raise InputError(f"devices={wanted!r}: give each device once, such as --devices 0,1, or --devices none")
        return devices
    if all(run.arguments.get("use_cpu") for run in plan.runs):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (_split(visible) if visible is not None else _ask_driver()) or None


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _ask_driver() -> tuple[str, ...]:
    if not shutil.which("nvidia-smi"):
        return ()
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    devices: list[str] = []
    is_split = False  # the last GPU into MIG instances
    for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
        if gpu := re.match(r"GPU (\d+):", line):
            devices, is_split = [*devices, gpu[1]], False
        elif instance := re.search(r"\(UUID: (MIG-[^)]+)\)", line):
            devices = [*devices[: None if is_split else -1], instance[1]]
            is_split = True
    return tuple(devices)


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
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": name,
        "cores": os.cpu_count() or 1,
    }
    found["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found["gpus"] = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return found
