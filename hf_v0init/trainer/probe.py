"""The trust radius of a run that is not to be made: everything is prepared as for training, and left at the first optimizer step."""

from transformers import TrainerCallback

from ..errors import InputError
from ..estimation.trust_radius import TrustRadius
from ..hook import call_before_first_update, find_largest_rate, measure_trust_radius
from .first_loss import LossRecorder


class _Probed(Exception):
    """Leaves `Trainer.train` before the first update."""


def measure_run(trainer) -> tuple[TrustRadius, float]:
    """Prepare a Trainer's run, measure d50 in its first optimizer step and leave it before any update.

    Returns:
        What was measured, and the largest learning rate of the optimizer's groups.

    Raises:
        InputError: no step had a gradient.
    """
    recorder, handles = LossRecorder(trainer), []

    def measure() -> None:
        radius = measure_trust_radius(trainer.optimizer, trainer.model, recorder.compute_again)
        raise _Probed(radius, find_largest_rate(trainer.optimizer))

    class Probe(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            handles.append(call_before_first_update(trainer.optimizer, measure))

    probe = Probe()
    trainer.add_callback(probe)
    try:
        trainer.train()
    except _Probed as probed:
        return probed.args
    finally:
        for kept in (recorder, *handles):
            kept.remove()
        trainer.remove_callback(probe)
    raise InputError("the trust radius cannot be measured: no step of the run had a gradient")
