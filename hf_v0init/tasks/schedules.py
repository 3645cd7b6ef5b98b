"""Steps of the learning rate, as the paper's recipes have them, on top of any schedule of transformers."""

from __future__ import annotations

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_v0init import InputError

DECAY_FACTOR = 0.1


class ScheduleMixin(Trainer):
    """Put before a Trainer: with `lr_decay_epochs` of `schedule_arguments` (a `RunArguments`) its learning rate falls in steps.

    Raises:
        InputError: before any training, for a schedule that watches the loss.
    """

    _steps_per_epoch = 0

    def __init__(self, *args, schedule_arguments=None, **kwargs) -> None:
        self._schedule_arguments = schedule_arguments
        super().__init__(*args, **kwargs)

    def set_initial_training_values(self, args, dataloader, *others):
        """Count the steps of an epoch as the Trainer does."""
        values = super().set_initial_training_values(args, dataloader, *others)
        self._steps_per_epoch = values[1] or 0
        return values

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        """Create the schedule as the Trainer does, with the steps."""
        exists = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        wanted = self._schedule_arguments
        if not exists and wanted is not None and wanted.lr_decay_epochs:
            steps = [epoch * self._steps_per_epoch for epoch in wanted.lr_decay_epochs]
            add_decay_steps(scheduler, steps, wanted.lr_decay_factor or DECAY_FACTOR)
        return scheduler


def add_decay_steps(scheduler, decay_steps: list[int], factor: float) -> None:
    """Multiply the learning rates of a scheduler by `factor` from each of `decay_steps` on, in place.

    Raises:
        InputError: the scheduler is no `LambdaLR` (all of transformers' schedules are but those that watch the loss).
    """
    if not isinstance(scheduler, LambdaLR):
        raise InputError(f"--lr_decay_epochs: not with {type(scheduler).__name__}; give --lr_scheduler_type constant")

    def decay(schedule):
        return lambda step: schedule(step) * factor ** sum(step >= decay_step for decay_step in decay_steps)

    scheduler.lr_lambdas = [decay(schedule) for schedule in scheduler.lr_lambdas]


def require_possible_schedule(wanted, is_stream: bool) -> None:
    """Refuse decay epochs of data of unknown length or out of order, and a factor without them."""
    epochs = wanted.lr_decay_epochs or []
    if epochs != sorted({epoch for epoch in epochs if epoch >= 1}):
        raise InputError(f"--lr_decay_epochs {epochs}: must be whole numbers >= 1 in increasing order, such as 100 145")
    if epochs and is_stream:
        raise InputError("--lr_decay_epochs: the length of an epoch of streamed data is unknown; leave it out")
    if wanted.lr_decay_factor is not None and not epochs:
        raise InputError(
            f"--lr_decay_factor={wanted.lr_decay_factor}: has no effect without --lr_decay_epochs; drop it"
        )
