"""The warmups that need no tuning, as a baseline for v0: Ma & Yarats, 'On the adequacy of untuned warmup' (AAAI 2021).

Both have their length from beta2 alone. At optimizer step t, counted from 1, they multiply the schedule's learning rate by

    linear         min(1, (1 - beta2) / 2 * t)       over 2 / (1 - beta2) steps
    exponential    1 - exp(-(1 - beta2) * t)

The square root of the exponential one is nearly the closed-form multiplier m(t) = sqrt(1 - beta2^t) of a data-driven v0 of scale 1.
"""

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .errors import InputError

UNTUNED_WARMUPS = ("linear", "exponential")


def compute_untuned_factor(step: int, beta2: float, shape: str) -> float:
    """Compute the factor on the learning rate at optimizer step `step` >= 1 (dimensionless, in (0, 1]).

    Raises:
        InputError: `shape` is neither 'linear' nor 'exponential'.
    """
    if shape not in UNTUNED_WARMUPS:
        raise InputError(f"untuned_warmup={shape!r}: choose one of {', '.join(UNTUNED_WARMUPS)}")
    if shape == "linear":
        return min(1.0, (1.0 - beta2) / 2.0 * step)
    return -math.expm1(-(1.0 - beta2) * step)


def add_untuned_warmup(scheduler: LRScheduler, beta2: float, shape: str) -> None:
    """Multiply the schedule of a scheduler that has made no step by an untuned warmup, in place.

    Raises:
        InputError: as `multiply_schedule`.
    """
    multiply_schedule(
        scheduler, lambda steps_made: compute_untuned_factor(steps_made + 1, beta2, shape), f"untuned_warmup={shape}"
    )


def multiply_schedule(scheduler: LRScheduler, get_factor: Callable[[int], float], what: str) -> None:
    """Multiply the schedule of a scheduler that has made no step by `get_factor(steps made)`, in place; `what` asks for it.

    Raises:
        InputError: the scheduler is no `LambdaLR` (all of transformers' schedules are but those that watch the loss).
    """
    if not isinstance(scheduler, LambdaLR):
        raise InputError(
            f"{what} cannot be joined to the schedule {type(scheduler).__name__}; use one of a fixed course, "
            "such as --lr_scheduler_type linear, cosine or constant"
        )

    def join(schedule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda steps_made: schedule(steps_made) * get_factor(steps_made)

    scheduler.lr_lambdas = [join(schedule) for schedule in scheduler.lr_lambdas]
    rates = [base * factor(0) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
