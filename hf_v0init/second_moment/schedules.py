"""Multiplies a learning-rate schedule of transformers by a factor, such as that of an untuned warmup."""

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..errors import InputError
from ..method.untuned_warmup import compute_untuned_factor


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
    _require_fixed_course(scheduler, what)

    def join(schedule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda steps_made: schedule(steps_made) * get_factor(steps_made)

    _put(scheduler, [join(schedule) for schedule in scheduler.lr_lambdas])


def lengthen_warmup(
    scheduler: LRScheduler, make_with_warmup: Callable[[], LRScheduler], num_steps: int, what: str
) -> None:
    """Give a schedule without a warmup that of `make_with_warmup()`, the same one made with a warmup of `num_steps`, in place.

    A schedule that has no warmup of its own ("constant") is multiplied by min(1, steps made / num_steps).

    Raises:
        InputError: as `multiply_schedule`.
    """
    _require_fixed_course(scheduler, what)
    longer = make_with_warmup()
    _require_fixed_course(longer, what)
    if all(new(0) == old(0) for new, old in zip(longer.lr_lambdas, scheduler.lr_lambdas, strict=True)):
        multiply_schedule(scheduler, lambda steps_made: min(1.0, steps_made / num_steps), what)
    else:
        _put(scheduler, longer.lr_lambdas)


def _require_fixed_course(scheduler: LRScheduler, what: str) -> None:
    if not isinstance(scheduler, LambdaLR):
        raise InputError(
            f"{what} cannot be joined to the schedule {type(scheduler).__name__}; use one of a fixed course, "
            "such as --lr_scheduler_type linear, cosine or constant"
        )


def _put(scheduler: LambdaLR, schedules: list[Callable[[int], float]]) -> None:
    """Let a scheduler follow these schedules from the step that it is at."""
    scheduler.lr_lambdas = schedules
    made = scheduler.last_epoch  # 0, or what a checkpoint had made
    rates = [base * factor(made) for base, factor in zip(scheduler.base_lrs, schedules, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
