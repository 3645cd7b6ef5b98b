"""From runs to numbers: means over seeds, paired differences, steps to the best warmup's loss, learning-rate sensitivity.

Three rules hold throughout. A run that diverged counts with the loss at start (its seed's), so that an arm does not look better for
losing its bad runs; one that failed for another reason or is not through counts nowhere, and is shown. An arm is judged at the
learning rate of the lowest mean final validation loss. Differences are taken seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..planning.axes import NO_V0, NO_WARMUP
from .results import DIVERGED, FAILED, FINISHED, REACHED, STOPPED_EARLY, Comparison, RunResult

CONFIDENCE = 0.95
PLAIN, WARMUP, V0, V0_AND_WARMUP, OTHER_OPTIMIZER = "plain", "warmup", "v0", "v0 + warmup", "other optimizer"


@dataclass(frozen=True)
class Estimate:
    """Mean, standard deviation (n - 1; None for n < 2) and number of values."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences over `seeds`, and the ends of its confidence interval (None for fewer than two)."""

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.seeds)

    @property
    def verdict(self) -> str:
        """'lower' or 'higher' if the interval leaves out 0, 'same' if it does not, 'unknown' without an interval."""
        if self.low is None or self.high is None:
            return "unknown"
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "same"


@dataclass
class ArmAtRate:
    """One arm at one learning rate. Losses over the runs that count; `steps_to` over those that reached the target."""

    arm: str
    learning_rate: float
    runs: list[RunResult]
    final: Estimate | None = None
    best: Estimate | None = None
    tests: dict[str, Estimate] = field(default_factory=dict)
    steps_to: Estimate | None = None
    steps_to_charged: Estimate | None = None
    seconds_to: Estimate | None = None
    num_with_target: int = 0
    train_seconds: Estimate | None = None

    @property
    def losses(self) -> dict[int, float]:
        """The loss that each seed's run counts with."""
        return {run.seed: run.scored_loss for run in self.runs if run.is_counted}

    def count(self, state: str) -> int:
        """Count the runs in this state."""
        return sum(run.state == state for run in self.runs)


@dataclass
class Arm:
    """One arm over its learning rates; `best` is None while no run of it counts."""

    name: str
    kind: str
    v0: str
    warmup: str
    optimizer: str
    other: dict
    rates: dict[float, ArmAtRate]
    best: ArmAtRate | None = None
    sensitivity: float | None = None
    sensitivities: dict[int, float] = field(default_factory=dict)  # by seed; their mean is `sensitivity`
    to_warmup: Interval | None = None
    to_plain: Interval | None = None

    @property
    def runs(self) -> list[RunResult]:
        """The arm's runs at all learning rates."""
        return [run for rate in self.rates.values() for run in rate.runs]

    @property
    def group(self) -> tuple[str, str]:
        """Optimizer and further settings: what the arm shares with those it differs from in v0 and warmup alone.

        Settings of v0 (`v0_...`) are left out: a run without a v0 is the same whatever they are.
        """
        settings = [f"{name}={value}" for name, value in sorted(self.other.items()) if not name.startswith("v0_")]
        return self.optimizer, ", ".join(settings)

    def share(self, *states: str) -> tuple[int, int]:
        """Count the runs in these states among those that have ended."""
        ended = [r for r in self.runs if r.state in (FINISHED, REACHED, DIVERGED, STOPPED_EARLY, FAILED)]
        return sum(run.state in states for run in ended), len(ended)


@dataclass
class Summary:
    """All arms, best first (those without a result last), and those that the others are held against."""

    comparison: Comparison
    arms: list[Arm]
    best_warmup: Arm | None
    plain: Arm | None
    targets: dict[int, float]  # by seed: the best warmup's final loss

    def find_best(self, *kinds: str) -> Arm | None:
        """Return the arm of these kinds with the lowest mean final loss, None if none has a result."""
        return next((arm for arm in self.arms if arm.kind in kinds and arm.best is not None), None)

    def list_arms(self, *kinds: str) -> list[Arm]:
        """Return the arms of these kinds that have a result, best first."""
        return [arm for arm in self.arms if arm.kind in kinds and arm.best is not None]


# ----------------------------------------------------------------------------------------------------------------- numbers


def compute_estimate(values: Iterable[float]) -> Estimate | None:
    """Compute mean and standard deviation (n - 1) of the values; None if there are none."""
    values = list(values)
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Estimate(math.inf, None, len(values))
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def compute_t_interval(differences: Mapping[int, float], confidence: float = CONFIDENCE) -> Interval | None:
    """Compute the mean of differences by seed with its Student-t interval; None if there are none or one is not finite.

    mean -+ t((1 + confidence) / 2; n - 1) * s / sqrt(n), with s the standard deviation (n - 1).
    """
    values = list(differences.values())
    if not values or not all(map(math.isfinite, values)):
        return None
    mean, seeds = statistics.fmean(values), tuple(sorted(differences))
    if len(values) < 2:
        return Interval(mean, None, None, seeds)
    half = compute_half_width(statistics.stdev(values), len(values), confidence)
    return Interval(mean, mean - half, mean + half, seeds)


def compute_half_width(std: float, n: int, confidence: float = CONFIDENCE) -> float:
    """Compute half the width of the Student-t interval of a mean of n >= 2 values with this standard deviation."""
    from scipy.special import stdtrit  # far lighter than scipy.stats

    return float(stdtrit(n - 1, (1.0 + confidence) / 2.0)) * std / math.sqrt(n)


def compute_paired_interval(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Compute `one` - `other` over the seeds that both have, with its interval; None without a common seed."""
    return compute_t_interval({seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())})


def compute_steps_to_loss(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Compute when the loss first comes down to `target`: linear between evaluations; None if it does not.

    If the first evaluation is there already, or the one before was no finite number, that evaluation's step counts.
    """
    for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        if not loss <= target:
            continue
        if i == 0 or not math.isfinite(losses[i - 1]):
            return float(step)
        share = (losses[i - 1] - target) / (losses[i - 1] - loss)
        return steps[i - 1] + share * (step - steps[i - 1])
    return None


def compute_lr_sensitivity(losses: Mapping[float, float], start_loss: float | None) -> float:
    """Compute the mean over learning rates of min(loss, loss at start) - the best loss (Wortsman et al., 2023, with l0 as bound).

    `losses` by learning rate; in their unit. Without `start_loss` nothing is bounded.
    """
    bound = math.inf if start_loss is None else start_loss
    bounded = [min(loss, bound) for loss in losses.values()]
    return statistics.fmean(bounded) - min(bounded)


# -------------------------------------------------------------------------------------------------------------- the summary


def compute_summary(comparison: Comparison) -> Summary:
    """Compute everything the report says from the runs of a comparison."""
    arms = _collect_arms(comparison)
    for arm in arms:
        for rate in arm.rates.values():
            rate.final = compute_estimate(rate.losses.values())
            rate.best = compute_estimate(run.best_loss for run in rate.runs if run.is_counted)
            for name in comparison.test_metrics:
                values = [run.metrics[name] for run in rate.runs if run.is_counted and name in run.metrics]
                if (estimate := compute_estimate(values)) is not None:
                    rate.tests[name] = estimate
            rate.train_seconds = compute_estimate(
                run.train_seconds
                for run in rate.runs
                if run.state in (FINISHED, REACHED) and run.train_seconds is not None
            )
        arm.best = choose_learning_rate(arm.rates.values())
        _add_sensitivity(arm, comparison)
    arms.sort(key=lambda arm: (arm.best is None, arm.best.final.mean if arm.best else 0.0))
    best_warmup = next((arm for arm in arms if arm.kind == WARMUP and arm.best is not None), None)
    _mark_other_optimizers(arms, best_warmup, comparison)
    plains = [arm for arm in arms if arm.kind == PLAIN]
    plain = next((arm for arm in plains if arm.best is not None), None)
    targets = _find_targets(best_warmup)
    for arm in arms:
        for rate in arm.rates.values():
            _add_steps_to_target(rate, targets)
        if arm.best is None:
            continue
        if best_warmup is not None and arm is not best_warmup:
            arm.to_warmup = compute_paired_interval(arm.best.losses, best_warmup.best.losses)
        own = find_plain(arms, arm)
        if own is not None and own is not arm and own.best is not None:
            arm.to_plain = compute_paired_interval(arm.best.losses, own.best.losses)
    return Summary(comparison, arms, best_warmup, plain, targets)


def choose_learning_rate(rates: Iterable[ArmAtRate]) -> ArmAtRate | None:
    """Choose the learning rate of the lowest mean final loss, among those with results of the most seeds."""
    with_result = [rate for rate in rates if rate.final is not None]
    if not with_result:
        return None
    most = max(rate.final.n for rate in with_result)
    return min((rate for rate in with_result if rate.final.n == most), key=lambda rate: rate.final.mean)


def find_plain(arms: Iterable[Arm], arm: Arm) -> Arm | None:
    """Return the arm without v0 and warmup that shares optimizer and settings with `arm`, None if there is none."""
    return next((a for a in arms if a.v0 == NO_V0 and a.warmup == NO_WARMUP and a.group == arm.group), None)


def _collect_arms(comparison: Comparison) -> list[Arm]:
    arms: dict[str, Arm] = {}
    for run in comparison.runs:
        if run.arm not in arms:
            kind = (V0 if run.warmup == NO_WARMUP else V0_AND_WARMUP) if run.v0 != NO_V0 else WARMUP
            kind = PLAIN if run.v0 == NO_V0 and run.warmup == NO_WARMUP else kind
            arms[run.arm] = Arm(run.arm, kind, run.v0, run.warmup, run.optimizer, run.other, {})
        rates = arms[run.arm].rates
        rates.setdefault(run.learning_rate, ArmAtRate(run.arm, run.learning_rate, [])).runs.append(run)
    for arm in arms.values():
        arm.rates = dict(sorted(arm.rates.items()))
    return list(arms.values())


def _mark_other_optimizers(arms: list[Arm], best_warmup: Arm | None, comparison: Comparison) -> None:
    """Tell the plain start of the main optimizer (the best warmup's, else the commonest) from those of others."""
    if best_warmup is not None:
        main = best_warmup.optimizer
    else:
        main = Counter(run.optimizer for run in comparison.runs).most_common(1)[0][0] if comparison.runs else ""
    for arm in arms:
        if arm.kind == PLAIN and arm.optimizer != main:
            arm.kind = OTHER_OPTIMIZER


def _add_sensitivity(arm: Arm, comparison: Comparison) -> None:
    """The sensitivity of the mean losses, and its share by seed at the same best rate, for arms that have the whole grid."""
    grid = comparison.learning_rates
    if len(grid) < 2 or list(arm.rates) != grid:
        return
    losses = [arm.rates[rate].losses for rate in grid]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in losses)))
    if not seeds or any(rate.count(FAILED) for rate in arm.rates.values()):
        return
    starts = {run.seed: run.start_loss for run in arm.runs}
    bounded = {  # by seed, then by rate
        seed: [min(by_seed[seed], math.inf if starts[seed] is None else starts[seed]) for by_seed in losses]
        for seed in seeds
    }
    means = {rate: statistics.fmean(bounded[seed][i] for seed in seeds) for i, rate in enumerate(grid)}
    sensitivity = compute_lr_sensitivity(means, None)
    if not math.isfinite(sensitivity):
        return
    best = min(range(len(grid)), key=lambda i: means[grid[i]])
    arm.sensitivity = sensitivity
    arm.sensitivities = {seed: statistics.fmean(bounded[seed]) - bounded[seed][best] for seed in seeds}


def _find_targets(best_warmup: Arm | None) -> dict[int, float]:
    if best_warmup is None:
        return {}
    runs = [run for run in best_warmup.best.runs if run.is_counted and run.state != DIVERGED]
    return {run.seed: run.final_loss for run in runs}


def _add_steps_to_target(rate: ArmAtRate, targets: Mapping[int, float]) -> None:
    steps, charged, seconds = [], [], []
    for run in rate.runs:
        if run.seed not in targets or not run.is_counted:
            continue
        rate.num_with_target += 1
        reached = compute_cost_to_loss(run, targets[run.seed])
        if reached is None:
            continue
        steps.append(reached[0])
        charged += [reached[1]] if reached[1] is not None else []
        seconds += [reached[2]] if reached[2] is not None else []
    rate.steps_to = compute_estimate(steps)
    # A mean over some of those that reached it would belong to other runs than the steps.
    rate.steps_to_charged = compute_estimate(charged) if len(charged) == len(steps) else None
    rate.seconds_to = compute_estimate(seconds) if len(seconds) == len(steps) else None


def compute_cost_to_loss(run: RunResult, target: float) -> tuple[float, float | None, float | None] | None:
    """Compute what a run spent until its validation loss came down to `target`; None if it did not.

    Returns optimizer steps, the same with the statistics pass's samples as further steps, and seconds of training with the
    pass and without evaluations. Seconds are interpolated as the steps are; None: not recorded.
    """
    steps = compute_steps_to_loss(run.eval_steps, run.eval_losses, target)
    if steps is None:
        return None
    charged = None if run.v0_extra_steps is None else steps + run.v0_extra_steps
    return steps, charged, _interpolate(run.eval_steps, run.eval_seconds, steps)


def _interpolate(xs: Sequence[float], ys: Sequence[float | None], x: float) -> float | None:
    for i, right in enumerate(xs):
        if right < x:
            continue
        if right == x or i == 0:
            return ys[i]
        low, high = ys[i - 1], ys[i]
        if low is None or high is None:
            return None
        return low + (x - xs[i - 1]) / (right - xs[i - 1]) * (high - low)
    return None
