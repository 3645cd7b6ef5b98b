"""The loss of a transformers model over batches, as a function of the model alone."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..errors import InputError

NO_TARGET = -100


def make_batch_loss(batches: Iterable[dict]) -> Callable[[nn.Module], float]:
    """Make a function that measures the mean loss of a model over the batches, each target counted once and the same.

    Args:
        batches: dicts of tensors with "labels", as a data collator makes them. They are kept, so that every call sees the
            same ones; they are moved to the model's device one at a time.

    Returns:
        A function of the model that returns the mean of `model(**batch).loss` weighted by the targets of each batch (labels
        that are not -100; for causal models, which shift them, without the first of each row), in the unit of the loss.

    Raises:
        InputError: no batches, or one without labels.
    """
    batches = [dict(batch) for batch in batches]
    if not batches:
        raise InputError("there is no batch to measure a loss on; give more data")
    for batch in batches:
        if not isinstance(batch.get("labels"), torch.Tensor):
            raise InputError(f"a batch has the entries {sorted(batch)}: 'labels' is needed for a loss")

    def measure(model: nn.Module) -> float:
        device = next(model.parameters()).device
        shifted = _shifts_labels(model)
        total, count = 0.0, 0
        for batch in batches:
            targets = batch["labels"]
            if shifted and targets.dim() > 1:
                targets = targets[:, 1:]
            num_targets = int((targets != NO_TARGET).sum()) if not targets.is_floating_point() else len(targets)
            if num_targets == 0:
                continue
            on_device = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
            }
            with torch.no_grad():
                total += float(model(**on_device).loss.float().mean()) * num_targets
            count += num_targets
        if count == 0:
            raise InputError(f"all labels of the batches are {NO_TARGET}, so there is no loss; give data with targets")
        return total / count

    return measure


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model predicts label i + 1 from position i: a causal language model, by its class's name."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name
