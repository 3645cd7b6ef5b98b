"""Families of arms held against each other so that the choice within them does not flatter either.

The best of many settings looks better than it is on the very runs by which it was chosen. So each seed judges a choice that was made
without it: for every seed the best trial of a family on the *other* seeds is taken, and the two choices are compared on this one (the
leave-one-out form of "choose on some seeds, judge on the others"). A seed on which more trials were planned than on all of them, where
settings were screened, judges nothing: what was promoted from there has been chosen by it. A trial is an arm at one learning rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .summary import Arm, ArmAtRate, Interval, Summary, compute_t_interval


@dataclass(frozen=True)
class Contest:
    """The best arm of one family against the best of another.

    Attributes:
        one, other: the arms of the best means, each at its best learning rate.
        num_one, num_other: the trials each was chosen from.
        interval: of `one` - `other`; with a choice, of what was chosen without the seed less the same of the other family.
        of_the_chosen: of these two arms, over all seeds they share, as if they had been the only ones.
        screened: shared seeds that judge nothing, since the settings were screened there.
    """

    one: Arm
    other: Arm
    num_one: int
    num_other: int
    interval: Interval
    of_the_chosen: Interval
    screened: tuple[int, ...] = ()

    @property
    def has_choice(self) -> bool:
        """Whether either family had more than one trial."""
        return max(self.num_one, self.num_other) > 1


def list_trials(summary: Summary, *kinds: str) -> list[ArmAtRate]:
    """List the arms of these kinds at each learning rate at which they have a result."""
    return [rate for arm in summary.list_arms(*kinds) for rate in arm.rates.values() if rate.final is not None]


def hold_contest(summary: Summary, kind: str, other_kind: str) -> Contest | None:
    """Hold the best arm of one kind against the best of another; None if one has no result, or they share no seed."""
    one, other = summary.find_best(kind), summary.find_best(other_kind)
    if one is None or other is None:
        return None
    naive = summary.subtract(one.best, other.best)
    if naive is None:
        return None
    families = [list_trials(summary, k) for k in (kind, other_kind)]
    numbers = [len(family) for family in families]
    planned = [rate for k in (kind, other_kind) for arm in summary.arms if arm.kind == k for rate in arm.rates.values()]
    if max(numbers) == 1:
        return Contest(one, other, *numbers, naive, naive)
    seeds = naive.seeds
    whole = [rate for rate in planned if set(seeds) <= {run.seed for run in rate.runs}]
    screened = tuple(s for s in seeds if sum(any(run.seed == s for run in rate.runs) for rate in planned) > len(whole))
    judges = [seed for seed in seeds if seed not in screened]
    if len(seeds) < 2 or not judges:
        return Contest(
            one, other, *numbers, Interval(naive.mean, None, None, seeds, naive.greater_is_better), naive, screened
        )
    finalists = [[rate for rate in family if set(seeds) <= rate.losses.keys()] for family in families]
    differences = {}
    for seed in judges:
        first, second = (_choose(family, [s for s in seeds if s != seed], summary) for family in finalists)
        differences[seed] = first.losses[seed] - second.losses[seed]
    interval = compute_t_interval(differences, naive.greater_is_better)
    return None if interval is None else Contest(one, other, *numbers, interval, naive, screened)


def _choose(family: Sequence[ArmAtRate], seeds: Sequence[int], summary: Summary) -> ArmAtRate:
    sign = -1.0 if summary.greater_is_better else 1.0
    return min(family, key=lambda rate: sign * statistics.fmean(rate.losses[seed] for seed in seeds))
