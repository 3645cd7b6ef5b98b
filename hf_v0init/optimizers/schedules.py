"""Multiplies a learning-rate schedule of transformers by a factor, such as that of an untuned warmup."""

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..closed_form.untuned_warmup import compute_untuned_factor
from ..errors import InputError


def add_untuned_warmup(scheduler: LRScheduler, beta2: float, shape: str) -> None:
    """Multiply the schedule of a scheduler that has made no step by an untuned warmup, in place.

    Raises:
        InputError: as `multiply_schedule`.
    """
    multiply_schedule(
        scheduler, lambda steps_made: compute_untuned_factor(steps_made + 1, beta2, shape), f"untuned_warmup={shape}"
    )


def multiply_schedule(scheduler: LRScheduler, get_factor: Callable[[int], float], what: str) -> None:
    """Multiply the schedule of a scheduler by `get_factor(steps made)`, in place, before it is first asked; `what` asks for it.

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
    made = scheduler.last_epoch  # 0, or what a checkpoint had made
    rates = [base * factor(made) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
