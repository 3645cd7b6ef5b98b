"""Where a warmup starts and how far a schedule falls, as fairseq's `--warmup-init-lr` and `--min-lr` have it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.optim.lr_scheduler import LambdaLR

from ..errors import InputError


@dataclass
class LearningRateBoundsArguments:
    """The flags.

    Raises:
        InputError: a learning rate that is negative or not finite.
    """

    warmup_init_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate at which the warmup of --warmup_steps begins, such as fairseq's 1e-7. Default: 0."
        },
    )
    min_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate below which the schedule does not fall after the warmup, such as 1e-9. Default: none."
        },
    )

    def __post_init__(self) -> None:
        """Check the values, then let the next class of the inheritance order check its own."""
        for name in ("warmup_init_lr", "min_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"--{name}={value}: must be a finite number, 0 or more, such as 1e-7")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def require_fits(self, training) -> None:
        """Refuse bounds above the learning rate, and a start of a warmup that there is not.

        Raises:
            InputError: naming both flags.
        """
        for name in ("warmup_init_lr", "min_lr"):
            value = getattr(self, name)
            if value is not None and value > training.learning_rate:
                raise InputError(f"--{name}={value}: is above --learning_rate={training.learning_rate}; lower it")
        if self.warmup_init_lr is not None and not training.get_warmup_steps(1000):
            raise InputError(f"--warmup_init_lr={self.warmup_init_lr}: there is no warmup; give --warmup_steps too")
        if self.warmup_init_lr is not None and getattr(training, "untuned_warmup", None):
            raise InputError(f"--warmup_init_lr={self.warmup_init_lr} and --untuned_warmup: give one of them")


class LearningRateBoundsMixin:
    """Put before a Trainer: `learning_rate_bounds`, the flags above, bound its schedule.

    Raises:
        InputError: before any training, with a schedule whose course is not fixed.
    """

    def __init__(self, *args, learning_rate_bounds: LearningRateBoundsArguments | None = None, **kwargs) -> None:
        self._learning_rate_bounds = learning_rate_bounds or LearningRateBoundsArguments()
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        """Create the schedule as the Trainer does, within the bounds."""
        exists = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        bounds = self._learning_rate_bounds
        if not exists and (bounds.warmup_init_lr is not None or bounds.min_lr is not None):
            bound_schedule(scheduler, bounds, self.args.get_warmup_steps(num_training_steps))
        return scheduler


def bound_schedule(scheduler, bounds: LearningRateBoundsArguments, num_warmup_steps: int) -> None:
    """Bound the schedule of a scheduler that has made no step, in place.

    In the warmup the rate goes in a straight line from `warmup_init_lr` to the schedule's first full rate; after it, it is
    at least `min_lr`.

    Raises:
        InputError: the scheduler is no `LambdaLR` (all of transformers' schedules are but those that watch the loss).
    """
    if not isinstance(scheduler, LambdaLR):
        raise InputError(
            f"--warmup_init_lr and --min_lr cannot bound the schedule {type(scheduler).__name__}; use one of a fixed course, such "
            "as --lr_scheduler_type inverse_sqrt"
        )

    def bound(schedule: Callable[[int], float], base: float) -> Callable[[int], float]:
        start = None if bounds.warmup_init_lr is None or not base else bounds.warmup_init_lr / base
        least = 0.0 if bounds.min_lr is None or not base else bounds.min_lr / base

        def compute(steps_made: int) -> float:
            factor = schedule(steps_made)
            if steps_made >= num_warmup_steps:
                return max(factor, least)
            return factor if start is None else start + (1.0 - start) * factor

        return compute

    scheduler.lr_lambdas = [bound(s, base) for s, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)]
    rates = [base * factor(0) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
