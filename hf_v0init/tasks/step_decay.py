"""Step decay: the learning rate of any schedule, times a factor from given epochs on, as the paper's recipes have it."""

from dataclasses import dataclass, field

from ..errors import InputError
from ..trainer.schedule import multiply_schedule


@dataclass
class StepDecayArguments:
    """The flags.

    Raises:
        InputError: epochs that are no increasing whole numbers >= 1; a factor outside (0, 1).
    """

    lr_decay_epochs: list[int] | None = field(
        default=None,
        metadata={
            "help": "Multiply the learning rate by --lr_decay_factor after each of these epochs, counted from 1, for example 100 145; "
            "on top of --lr_scheduler_type, so give 'constant' or 'constant_with_warmup' for steps alone. Default: none."
        },
    )
    lr_decay_factor: float = field(
        default=0.1, metadata={"help": "Factor of --lr_decay_epochs, between 0 and 1. Default: 0.1."}
    )

    def __post_init__(self) -> None:
        """Check the values, then let the next class of the inheritance order check its own."""
        epochs = self.lr_decay_epochs or []
        if any(not isinstance(epoch, int) or epoch < 1 for epoch in epochs) or epochs != sorted(set(epochs)):
            given = " ".join(map(str, epochs))
            raise InputError(
                f"--lr_decay_epochs {given}: must be whole numbers >= 1 in increasing order, such as 100 145"
            )
        if not 0.0 < self.lr_decay_factor < 1.0:
            raise InputError(f"--lr_decay_factor={self.lr_decay_factor}: must lie between 0 and 1, such as 0.1")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()


class StepDecayMixin:
    """Put before a Trainer: `step_decay`, the flags above, multiplies its schedule.

    Raises:
        InputError: before any training, with a schedule that was passed in, one that watches the loss, or data of unknown length.
    """

    _steps_an_epoch: int | None = None

    def __init__(self, *args, step_decay: StepDecayArguments | None = None, **kwargs) -> None:
        self._step_decay = step_decay or StepDecayArguments()
        super().__init__(*args, **kwargs)
        if self._step_decay.lr_decay_epochs and self.lr_scheduler is not None:
            raise InputError("--lr_decay_epochs and a schedule that was passed in: give one")

    def set_initial_training_values(self, args, dataloader, *others):
        """Count the steps of an epoch as the Trainer does."""
        values = super().set_initial_training_values(args, dataloader, *others)
        if self._step_decay.lr_decay_epochs:
            try:
                len(dataloader)
            except TypeError as error:
                raise InputError(
                    "--lr_decay_epochs: the length of an epoch of streamed data is unknown; leave it out"
                ) from error
        self._steps_an_epoch = values[1]
        return values

    def create_scheduler(self, *args, **kwargs):
        """Create the schedule as the Trainer does, times the step decay."""
        exists = self.lr_scheduler is not None
        scheduler = super().create_scheduler(*args, **kwargs)
        if self._step_decay.lr_decay_epochs and not exists:
            steps = [epoch * self._steps_an_epoch for epoch in self._step_decay.lr_decay_epochs]
            factor = self._step_decay.lr_decay_factor
            multiply_schedule(
                scheduler, lambda steps_made: factor ** sum(steps_made >= step for step in steps), "--lr_decay_epochs"
            )
        return scheduler
