"""The trust radius of a run that is not to be made: everything is prepared as for training, and left at the first optimizer step."""

from transformers import TrainerCallback

from ..errors import InputError
from ..estimation.trust_radius import TrustRadius
from ..hook import call_before_first_update, find_largest_rate, measure_radius
from .first_loss import LossRecorder


class _Probed(Exception):
    """Leaves `Trainer.train` before the first update, with what was measured."""


class _Probe(TrainerCallback):
    """Measures in the first optimizer step."""

    def __init__(self, trainer) -> None:
        self.trainer, self.recorder, self.hooks = trainer, LossRecorder(trainer), None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Wait for the first gradients."""

        def measure() -> None:
            radius = measure_radius(optimizer, self.trainer.model, self.recorder.compute_again)
            raise _Probed(radius, find_largest_rate(optimizer))

        self.hooks = call_before_first_update(optimizer, measure)


def measure_run(trainer) -> tuple[TrustRadius, float]:
    """Prepare a Trainer's run, measure d50 in its first optimizer step and leave it before any update.

    Returns:
        What was measured, and the largest learning rate of the optimizer's groups.

    Raises:
        InputError: no step had a gradient.
    """
    probe = _Probe(trainer)
    trainer.add_callback(probe)
    try:
        trainer.train()
    except _Probed as probed:
        return probed.args
    finally:
        trainer.remove_callback(probe)
        probe.recorder.remove()
        if probe.hooks is not None:
            probe.hooks.remove()
    raise InputError("the trust radius cannot be measured: no step of the run had a gradient")
