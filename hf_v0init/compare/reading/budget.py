"""What a tuning budget buys: the best loss that so many random trials of a family come to.

A trial is an arm at one learning rate, trained with one seed. The best of k trials drawn without replacement from the n that were run
has the expectation sum_i v_(i) C(n - i, k - 1) / C(n, k) over the sorted losses v_(1) <= ... <= v_(n): the expected validation
performance of Dodge et al. (2019, "Show Your Work"), in the unbiased form of Tang et al. (2020, "Showing Your Work Doesn't Always Work").
Who tunes this way does it with one seed, so every seed has a curve of its own, and the report shows their mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .choice import list_trials
from .cost import compute_run_hours
from .summary import OTHER_OPTIMIZER, PLAIN, V0, V0_AND_WARMUP, WARMUP, ArmAtRate, Summary

FAMILIES = (PLAIN, WARMUP, V0, V0_AND_WARMUP, OTHER_OPTIMIZER)
BAND = (0.1, 0.9)  # the middle eight of ten draws


@dataclass(frozen=True)
class BudgetCurve:
    """The best loss after 1, 2, ... trials: its expectation and the ends of its band.

    Attributes:
        kind: the family.
        num_trials: how many there are to draw from.
        expected, low, high: by number of trials less 1, in the metric's unit; `low` is the better end.
        hours: machine-hours (`cost.compute_run_hours`) of a trial, the mean over them; None if unknown.
    """

    kind: str
    num_trials: int
    expected: list[float]
    low: list[float]
    high: list[float]
    hours: float | None


@dataclass(frozen=True)
class Budget:
    """The curves of the families, over the seeds that have all their trials, or else the most."""

    curves: list[BudgetCurve]
    seeds: tuple[int, ...]
    num_left_out: int  # trials that these seeds do not have


def compute_budget(summary: Summary) -> Budget | None:
    """Compute the curve of every family that has a result; None without one."""
    families = {kind: trials for kind in FAMILIES if (trials := list_trials(summary, kind))}
    if not families:
        return None
    seeds = _choose_seeds([trial for trials in families.values() for trial in trials])
    curves, num_left_out = [], 0
    for kind, trials in families.items():
        shared = [trial for trial in trials if set(seeds) <= trial.losses.keys()]
        num_left_out += len(trials) - len(shared)
        if shared:
            by_seed = {seed: [trial.losses[seed] for trial in shared] for seed in seeds}
            curves.append(_make_curve(kind, by_seed, shared, summary.greater_is_better))
    return Budget(curves, seeds, num_left_out)


def compute_expected_best(losses: Sequence[float], num_draws: int) -> float:
    """Compute the expectation of the lowest of `num_draws` losses drawn without replacement; 1 <= num_draws <= len(losses)."""
    return sum(value * share for value, share in _list_shares(losses, num_draws) if share > 0.0)


def _list_shares(losses: Sequence[float], num_draws: int) -> list[tuple[float, float]]:
    """The sorted losses, each with the chance that it is the lowest of the draws."""
    n, draws = len(losses), math.comb(len(losses), num_draws)
    return [(value, math.comb(n - i, num_draws - 1) / draws) for i, value in enumerate(sorted(losses), 1)]


def compute_quantile(shares: Sequence[tuple[float, float]], quantile: float) -> float:
    """Compute the lowest value that at least this share of the (unnormalised) weights does not exceed."""
    ordered = sorted(shares)
    total, passed = sum(share for _, share in ordered), 0.0
    for value, share in ordered:
        passed += share
        if passed >= quantile * total * (1.0 - 1e-12):
            return value
    return ordered[-1][0]


def _make_curve(
    kind: str, by_seed: Mapping[int, list[float]], trials: Sequence[ArmAtRate], greater_is_better: bool
) -> BudgetCurve:
    sign = -1.0 if greater_is_better else 1.0
    by_seed = {seed: [sign * loss for loss in losses] for seed, losses in by_seed.items()}
    expected, low, high = [], [], []
    for num_draws in range(1, len(trials) + 1):
        expected.append(sign * statistics.fmean(compute_expected_best(v, num_draws) for v in by_seed.values()))
        shares = [pair for losses in by_seed.values() for pair in _list_shares(losses, num_draws)]
        low.append(sign * compute_quantile(shares, BAND[0]))
        high.append(sign * compute_quantile(shares, BAND[1]))
    hours = [
        h for trial in trials for run in trial.runs if run.is_counted and (h := compute_run_hours(run)) is not None
    ]
    return BudgetCurve(kind, len(trials), expected, low, high, statistics.fmean(hours) if hours else None)


def _choose_seeds(trials: Sequence[ArmAtRate]) -> tuple[int, ...]:
    """The seeds on which the most trials have a result: all of them in a full grid, else where settings were screened."""
    counts: dict[int, int] = {}
    for trial in trials:
        for seed in trial.losses:
            counts[seed] = counts.get(seed, 0) + 1
    most = max(counts.values())
    seeds = tuple(sorted(seed for seed, count in counts.items() if count == most))
    # Two seeds may have as many trials, but not the same ones.
    return seeds if most == sum(set(seeds) <= trial.losses.keys() for trial in trials) else seeds[:1]
