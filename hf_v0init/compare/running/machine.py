"""What a run was made with: versions of the packages, and the machine. Imports none of the packages."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil

PACKAGES = ("hf_v0init", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "pytorch-warmup")
PACKAGES += ("pytorch-optimizer", "schedulefree", "sacrebleu")


@functools.cache
def _find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that numbers depend on."""
    return dict(_find_versions())


@functools.cache
def _find_hardware() -> dict[str, str | int | float | list[str]]:
    found: dict[str, str | int | float | list[str]] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _read_cpu_name() or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found["gpus"] = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return found


def describe_hardware() -> dict[str, str | int | float | list[str]]:
    """Return the system, the CPU, its cores, the memory in GiB, and the names of NVIDIA GPUs if there are any."""
    return dict(_find_hardware())


def _read_cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
