"""The trust radius through a Trainer's own loader, loss and precision: what `gradients.trust_radius` asks for, from a run.

Call it where the run is prepared and no step has been made, as in `on_train_begin`, with the loader that the Trainer will read.
"""

from collections.abc import Iterable

import torch

from ..errors import InputError
from ..gradients.trust_radius import TrustRadius, measure_trust_radius
from .gradients import FP16_LOSS_SCALE, preserve_trainer

DEFAULT_NUM_STEPS = 2  # optimizer steps whose batches are looked at: two give the pairs (A, B) and (B, A)


def measure_run(trainer, train_dataloader: Iterable, num_steps: int = DEFAULT_NUM_STEPS) -> TrustRadius:
    """Measure d50 on the batches of the first optimizer steps, as the run will see them.

    The loader is read from its beginning, with the random states that the run will read it with. These, the model and what a
    `compute_loss` counts on the Trainer are as before afterwards. All processes call it together.

    Args:
        trainer: prepared for training; its `model` is the one measured.
        train_dataloader: as `on_train_begin` gets it.
        num_steps: optimizer steps whose batches are taken, an even number; of a smaller training set as many as it has.

    Raises:
        InputError: fewer batches than two optimizer steps take; DeepSpeed, whose engine keeps the gradients.
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
            accumulation=trainer.args.gradient_accumulation_steps,
            loss_scale=FP16_LOSS_SCALE if trainer.args.fp16 else 1.0,
        )


def _take_steps(trainer, train_dataloader: Iterable, num_steps: int) -> list[tuple[list, object]]:
    """Take the batches of the first `num_steps` optimizer steps, or of the most that are whole and even in number."""
    iterator, accumulation = iter(train_dataloader), trainer.args.gradient_accumulation_steps
    steps = []
    try:
        while len(steps) < num_steps:
            micro_batches, num_items = trainer.get_batch_samples(iterator, accumulation, trainer.args.device)
            if len(micro_batches) < accumulation:
                break
            steps.append((micro_batches, num_items))
    finally:
        iterator.close() if hasattr(iterator, "close") else None
        if hasattr(train_dataloader, "end"):
            train_dataloader.end()  # accelerate: this look is not an iteration of the run
    if len(steps) < 2:
        raise InputError(
            f"the training set has batches for {len(steps)} optimizer steps, and the trust radius takes those of two; lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    return steps[: len(steps) // 2 * 2]


def _is_share_of_step(trainer, num_items) -> bool:
    """Whether `compute_loss` divides by the whole step's items already, so that micro-batches' losses add up."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None
