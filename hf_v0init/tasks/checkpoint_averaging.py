"""The mean of the weights of several checkpoints of one run, as translation papers evaluate it."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_v0init import InputError

from ..records.checkpoints import find_defect, list_checkpoints
from .whole_weights import read_whole_weights


def average_checkpoints(model: PreTrainedModel, folders: Sequence) -> dict[str, torch.Tensor]:
    """Average the weights of checkpoints.

    Args:
        model: the one they are of; it is not touched.
        folders: written by a Trainer, oldest first.

    Returns:
        For each name of the model's `state_dict` the mean of the checkpoints' tensors, summed in float64, on the CPU in the
        model's dtype. Integer and boolean tensors (counters) are the last checkpoint's.

    Raises:
        InputError: no folder given, or one that is not whole or of another model.
    """
    if not folders:
        raise InputError("average_checkpoints: no checkpoint given; give at least one folder")
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
    """Find the folders of the last `num_checkpoints` whole checkpoints in `output_dir`, oldest first.

    Raises:
        InputError: there are fewer.
    """
    folders = [Path(folder) for folder in list_checkpoints(output_dir) if find_defect(folder) is None]
    if len(folders) < num_checkpoints:
        raise InputError(
            f"average_checkpoints={num_checkpoints}: {output_dir} has only {len(folders)} whole checkpoints; "
            "average fewer or save more often"
        )
    return folders[:num_checkpoints][::-1]


def load_average_of_last(trainer, num_checkpoints: int) -> list[Path]:
    """Put the mean of the last `num_checkpoints` whole checkpoints of the run into the Trainer's model; return their folders.

    Raises:
        InputError: there are fewer, or one of them is of another model.
    """
    trainer.accelerator.wait_for_everyone()
    folders = find_last_checkpoints(trainer.args.output_dir, num_checkpoints)
    network = trainer.accelerator.unwrap_model(trainer.model)
    network.load_state_dict(average_checkpoints(network, folders))
    network.tie_weights()
    return folders


def require_enough_checkpoints(training_args, num_checkpoints: int, num_steps: int | None = None) -> None:
    """Refuse save settings that cannot leave `num_checkpoints` checkpoints, before any training.

    Args:
        num_steps: optimizer steps of the run, where known.

    Raises:
        InputError: naming the setting to change.
    """
    remedy, num_saves = None, None
    limit, strategy = training_args.save_total_limit, training_args.save_strategy.value
    if strategy == "epoch":
        num_saves = math.ceil(training_args.num_train_epochs) if training_args.max_steps <= 0 else None
    elif strategy == "steps" and num_steps is not None:
        interval = training_args.save_steps
        num_saves = math.ceil(num_steps / (interval if interval >= 1 else math.ceil(num_steps * interval)))
    if training_args.load_best_model_at_end:
        remedy = "excludes load_best_model_at_end; choose one of the two"
    elif strategy not in ("epoch", "steps"):
        remedy = f"save_strategy is '{strategy}'; set it to 'steps' or 'epoch'"
    elif limit is not None and 0 < limit < num_checkpoints:
        remedy = f"save_total_limit={limit} deletes all but {limit}; raise or drop it"
    elif num_saves is not None and num_saves < num_checkpoints:
        remedy = f"this run will save only {num_saves}; lower save_steps or train longer"
    if remedy:
        raise InputError(f"average_checkpoints={num_checkpoints}: {remedy}")
