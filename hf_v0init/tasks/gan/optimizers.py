"""The optimizer and the schedule of one of a GAN's networks, by the Trainer's flags."""

import copy
import tempfile

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_v0init import InputError, V0InitArguments, V0InitTrainer

from ...trainer.schedule import find_what_warms_up, keep_plateau, require_no_warmup


def make_optimizer(network: nn.Module, training, max_steps: int, decay_steps: int | None = None):
    """Make the optimizer and the schedule of one network: those of a Trainer with these flags, and nothing decays but matrices.

    Args:
        decay_steps: for how long the schedule stays at its peak, since v0 stands for a warmup of that length; None: as it is.

    Raises:
        InputError: a warmup that the schedule has not, one beside a v0 that stands for it, or an optimizer that the loop here cannot use.
    """
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    if training.get_warmup_steps(max_steps) and schedule == "constant":
        raise InputError(
            f"warmup_steps={training.warmup_steps} with lr_scheduler_type=constant does nothing; use constant_with_warmup"
        )
    options = copy.copy(training)
    for setting, field in V0InitArguments.__dataclass_fields__.items():
        if setting not in ("v0_optimizer", "untuned_warmup"):  # which choose optimizer and schedule
            setattr(options, setting, field.default)
    options.report_to = []
    options.eval_strategy, options.save_strategy, options.eval_on_start = IntervalStrategy.NO, SaveStrategy.NO, False
    options.output_dir = tempfile.gettempdir()  # a Trainer makes its folder; this one writes nothing
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    trainer = V0InitTrainer(model=network, args=options)
    chosen = trainer.optimizer_cls_and_kwargs or Trainer.get_optimizer_cls_and_kwargs(options, network)
    trainer.optimizer = chosen[0](groups, **chosen[1])
    if callable(getattr(trainer.optimizer, "train", None)):
        raise InputError(
            f"optimizer {type(trainer.optimizer).__name__} keeps two sets of weights, for training and evaluation, which this loop "
            "does not switch; use another, such as adamw_torch"
        )
    trainer.state.max_steps = max_steps
    scheduler = trainer.create_scheduler(max_steps, trainer.optimizer)
    what = find_what_warms_up(training, training.resolve(max_steps))
    if what is not None and training.untuned_warmup is None:  # which the Trainer has looked at
        require_no_warmup(what, trainer, scheduler)
    if decay_steps is not None:
        keep_plateau(trainer, scheduler, decay_steps)
    return trainer.optimizer, scheduler
