"""A comparison as it stood at one optimizer step: what runs under way, or cut off, already say about each other.

Every run is taken back to what it had logged at that step, those that are over too, so that all have had the same training.
"""

from __future__ import annotations

import math

from ...errors import InputError
from .results import DIVERGED, FAILED, FINISHED, REACHED, STOPPED_EARLY, Comparison, RunResult

DEFAULT_SCHEDULE = "linear"  # transformers'
KNOW_NO_END = ("constant", "constant_with_warmup", "inverse_sqrt")  # schedules that do not depend on the run's length


def take_back(comparison: Comparison, step: int) -> None:
    """Take every run back, in place, to its evaluation after optimizer step `step`; its state is then `reached_step`.

    A run that diverged, failed or was stopped earlier stays as it was. One whose loss was no finite number there, or above that at
    start, has diverged. One that was not evaluated there counts nowhere. Test figures go: they belong to the end of a run.

    Raises:
        InputError: no run was evaluated at that step.
    """
    if step < 1 or not any(step in run.eval_steps for run in comparison.runs):
        raise InputError(
            f"at_step={step}: no run was evaluated after that optimizer step; {_list_shared_steps(comparison.runs)}"
        )
    comparison.at_step = step
    for run in comparison.runs:
        _take_run_back(run, step, comparison.metric)


def knows_no_end(comparison: Comparison) -> bool:
    """Whether all runs have a schedule that does not depend on their length, so that shorter runs would have gone the same way."""
    schedules = {str(run.arguments.get("lr_scheduler_type") or DEFAULT_SCHEDULE) for run in comparison.runs}
    return schedules <= set(KNOW_NO_END)


def _take_run_back(run: RunResult, step: int, metric: str) -> None:
    reached = step in run.eval_steps
    if not reached and run.state in (DIVERGED, FAILED, STOPPED_EARLY) and (run.num_steps or 0) <= step:
        return
    num_train = sum(s <= step for s in run.train_steps)
    num_eval = sum(s <= step for s in run.eval_steps)
    run.train_steps, run.train_losses = run.train_steps[:num_train], run.train_losses[:num_train]
    run.eval_steps, run.eval_losses = run.eval_steps[:num_eval], run.eval_losses[:num_eval]
    run.eval_seconds = run.eval_seconds[:num_eval]
    run.metrics, run.seconds, run.final_loss, run.train_seconds = {}, None, None, None
    if not reached:
        if run.state in (FINISHED, DIVERGED, STOPPED_EARLY):
            run.problems.append(f"not evaluated after step {step:,}")
        return
    run.state, run.reason, run.num_steps = REACHED, None, step
    run.final_loss, run.train_seconds = run.eval_losses[-1], run.eval_seconds[-1]
    if not math.isfinite(run.final_loss):
        run.state, run.reason = DIVERGED, f"the validation loss is {run.final_loss} at step {step:,}"
    elif metric == "eval_loss" and run.start_loss is not None and run.final_loss > run.start_loss:
        run.state = DIVERGED
        run.reason = (
            f"the validation loss at step {step:,}, {run.final_loss:.4g}, is above that at start, {run.start_loss:.4g}"
        )


def _list_shared_steps(runs: list[RunResult]) -> str:
    started = [set(run.eval_steps) - {0} for run in runs if set(run.eval_steps) - {0}]
    if not started:
        return "none has been evaluated after its start"
    shared = sorted(set.intersection(*started))
    if not shared:
        return "the runs share no evaluation: give one that most of them have"
    more = " (the last five)" if len(shared) > 5 else ""
    return f"all runs that have begun have these in common{more}: {', '.join(map(str, shared[-5:]))}"
