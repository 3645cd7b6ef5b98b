"""The learning-rate schedule beside a v0: its plateau without its ramp, or a warmup of measured length. Knows Trainers from outside.

A v0 takes the ramp's place, so the rest of the schedule must be what it is beside a warmup of that length:

    lambda'(t) = lambda_L(t) from L on, before it lambda_L's peak        lambda_L: what the Trainer makes with `warmup_steps=L`

The peak is lambda_L(L); of `cosine_warmup_with_min_lr`, whose cosine has begun there, lambda_L(L - 1).

Of transformers' schedules those without a warmup (`constant`, `reduce_lr_on_plateau`, `greedy`) stay as they are, and so do schedules that
were passed in.
"""

import contextlib
import logging
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..errors import InputError
from ..method.length import compute_untuned_factor
from ..second_moment.state import SecondMoment, unwrap_optimizer
from ..settings import V0InitArguments, V0Plan

logger = logging.getLogger("hf_v0init")

NUM_POINTS_LOOKED_AT = 200  # of a schedule, to find whether it rises


def find_what_warms_up(settings: V0InitArguments, plan: V0Plan) -> str | None:
    """Name the flag that asks for a plateau or a warmup, beside which there may be no other warmup; None if none does."""
    if settings.untuned_warmup is not None:
        return f"untuned_warmup={settings.untuned_warmup}"
    if plan.decay == "linear":
        return f"v0_init={plan.init} (v0_decay=linear)"
    return None if plan.decay_steps is None else f"v0_decay_steps={plan.decay_steps}"


def find_warmup(scheduler: LRScheduler | None, max_steps: int) -> str | None:
    """Name the warmup that a schedule at its first step begins with; None if it begins at its peak.

    Args:
        scheduler: any; of a `LambdaLR` the course is read, of others the present rate beside the base or the largest one.
        max_steps: optimizer steps of the run.
    """
    if scheduler is None:
        return None
    name = type(scheduler).__name__
    if isinstance(scheduler, LambdaLR):
        spacing = max(1, max_steps // NUM_POINTS_LOOKED_AT)
        points = sorted({*range(0, min(max_steps, 10)), *range(0, max_steps, spacing)})
        rises = any(max(f(t) for t in points) > f(0) * (1 + 1e-9) for f in scheduler.lr_lambdas if points)
        return f"a {name} that rises at first" if rises else None
    for group, base in zip(scheduler.optimizer.param_groups, getattr(scheduler, "base_lrs", []), strict=False):
        if float(group["lr"]) < max(float(base), float(group.get("max_lr", base))) * (1 - 1e-9):
            return f"a {name}, which begins below its peak"
    return None


def require_no_warmup(what: str, trainer, scheduler: LRScheduler | None = None) -> None:
    """Raise `InputError` if `what` (a flag) is asked for beside a warmup of the user's own.

    Args:
        scheduler: the one that trains, where it exists already.
    """
    steps = trainer.args.get_warmup_steps(1000)
    if steps:
        raise InputError(
            f"{what} and warmup_steps={trainer.args.warmup_steps} are two warmups: drop warmup_steps, or move its "
            "length to v0_decay_steps; v0_decay=beta2 with a v0_scale leaves the schedule alone"
        )
    found = find_warmup(scheduler, trainer.state.max_steps) if scheduler is not None else None
    if found:
        raise InputError(
            f"{what} beside the schedule's own warmup ({found}) are two warmups: give a schedule without one, or use "
            "v0_decay=beta2 with a v0_scale, which leaves the schedule alone"
        )


def keep_plateau(trainer, scheduler: LRScheduler, num_steps: int) -> None:
    """Let a Trainer's schedule stay at its peak for `num_steps`, as it stands after a warmup of that length, in place."""
    longer = _make_with_warmup(trainer, scheduler, num_steps)
    name = trainer.args.lr_scheduler_type
    if longer is None:
        logger.info(
            f"the schedule ({getattr(name, 'value', name)}) has no warmup that v0 could stand for: it stays as it is"
        )
        return

    def flatten(factor: Callable[[int], float]) -> Callable[[int], float]:
        peak = max(factor(num_steps - 1), factor(num_steps))
        return lambda steps_made: peak if steps_made < num_steps else factor(steps_made)

    _put(scheduler, [flatten(factor) for factor in longer.lr_lambdas])
    if scheduler.last_epoch < num_steps:  # a run that is resumed later is past it
        logger.info(
            f"the learning rate stays at its peak for the {num_steps:,} steps of v0, then follows the schedule as after a warmup of that length"
        )


def warm_up(trainer, scheduler: LRScheduler, num_steps: int, what: str) -> None:
    """Let a Trainer's schedule be that of `--warmup_steps num_steps`, in place; `what` asks for it.

    An optimizer that does its warmup itself (schedule-free) is told its length, as the Trainer does with that flag. A schedule that has
    no warmup of its own (`constant`) is multiplied by min(1, steps made / num_steps).

    Raises:
        InputError: the scheduler is no `LambdaLR` (all of transformers' schedules are but those that watch the loss).
    """
    groups = scheduler.optimizer.param_groups
    if all("warmup_steps" in group for group in groups):
        for group in groups:
            group["warmup_steps"] = num_steps
        return
    _require_fixed_course(scheduler, what)
    longer = _make_with_warmup(trainer, scheduler, num_steps)
    if longer is None:
        multiply_schedule(scheduler, lambda steps_made: min(1.0, steps_made / num_steps), what)
    else:
        _put(scheduler, longer.lr_lambdas)


def add_untuned_warmup(scheduler: LRScheduler, optimizer, shape: str) -> None:
    """Multiply a schedule by an untuned warmup of the optimizer's beta2 (Ma & Yarats, 2021), in place.

    Raises:
        InputError: the optimizer has no beta2; and as `multiply_schedule`.
    """
    beta2, inner = None, unwrap_optimizer(optimizer)
    with contextlib.suppress(InputError):
        beta2 = SecondMoment(inner).read_beta2()
    if beta2 is None:
        raise InputError(
            f"untuned_warmup={shape} takes its length from beta2, and {type(inner).__name__} has none; use --warmup_steps"
        )
    multiply_schedule(scheduler, lambda made: compute_untuned_factor(made + 1, beta2, shape), f"untuned_warmup={shape}")


def multiply_schedule(scheduler: LRScheduler, get_factor: Callable[[int], float], what: str) -> None:
    """Multiply the schedule of a scheduler by `get_factor(steps made)`, in place; `what` asks for it.

    Raises:
        InputError: the scheduler is no `LambdaLR` (all of transformers' schedules are but those that watch the loss).
    """
    _require_fixed_course(scheduler, what)

    def join(schedule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda steps_made: schedule(steps_made) * get_factor(steps_made)

    _put(scheduler, [join(schedule) for schedule in scheduler.lr_lambdas])


def _make_with_warmup(trainer, scheduler: LRScheduler, num_steps: int) -> LambdaLR | None:
    """Make the schedule that the Trainer would have made with `--warmup_steps num_steps`; None if it has no such one.

    The Trainer keeps its own. The other optimizer has the real one's rates and defaults: a floor is a share of these.
    """
    if not isinstance(scheduler, LambdaLR):
        return None
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in scheduler.base_lrs]
    defaults = unwrap_optimizer(scheduler.optimizer).defaults  # ZeRO's own has none
    stand_in = torch.optim.SGD(groups, lr=defaults.get("lr", trainer.args.learning_rate))
    given = trainer.args.warmup_steps, trainer.lr_scheduler
    try:
        trainer.args.warmup_steps, trainer.lr_scheduler = num_steps, None
        longer = trainer.create_scheduler(num_training_steps=trainer.state.max_steps, optimizer=stand_in)
    finally:
        trainer.args.warmup_steps, trainer.lr_scheduler = given
    if not isinstance(longer, LambdaLR):
        return None
    has_warmup = any(new(0) != old(0) for new, old in zip(longer.lr_lambdas, scheduler.lr_lambdas, strict=True))
    return longer if has_warmup else None


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
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates
