"""From runs to numbers: means over seeds, paired differences, steps to the best warmup's loss, learning-rate sensitivity.

Three rules hold throughout. A run that diverged counts with the loss at start (its seed's), so that an arm does not look better for
losing its bad runs; one that failed for another reason or is not through counts nowhere, and is shown. An arm is judged at the
learning rate of the best mean final validation loss, over the seeds it has there. Differences are taken seed by seed.

"Best" is the lowest, or the highest where the metric is one of which more is better.
"""

from __future__ import annotations

import math
import statistics
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
    greater_is_better: bool = False

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.seeds)

    @property
    def verdict(self) -> str:
        """'better' or 'worse' if the interval leaves out 0, 'unclear' if it does not, 'unknown' without an interval."""
        if self.low is None or self.high is None:
            return "unknown"
        if self.low <= 0.0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0.0) == self.greater_is_better else "worse"

    @property
    def is_ahead(self) -> bool:
        """Whether the mean alone is on the better side of 0."""
        return self.mean > 0.0 if self.greater_is_better else self.mean < 0.0

    @property
    def loss(self) -> float:
        """How much worse the mean is, in the metric's unit; negative for better."""
        return -self.mean if self.greater_is_better else self.mean

    @property
    def largest_loss(self) -> float | None:
        """How much worse it may be: the bad end of the interval, None without one."""
        return None if self.low is None else -self.low if self.greater_is_better else self.high

    @property
    def largest_gain(self) -> float | None:
        """How much better it may be: the good end of the interval, None without one."""
        return None if self.low is None else self.high if self.greater_is_better else -self.low


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

    @property
    def has_diverged(self) -> bool:
        """Whether every run that counts diverged."""
        counted = [run for run in self.runs if run.is_counted]
        return bool(counted) and all(run.state == DIVERGED for run in counted)


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
        """Return the arm of these kinds with the best mean final loss, None if none has a result."""
        return next((arm for arm in self.arms if arm.kind in kinds and arm.best is not None), None)

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.comparison.greater_is_better

    def subtract(self, one: ArmAtRate, other: ArmAtRate) -> Interval | None:
        """Return the paired difference `one` - `other` with its interval; None without a common seed."""
        return compute_paired_interval(one.losses, other.losses, self.greater_is_better)

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
        return Estimate(-math.inf if -math.inf in values else math.inf, None, len(values))
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def compute_t_interval(
    differences: Mapping[int, float], greater_is_better: bool = False, confidence: float = CONFIDENCE
) -> Interval | None:
    """Compute the mean of differences by seed with its Student-t interval; None if there are none or one is not finite.

    mean -+ t((1 + confidence) / 2; n - 1) * s / sqrt(n), with s the standard deviation (n - 1).
    """
    values = list(differences.values())
    if not values or not all(map(math.isfinite, values)):
        return None
    mean, seeds = statistics.fmean(values), tuple(sorted(differences))
    if len(values) < 2:
        return Interval(mean, None, None, seeds, greater_is_better)
    half = compute_half_width(statistics.stdev(values), len(values), confidence)
    return Interval(mean, mean - half, mean + half, seeds, greater_is_better)


def compute_half_width(std: float, n: int, confidence: float = CONFIDENCE) -> float:
    """Compute half the width of the Student-t interval of a mean of n >= 2 values with this standard deviation."""
    from scipy.special import stdtrit  # far lighter than scipy.stats

    return float(stdtrit(n - 1, (1.0 + confidence) / 2.0)) * std / math.sqrt(n)


def compute_paired_interval(
    one: Mapping[int, float], other: Mapping[int, float], greater_is_better: bool = False
) -> Interval | None:
    """Compute `one` - `other` over the seeds that both have, with its interval; None without a common seed."""
    shared = sorted(one.keys() & other.keys())
    return compute_t_interval({seed: one[seed] - other[seed] for seed in shared}, greater_is_better)


def compute_share_interval(
    plain: Mapping[int, float], one: Mapping[int, float], other: Mapping[int, float]
) -> Interval | None:
    """Compute which share of the gain of `other` over `plain` the gain of `one` is, with Fieller's interval of the ratio of means.

    The interval holds the ratios r for which the t-interval of (plain - one) - r (plain - other) holds 0. None for fewer than two seeds
    shared by all three, and where the gain of `other` is not beyond noise, so that the interval has no ends.
    """
    from scipy.special import stdtrit

    seeds = tuple(sorted(plain.keys() & one.keys() & other.keys()))
    x, y = [plain[s] - one[s] for s in seeds], [plain[s] - other[s] for s in seeds]
    if len(seeds) < 2 or not all(map(math.isfinite, x + y)):
        return None
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    q = float(stdtrit(len(seeds) - 1, (1.0 + CONFIDENCE) / 2.0)) ** 2 / len(seeds)
    # a r^2 - 2 b r + c <= 0
    a = mean_y**2 - q * statistics.variance(y)
    b = mean_x * mean_y - q * statistics.covariance(x, y)
    c = mean_x**2 - q * statistics.variance(x)
    if a <= 0.0:
        return None
    half = math.sqrt(max(0.0, b * b - a * c))
    return Interval(mean_x / mean_y, (b - half) / a, (b + half) / a, seeds)


def compute_steps_to_loss(
    steps: Sequence[float], losses: Sequence[float], target: float, greater_is_better: bool = False
) -> float | None:
    """Compute when the loss first reaches `target`: linear between evaluations; None if it does not.

    If the first evaluation is there already, or the one before was no finite number, that evaluation's step counts.
    """
    if greater_is_better:
        losses, target = [-loss for loss in losses], -target
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

    `losses` by learning rate; in their unit, lower is better. Without `start_loss` nothing is bounded.
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
        arm.best = choose_learning_rate(arm.rates.values(), comparison.greater_is_better)
        _add_sensitivity(arm, comparison)
    sign = -1.0 if comparison.greater_is_better else 1.0
    arms.sort(key=lambda arm: (arm.best is None, sign * arm.best.final.mean if arm.best else 0.0))
    best_warmup = next((arm for arm in arms if arm.kind == WARMUP and arm.best is not None), None)
    _mark_other_optimizers(arms)
    plains = [arm for arm in arms if arm.kind == PLAIN]
    plain = next((arm for arm in plains if arm.best is not None), None)
    targets = _find_targets(best_warmup)
    summary = Summary(comparison, arms, best_warmup, plain, targets)
    for arm in arms:
        for rate in arm.rates.values():
            _add_steps_to_target(rate, targets)
        if arm.best is None:
            continue
        if best_warmup is not None and arm is not best_warmup:
            arm.to_warmup = summary.subtract(arm.best, best_warmup.best)
        own = find_plain(arms, arm)
        if own is not None and own is not arm and own.best is not None:
            arm.to_plain = summary.subtract(arm.best, own.best)
    return summary


def choose_learning_rate(rates: Iterable[ArmAtRate], greater_is_better: bool = False) -> ArmAtRate | None:
    """Choose the learning rate of the best mean final loss, however many seeds it has; of equal ones that with the most."""
    sign = -1.0 if greater_is_better else 1.0
    with_result = [rate for rate in rates if rate.final is not None]
    return min(with_result, key=lambda rate: (sign * rate.final.mean, -rate.final.n), default=None)


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


def _mark_other_optimizers(arms: list[Arm]) -> None:
    """Tell plain starts from rivals: optimizers that no arm with a v0 or a warmup has, where others have them."""
    tried = {arm.optimizer for arm in arms if arm.kind != PLAIN}
    for arm in arms:
        if tried and arm.kind == PLAIN and arm.optimizer not in tried:
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
    sign = -1.0 if comparison.greater_is_better else 1.0
    starts = {run.seed: math.inf if run.start_loss is None else sign * run.start_loss for run in arm.runs}
    # By seed, then by rate; lower is better.
    bounded = {seed: [min(sign * by_seed[seed], starts[seed]) for by_seed in losses] for seed in seeds}
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
        if run.seed not in targets or not run.is_counted or not knows_cost_to(run, targets[run.seed]):
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
    """Compute what a run spent until its validation loss reached `target`; None if it did not.

    Returns optimizer steps, the same with the statistics pass's samples as further steps, and seconds of training with the
    pass and without evaluations. Seconds are interpolated as the steps are; None: not recorded.
    """
    if not run.has_curve and knows_cost_to(run, target):
        names = ("steps_to_target", "steps_to_target_charged", "seconds_to_target")
        recorded = tuple(run.recorded.get(name) for name in names)
        return None if recorded[0] is None else recorded
    steps = compute_steps_to_loss(run.eval_steps, run.eval_losses, target, run.greater_is_better)
    if steps is None:
        return None
    charged = None if run.v0_extra_steps is None else steps + run.v0_extra_steps
    return steps, charged, _interpolate(run.eval_steps, run.eval_seconds, steps)


def knows_cost_to(run: RunResult, target: float) -> bool:
    """Whether it can be told when the run reached `target`: by its curve, or because a copy has recorded it for this target."""
    return run.has_curve or run.recorded.get("target_loss") == target


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
