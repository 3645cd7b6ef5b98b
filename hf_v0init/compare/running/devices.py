"""Which GPUs a call hands out, one to a run of one process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from ...errors import InputError
from ..planning.plan import Plan
from .launch import is_one_process

NO_DEVICES = "none"


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


def choose_jobs(plan: Plan, devices: tuple[str, ...] | None) -> int:
    """Return how many runs go side by side if nobody says: one for each device, or 1 where a launcher takes them all."""
    return max(1, len(devices or ())) if is_one_process(plan.launch) else 1


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _ask_driver() -> tuple[str, ...]:
    if not shutil.which("nvidia-smi"):
        return ()
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    devices: list[str] = []
    is_split = False  # the last GPU into MIG instances
    for line in lines:
        if gpu := re.match(r"GPU (\d+):", line):
            devices, is_split = [*devices, gpu[1]], False
        elif instance := re.search(r"\(UUID: (MIG-[^)]+)\)", line):
            devices = [*devices[: None if is_split else -1], instance[1]]
            is_split = True
    return tuple(devices)
