"""Optimizer and schedule of one network out of several, from `TrainingArguments`: what the Trainer builds for its only one."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, get_scheduler

from ...errors import InputError
from ...second_moment.choice import compute_optimizer_arguments, load_optimizer_class, require_sole_choice
from ...second_moment.state import SecondMoments
from ...trainer.schedule import add_untuned_warmup


def build_optimizer(network: nn.Module, training) -> torch.optim.Optimizer:
    """Build the optimizer that `v0_optimizer` or `optim` names, with weight decay on tensors of two or more dimensions.

    Raises:
        InputError: there is no such optimizer, it cannot be built, or it needs a loop of its own (schedule-free ones).
    """
    spec = training.v0_optimizer
    if spec is not None:
        require_sole_choice(spec, training, was_passed=False)
        optimizer_class = load_optimizer_class(spec)
        arguments = compute_optimizer_arguments(optimizer_class, training)
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    chosen = spec or getattr(training.optim, "value", training.optim)
    try:
        if spec is None:
            optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(training, network)
        optimizer = optimizer_class(groups, **arguments)
    except (TypeError, ValueError, AssertionError, ImportError, NotImplementedError) as error:
        raise InputError(f"optimizer {chosen} cannot be built: {error}") from error
    if callable(getattr(optimizer, "train", None)):
        raise InputError(
            f"optimizer {chosen} keeps two sets of weights, for training and evaluation, which this loop does not switch; use "
            "another, such as adamw_torch"
        )
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, training, max_steps: int) -> LRScheduler:
    """Build the learning-rate schedule over `max_steps` steps, with a warmup if one is asked for.

    Raises:
        InputError: a schedule that cannot be built or that does no warmup where one is asked for, or two warmups.
    """
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    num_warmup_steps = training.get_warmup_steps(max_steps)
    if num_warmup_steps and name == "constant":
        raise InputError(
            f"warmup_steps={training.warmup_steps} with lr_scheduler_type={name}, which does no warmup; use constant_with_warmup"
        )
    if name in ("reduce_lr_on_plateau", "greedy"):
        raise InputError(f"lr_scheduler_type={name} follows a validation loss, which a GAN has none of; use another")
    try:
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=max_steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs or {},
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"lr_scheduler_type={name} cannot be built: {error}") from error
    if training.untuned_warmup is not None:
        _add_untuned_warmup(schedule, training, num_warmup_steps)
    return schedule


def _add_untuned_warmup(schedule: LRScheduler, training, num_warmup_steps: int) -> None:
    shape = training.untuned_warmup
    if num_warmup_steps:
        raise InputError(f"untuned_warmup={shape} and warmup_steps={training.warmup_steps} are two warmups: give one")
    beta2 = SecondMoments(schedule.optimizer).read_beta2()
    if beta2 is None:
        name = type(schedule.optimizer).__name__
        raise InputError(f"untuned_warmup={shape} takes its length from beta2, and {name} has none; use warmup_steps")
    add_untuned_warmup(schedule, beta2, shape)
