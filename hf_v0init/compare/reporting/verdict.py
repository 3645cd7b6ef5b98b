"""The answer that the numbers of a comparison give, by name.

Three are held against each other, each chosen from all its trials (arms at learning rates): the best v0 without a warmup, the best
warmup without a v0, and the plain start, which has neither and is the simplest.

| answer | when |
| --- | --- |
| `nothing_finished`, `all_diverged` | no run counts; every run that counts diverged |
| `no_v0`, `no_shared_seed` | no v0 has a result; v0 and warmup share no seed |
| `no_warmup`, `v0_harms` | no warmup has a result; and v0 is worse than the plain start beyond noise |
| `too_few_seeds` | fewer than two seeds judge, or two whose interval holds 0 |
| `plain_wins` | both v0 and warmup are worse than the plain start beyond noise |
| `neither_needed` | neither is better than it beyond noise, nor may be by over 5% of its loss (3 seeds or more) |
| `v0_wins` | v0 is better than the warmup beyond noise, and the plain start not better than v0 |
| `no_difference` | within noise, and v0 may be worse by at most 5% of the warmup's loss |
| `undecided` | within noise, but v0 may be worse by more; or neither is shown to be better than the plain start |
| `warmup_wins`, `v0_does_not_help` | v0 is worse beyond noise; it is, or is not, better than the plain start |
"""

from __future__ import annotations

from dataclasses import dataclass

from ..reading.choice import Contest, hold_contest
from ..reading.results import DIVERGED
from ..reading.summary import PLAIN, V0, WARMUP, Summary

FEW_SEEDS = 3  # below this, words on noise are not worth much
MARGIN = 0.05  # of the best warmup's loss: a v0 that may be worse by more has not been shown to replace it

NOTHING, ALL_DIVERGED, NO_V0_RESULT, NO_WARMUP_RESULT, NO_SHARED_SEED = (
    "nothing_finished", "all_diverged", "no_v0", "no_warmup", "no_shared_seed",
)  # fmt: skip
TOO_FEW, UNDECIDED, V0_WINS, NO_DIFFERENCE = "too_few_seeds", "undecided", "v0_wins", "no_difference"
NEITHER_NEEDED, PLAIN_WINS, WARMUP_WINS, V0_USELESS, V0_HARMS = (
    "neither_needed", "plain_wins", "warmup_wins", "v0_does_not_help", "v0_harms",
)  # fmt: skip


@dataclass(frozen=True)
class Contests:
    """The three comparisons that the answer rests on; None where a side or a shared seed is missing."""

    of_both: Contest | None  # v0 against the warmup
    v0_to_plain: Contest | None
    warmup_to_plain: Contest | None


def hold_contests(summary: Summary) -> Contests:
    """Hold v0, warmup and plain start against each other."""
    return Contests(
        hold_contest(summary, V0, WARMUP), hold_contest(summary, V0, PLAIN), hold_contest(summary, WARMUP, PLAIN)
    )


def decide(summary: Summary, contests: Contests) -> str:
    """Name the answer that the numbers give; one of this module's constants."""
    counted = [run for run in summary.comparison.runs if run.is_counted]
    if not counted:
        return NOTHING
    if all(run.state == DIVERGED for run in counted):
        return ALL_DIVERGED
    if summary.find_best(V0) is None:
        return NO_V0_RESULT
    both, v0, warmup = contests.of_both, contests.v0_to_plain, contests.warmup_to_plain
    if summary.best_warmup is None:
        return V0_HARMS if read(v0) == "worse" else NO_WARMUP_RESULT
    if both is None:
        return NO_SHARED_SEED
    if is_open(both):
        return TOO_FEW
    if v0 is not None and warmup is not None and not summary.plain.best.count(DIVERGED):
        readings = {read(v0), read(warmup)}
        if readings == {"worse"}:
            return PLAIN_WINS
        if "better" not in readings and not (is_open(v0) or is_open(warmup)):
            least = MARGIN * abs(summary.plain.best.final.mean)
            few_gain = all(c.interval.largest_gain <= least for c in (v0, warmup))
            return NEITHER_NEEDED if few_gain else UNDECIDED
        if "better" not in readings and not (v0.interval.is_ahead and warmup.interval.is_ahead):
            return TOO_FEW
    if read(both) == "better":
        return V0_WINS if _is_not_behind(v0) else UNDECIDED
    if read(both) == "unclear":
        if v0 is not None and warmup is not None and read(v0) != "better" and read(warmup) == "better":
            return UNDECIDED  # the warmup helps, v0 is not shown to
        tolerated = MARGIN * abs(summary.best_warmup.best.final.mean)
        return NO_DIFFERENCE if both.interval.largest_loss <= tolerated else UNDECIDED
    if not _is_not_behind(warmup):
        return UNDECIDED
    return WARMUP_WINS if v0 is None or read(v0) == "better" or is_open(v0) else V0_USELESS


def _is_not_behind(contest: Contest | None) -> bool:
    """Whether the plain start, the simpler of the two, is not ahead by its mean."""
    return contest is None or contest.interval.is_ahead


def read(contest: Contest | None) -> str:
    """Return the verdict of a contest's interval; 'unknown' where there is no contest."""
    return "unknown" if contest is None else contest.interval.verdict


def is_open(contest: Contest) -> bool:
    """Whether too few seeds judge to say anything."""
    verdict = contest.interval.verdict
    return verdict == "unknown" or (verdict == "unclear" and contest.interval.n < FEW_SEEDS)
