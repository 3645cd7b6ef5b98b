"""The numbers: paired t intervals with Holm's correction, non-inferiority, the best of k.

Losses are by seed; a seed whose run diverged without a known loss at the start has a value that is not finite. "Better" is lower, or
higher where more of the metric is better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit  # Student's t; far lighter to import than scipy.stats

CONFIDENCE = 0.95
BAND = (0.1, 0.9)  # of the best of k: the middle eight of ten draws


class Verdict(str, Enum):
    """What a planned contrast has shown; the last three also of whether v0 can replace the warmup, a test of non-inferiority."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SIGNIFICANT = "not significant"
    CAN_REPLACE = "can replace"
    NOT_SHOWN = "not shown"
    TOO_FEW_SEEDS = "too few seeds"


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences, in the metric's unit, with its 95% t interval.

    Attributes:
        mean, low, high: over the seeds on which both are finite; NaN where there are none, or too few for an interval.
        p_value: of the paired t test, two-sided.
        n: seeds that the interval is over.
        lost_one, lost_other: seeds on which the one, or the other, diverged and has no value.
    """

    mean: float
    low: float
    high: float
    p_value: float
    n: int
    lost_one: int = 0
    lost_other: int = 0


@dataclass(frozen=True)
class Contrast:
    """One family less another, on the seeds of the confirmation; `p_adjusted` is Holm's, over the planned contrasts."""

    one: str
    other: str
    interval: Interval
    p_adjusted: float = math.nan
    verdict: Verdict = Verdict.TOO_FEW_SEEDS


@dataclass(frozen=True)
class NonInferiority:
    """Whether what v0 may lose against the warmup (`worst`, the bad end of the 95% interval) is below the margin."""

    worst: float
    margin: float
    verdict: Verdict


def compute_paired_interval(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Compute `one` - `other` over the seeds that both have: mean -+ t(.975; n - 1) s / sqrt(n). None without a common seed."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    lost_one = sum(not math.isfinite(one[seed]) for seed in seeds)
    lost_other = sum(not math.isfinite(other[seed]) for seed in seeds)
    differences = [one[s] - other[s] for s in seeds if math.isfinite(one[s]) and math.isfinite(other[s])]
    mean = statistics.fmean(differences) if differences else math.nan
    low, high, p_value = math.nan, math.nan, math.nan
    if len(differences) > 1:
        half = compute_half_width(differences)
        low, high = mean - half, mean + half
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        p_value = 2 * float(stdtr(len(differences) - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Interval(mean, low, high, p_value, len(differences), lost_one, lost_other)


def compute_half_width(values: Sequence[float]) -> float:
    """Compute half the width of the 95% t interval of the mean of n >= 2 values."""
    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values (Holm, 1979): the i-th smallest of m times m - i + 1, made monotone, at most 1."""
    adjusted, largest = [math.nan] * len(p_values), 0.0
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def judge_contrasts(
    losses: Mapping[str, Mapping[int, float]], planned: Sequence[tuple[str, str]], greater_is_better: bool = False
) -> list[Contrast]:
    """Judge the planned contrasts that there are, with Holm's correction over them.

    A family that has lost more seeds to divergence than the other is never called better than it.

    Args:
        losses: family -> seed -> loss, of the confirmation.
        planned: pairs of families.
        greater_is_better: whether more of the metric is better.
    """
    pairs = [(one, other) for one, other in planned if one in losses and other in losses]
    intervals = [compute_paired_interval(losses[one], losses[other]) for one, other in pairs]
    found = [(pair, interval) for pair, interval in zip(pairs, intervals, strict=True) if interval is not None]
    adjusted = adjust_by_holm([interval.p_value for _, interval in found])
    judged = []
    for (pair, interval), p in zip(found, adjusted, strict=True):
        contrast = Contrast(*pair, interval, p)
        if not math.isnan(p):
            is_better = (interval.mean > 0) == greater_is_better
            is_flattered = (
                interval.lost_one > interval.lost_other if is_better else interval.lost_other > interval.lost_one
            )
            verdict = Verdict.BETTER if is_better else Verdict.WORSE
            is_significant = p <= 1 - CONFIDENCE and not is_flattered
            contrast = replace(contrast, verdict=verdict if is_significant else Verdict.NOT_SIGNIFICANT)
        judged.append(contrast)
    return judged


def judge_replacement(interval: Interval, margin: float, greater_is_better: bool = False) -> NonInferiority:
    """Test that v0 is no worse than the warmup by `margin` (> 0, in the metric's unit): the interval's bad end is below it.

    `interval` is of v0 less the warmup. A v0 that has lost a seed to divergence cannot replace it.
    """
    worst = -interval.low if greater_is_better else interval.high
    if math.isnan(worst):
        return NonInferiority(worst, margin, Verdict.TOO_FEW_SEEDS)
    is_shown = worst < margin and interval.lost_one == 0
    return NonInferiority(worst, margin, Verdict.CAN_REPLACE if is_shown else Verdict.NOT_SHOWN)


def choose_best(scores: Mapping[object, Mapping[int, float]]) -> object | None:
    """Choose the candidate of the lowest mean score over the seeds that all of them have (over their own, if they share none).

    Args:
        scores: candidate -> seed -> score, lower is better; what is not finite is the worst.

    Returns:
        The candidate, the first of equal ones; None if no mean is finite.
    """
    shared = set.intersection(*(set(by_seed) for by_seed in scores.values())) if scores else set()
    best, lowest = None, math.inf
    for candidate, by_seed in scores.items():
        values = [score for seed, score in by_seed.items() if seed in shared or not shared]
        mean = statistics.fmean(values) if values and all(map(math.isfinite, values)) else math.inf
        if mean < lowest:
            best, lowest = candidate, mean
    return best


def compute_budget(losses: Sequence[float], greater_is_better: bool = False) -> pd.DataFrame:
    """Compute the budget curve of a family: the best loss after 1, 2, ... random trials, drawn without replacement.

    A trial is a setting at one learning rate. The best of k from n has the expectation sum_i v_(i) C(n - i, k - 1) / C(n, k) over the
    sorted losses: the expected validation performance of Dodge et al. (2019), in the unbiased form of Tang et al. (2020).

    Returns:
        A row for each k, in the metric's unit: `expected`, and the ends `low` and `high` between which 8 of 10 draws lie.
    """
    sign = -1.0 if greater_is_better else 1.0
    ordered, n, rows = np.sort(sign * np.asarray(losses, dtype=float)), len(losses), []
    for k in range(1, n + 1):
        # Of each value, to be the lowest of k draws; only the first n - k + 1 can be.
        chances = np.array([math.comb(n - i, k - 1) / math.comb(n, k) for i in range(1, n - k + 2)])
        ends = [ordered[np.argmax(chances.cumsum() >= quantile * (1.0 - 1e-12))] for quantile in BAND]
        rows.append((ordered[: n - k + 1] @ chances, *ends))
    return sign * pd.DataFrame(rows, columns=["expected", "low", "high"])
