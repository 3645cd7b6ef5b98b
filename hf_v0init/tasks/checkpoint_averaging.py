"""The mean of the weights of several checkpoints of one run, as translation papers evaluate it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

from hf_v0init import InputError

from ..records.checkpoints import find_defect, list_checkpoints
from .whole_weights import read_whole_weights

logger = logging.getLogger("hf_v0init")


def average_checkpoints(model: PreTrainedModel, folders: Sequence) -> dict[str, torch.Tensor]:
    """Average the weights of checkpoints.

    Args:
        model: the one they are of; it is not touched.
        folders: written by a Trainer, oldest first.

    Returns:
        For each name of the model's `state_dict` the mean of the checkpoints' tensors, summed in float64, on the CPU in the
        model's dtype. Integer and boolean tensors (counters) are the last checkpoint's.

    Raises:
        InputError: one of them is not whole or of another model.
    """
    sums: dict[str, torch.Tensor] = {}
    for folder in folders:
        weights = read_whole_weights(model, folder)
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0.0) + tensor.double()
    return {
        name: (sums[name] / len(folders)).to(last.dtype) if name in sums else last for name, last in weights.items()
    }


def find_last_checkpoints(output_dir, num_checkpoints: int) -> list[Path]:
    """Find the folders of the last `num_checkpoints` valid checkpoints in `output_dir`, oldest first; of fewer, all.

    Raises:
        InputError: there is none.
    """
    folders = [Path(folder) for folder in list_checkpoints(output_dir) if find_defect(folder) is None]
    if not folders:
        raise InputError(f"--average_checkpoints={num_checkpoints}: {output_dir} has no valid checkpoint")
    return folders[:num_checkpoints][::-1]


def load_average_of_last(trainer, num_checkpoints: int) -> None:
    """Put the mean of the last `num_checkpoints` valid checkpoints of the run into the Trainer's model, and log which they are.

    Raises:
        InputError: there is none, or one of them is of another model.
    """
    trainer.accelerator.wait_for_everyone()
    folders = find_last_checkpoints(trainer.args.output_dir, num_checkpoints)
    network = trainer.accelerator.unwrap_model(trainer.model)
    network.load_state_dict(average_checkpoints(network, folders))
    network.tie_weights()
    logger.info(f"the model is now the average of {', '.join(folder.name for folder in folders)}")


def require_enough_checkpoints(training: TrainingArguments, num_checkpoints: int) -> None:
    """Refuse save settings that cannot leave `num_checkpoints` checkpoints, before any training."""
    saves, limit = training.save_strategy in ("epoch", "steps"), training.save_total_limit or num_checkpoints
    if not saves or limit < num_checkpoints or training.load_best_model_at_end:
        raise InputError(
            f"--average_checkpoints={num_checkpoints}: needs --save_strategy steps or epoch, a --save_total_limit of "
            f"{num_checkpoints} or more, and no --load_best_model_at_end"
        )
