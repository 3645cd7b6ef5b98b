"""The trust radius through a Trainer's own loader, loss and precision: what `gradients.trust_radius` asks for, from a run.

Call it where the run is prepared and no step has been made, as in `on_train_begin`, with the loader that the Trainer will read.
"""

from collections.abc import Iterable

import torch

from ..errors import InputError
from ..estimation.trust_radius import TrustRadius, measure_trust_radius
from .gradients import FP16_LOSS_SCALE, preserve_trainer

DEFAULT_NUM_STEPS = 2  # optimizer steps whose batches are looked at


def measure_run(trainer, train_dataloader: Iterable, num_steps: int = DEFAULT_NUM_STEPS) -> TrustRadius:
    """Measure d50 on the batches of the first optimizer steps, as the run will see them.

    The loader is read from its beginning, with the random states that the run will read it with. These, the model and what a
    `compute_loss` counts on the Trainer are as before afterwards. All processes call it together.

    Args:
        trainer: prepared for training; its `model` is the one measured.
        train_dataloader: as `on_train_begin` gets it.
        num_steps: optimizer steps whose batches are taken; of a smaller training set as many as it has.

    Raises:
        InputError: a training set without a batch; DeepSpeed, whose engine keeps the gradients.
    """
    if trainer.is_deepspeed_enabled:
        raise InputError(
            "the trust radius cannot be measured under DeepSpeed, whose engine keeps the gradients; measure it once without "
            "--deepspeed"
        )
    with preserve_trainer(trainer):
        steps = _take_steps(trainer, train_dataloader, num_steps)
        batches = [(inputs, num_items) for micro_batches, num_items in steps for inputs in micro_batches]

        def compute_loss(model, batch) -> torch.Tensor:
            inputs, num_items = batch
            if "begins_stream" in inputs:
                inputs = {
                    **inputs,
                    "begins_stream": True,
                }  # each batch by itself, from the state that the run begins with
            with preserve_trainer(trainer), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=num_items)
            loss = loss.mean() if loss.dim() > 0 else loss
            return loss if _is_share_of_step(trainer, num_items) else loss / trainer.args.gradient_accumulation_steps

        return measure_trust_radius(
            trainer.model,
            batches,
            compute_loss,
            accumulation=len(steps[0][0]),
            loss_scale=FP16_LOSS_SCALE if trainer.args.fp16 else 1.0,
        )


def _take_steps(trainer, train_dataloader: Iterable, num_steps: int) -> list[tuple[list, object]]:
    """Take the batches of the first `num_steps` optimizer steps, or of as many as are whole; of a first one that is not, what it has."""
    iterator, accumulation = iter(train_dataloader), trainer.args.gradient_accumulation_steps
    steps = []
    try:
        while len(steps) < num_steps:
            micro_batches, num_items = trainer.get_batch_samples(iterator, accumulation, trainer.args.device)
            if not micro_batches or (steps and len(micro_batches) < accumulation):
                break
            steps.append((micro_batches, num_items))
    finally:
        iterator.close() if hasattr(iterator, "close") else None
        if hasattr(train_dataloader, "end"):
            train_dataloader.end()  # accelerate: this look is not an iteration of the run
    if not steps:
        raise InputError(
            "the training set has no batch, and how long to hold back is measured on the first; give it samples"
        )
    return steps


def _is_share_of_step(trainer, num_items) -> bool:
    """Whether `compute_loss` divides by the whole step's items already, so that micro-batches' losses add up."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers 5.0 has no such attribute
    if scaled is not None:
        return scaled
    return (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None
