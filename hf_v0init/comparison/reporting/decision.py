"""Which answer the numbers give: the best v0 without a warmup, against the best warmup without a v0.

Each at its best learning rate, over the seeds they share.

| answer | when |
| --- | --- |
| `nothing_finished`, `all_diverged` | no run counts; every run that counts diverged |
| `no_v0`, `no_warmup`, `no_shared_seed` | one side, or a seed that both have, is missing |
| `too_few_seeds` | one seed, or two whose interval holds 0 |
| `neither_needed` | the plain start diverged on no seed, and neither is better than it beyond noise or may be by over 5% (3 seeds or more) |
| `v0_wins` | the interval of the difference lies below 0 |
| `no_difference` | it holds 0, and its upper end is at most 5% of the warmup's loss |
| `undecided` | it holds 0, but v0 may be worse by more |
| `warmup_wins`, `v0_does_not_help` | it lies above 0; v0 is, or is not, better than the plain start beyond noise |
"""

from __future__ import annotations

from ..reading.results import DIVERGED
from ..reading.summary import V0, Arm, Interval, Summary, compute_paired_interval

FEW_SEEDS = 3  # below this, words on noise are not worth much
MARGIN = 0.05  # of the best warmup's loss: a v0 that may be worse by more has not been shown to replace it

NOTHING, ALL_DIVERGED, NO_V0_RESULT, NO_WARMUP_RESULT, NO_SHARED_SEED = (
    "nothing_finished", "all_diverged", "no_v0", "no_warmup", "no_shared_seed",
)  # fmt: skip
TOO_FEW, UNDECIDED, V0_WINS, NO_DIFFERENCE, NEITHER_NEEDED, WARMUP_WINS, V0_USELESS = (
    "too_few_seeds", "undecided", "v0_wins", "no_difference", "neither_needed", "warmup_wins", "v0_does_not_help",
)  # fmt: skip


def decide(summary: Summary) -> str:
    """Name the answer that the numbers give; one of this module's constants."""
    counted = [run for run in summary.comparison.runs if run.is_counted]
    if not counted:
        return NOTHING
    if all(run.state == DIVERGED for run in counted):
        return ALL_DIVERGED
    v0, warmup = summary.find_best(V0), summary.best_warmup
    if v0 is None:
        return NO_V0_RESULT
    if warmup is None:
        return NO_WARMUP_RESULT
    difference = v0.to_warmup
    if difference is None:
        return NO_SHARED_SEED
    if difference.n < 2 or (difference.n < FEW_SEEDS and difference.verdict == "same"):
        return TOO_FEW
    if _is_plain_as_good(summary, v0, warmup):
        return NEITHER_NEEDED
    if difference.verdict == "lower":
        return V0_WINS
    if difference.verdict == "same":
        return NO_DIFFERENCE if difference.high <= MARGIN * warmup.best.final.mean else UNDECIDED
    gain = compare_to_plain(summary, v0)
    helps = gain is None or gain.verdict == "lower"
    return WARMUP_WINS if helps else V0_USELESS


def compare_to_plain(summary: Summary, arm: Arm) -> Interval | None:
    """Return the arm's difference to the plain start, of its own optimizer and settings if that was run."""
    if arm.to_plain is not None or summary.plain is None:
        return arm.to_plain
    return compute_paired_interval(arm.best.losses, summary.plain.best.losses)


def _is_plain_as_good(summary: Summary, v0: Arm, warmup: Arm) -> bool:
    """Whether neither is better than the plain start beyond noise, nor may be by more than the margin; over 3 seeds or more."""
    plain = summary.plain
    if plain is None or plain.best.count(DIVERGED):
        return False
    least = -MARGIN * plain.best.final.mean
    gains = [compute_paired_interval(arm.best.losses, plain.best.losses) for arm in (v0, warmup)]
    return all(g is not None and g.n >= FEW_SEEDS and g.verdict != "lower" and g.low >= least for g in gains)
