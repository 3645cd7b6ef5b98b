"""What a schedule of transformers lacks: steps of the learning rate, a start of the warmup above 0, and a lower bound.

`lr_decay_epochs` are the steps of the paper's recipes; `warmup_init_lr` and `min_lr` are fairseq's flags of these names.
"""

from __future__ import annotations

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_v0init import InputError


class ScheduleMixin(Trainer):
    """Put before a Trainer: `schedule_arguments` (a `RunArguments`) shapes its schedule.

    Raises:
        InputError: before any training, for a schedule that watches the loss, or decay epochs of data of unknown length.
    """

    _steps_per_epoch: int | None = None

    def __init__(self, *args, schedule_arguments=None, **kwargs) -> None:
        self._schedule_arguments = schedule_arguments
        super().__init__(*args, **kwargs)

    def set_initial_training_values(self, args, dataloader, *others):
        """Count the steps of an epoch as the Trainer does."""
        values = super().set_initial_training_values(args, dataloader, *others)
        self._steps_per_epoch = values[1]
        return values

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        """Create the schedule as the Trainer does, and shape it."""
        exists = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if not exists and self._schedule_arguments is not None:
            num_warmup_steps = self.args.get_warmup_steps(num_training_steps)
            shape_schedule(scheduler, self._schedule_arguments, num_warmup_steps, self._steps_per_epoch)
        return scheduler


def shape_schedule(scheduler, wanted, num_warmup_steps: int, steps_per_epoch: int | None) -> None:
    """Shape the schedule of a scheduler that has made no step, in place.

    In the warmup the rate goes in a straight line from `warmup_init_lr` to the schedule's first full rate. After it, it is
    multiplied by `lr_decay_factor` from the end of each of `lr_decay_epochs` on, and is at least `min_lr`.

    Raises:
        InputError: the scheduler is no `LambdaLR` (all of transformers' schedules are but those that watch the loss).
    """
    start, least, epochs = wanted.warmup_init_lr, wanted.min_lr or 0.0, wanted.lr_decay_epochs or []
    if start is None and not least and not epochs:
        return
    if not isinstance(scheduler, LambdaLR):
        raise InputError(
            f"--warmup_init_lr, --min_lr and --lr_decay_epochs cannot shape the schedule {type(scheduler).__name__}; use one of "
            "a fixed course, such as --lr_scheduler_type inverse_sqrt"
        )
    decay_steps, decay = [epoch * (steps_per_epoch or 0) for epoch in epochs], wanted.lr_decay_factor or DECAY_FACTOR

    def shape(schedule, base: float):
        def compute(steps_made: int) -> float:
            factor = schedule(steps_made) * decay ** sum(steps_made >= step for step in decay_steps)
            if steps_made >= num_warmup_steps:
                return max(factor, least / base if base else 0.0)
            if start is None or not base:
                return factor
            return start / base + (1.0 - start / base) * factor

        return compute

    scheduler.lr_lambdas = [shape(s, base) for s, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)]
    made = scheduler.last_epoch
    rates = [base * factor(made) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


DECAY_FACTOR = 0.1


def require_possible_schedule(wanted, training, is_stream: bool) -> None:
    """Refuse bounds above the learning rate, a start of a warmup that there is not, and decay epochs that cannot be.

    Raises:
        InputError: naming the flags.
    """
    rate, epochs = training.learning_rate, wanted.lr_decay_epochs or []
    if any(not isinstance(epoch, int) or epoch < 1 for epoch in epochs) or epochs != sorted(set(epochs)):
        raise InputError(
            f"--lr_decay_epochs {' '.join(map(str, epochs))}: must be whole numbers >= 1 in increasing order, such as 100 145"
        )
    if epochs and is_stream:
        raise InputError("--lr_decay_epochs: the length of an epoch of streamed data is unknown; leave it out")
    if wanted.lr_decay_factor is not None and not epochs:
        raise InputError(
            f"--lr_decay_factor={wanted.lr_decay_factor}: has no effect without --lr_decay_epochs; drop it"
        )
    for name in ("warmup_init_lr", "min_lr"):
        value = getattr(wanted, name)
        if value is not None and value > rate:
            raise InputError(f"--{name}={value}: is above --learning_rate={rate}; lower it")
    if wanted.warmup_init_lr is None:
        return
    if getattr(training, "untuned_warmup", None):
        raise InputError(f"--warmup_init_lr={wanted.warmup_init_lr} and --untuned_warmup: give one of them")
    if not training.warmup_steps:
        raise InputError(
            f"--warmup_init_lr={wanted.warmup_init_lr}: has no effect without --warmup_steps; add it, or drop this"
        )
