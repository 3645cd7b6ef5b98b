"""What runs cost: hours of the machine, or of its accelerators where it has any."""

from __future__ import annotations

from collections.abc import Iterable

from .results import RunResult

OF_SEVERAL_PROCESSES = ("torchrun", "accelerate", "deepspeed", "torch.distributed")  # launchers


def compute_run_hours(run: RunResult) -> float | None:
    """Compute the accelerator-hours of a run, or machine-hours without an accelerator; None if its time is not known.

    Wall-clock from start to end, evaluations included. Runs that went side by side (`jobs`) share what the machine has evenly, but
    one started by plain Python never holds more than one accelerator.
    """
    if run.seconds is None:
        return None
    share = max(1, len(run.hardware.get("gpus") or [])) / (run.hardware.get("jobs") or 1)
    if not any(launcher in run.launch for launcher in OF_SEVERAL_PROCESSES):
        share = min(share, 1.0)
    return run.seconds / 3600.0 * share


def sum_hours(runs: Iterable[RunResult]) -> float | None:
    """Sum the hours of all runs whose time is known, failed and diverged ones too; None if none is."""
    known = [hours for run in runs if (hours := compute_run_hours(run)) is not None]
    return sum(known) if known else None


def name_hours(runs: Iterable[RunResult]) -> str:
    """Name the unit of `compute_run_hours`: accelerator-hours if any run had one."""
    return "accelerator-hours" if any(run.hardware.get("gpus") for run in runs) else "machine-hours"
