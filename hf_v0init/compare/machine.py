"""What the runs of this machine share: its cores and GPUs; and what they were made with: versions and hardware."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

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
        wanted: the ids, comma separated, or `none`. Without it those of `CUDA_VISIBLE_DEVICES`, else those that `nvidia-smi` lists.
            MIG instances and devices of other makers have to be named.

    Returns:
        The ids; () if there are to be none; None if nothing is known of any, which leaves the environment as it is.
    """
    if wanted is not None:
        return () if wanted.strip() == NO_DEVICES else tuple(dict.fromkeys(_split(wanted)))
    if all(run.arguments.get("use_cpu") for run in plan.runs):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(_split(visible) if visible is not None else _ask_driver("index")) or None


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


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
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": name,
        "cores": os.cpu_count() or 1,
    }
    found["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    gpus = _ask_driver("name")
    return found | ({"gpus": gpus} if gpus else {})
