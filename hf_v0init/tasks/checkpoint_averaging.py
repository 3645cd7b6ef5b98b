"""The mean of the weights of several checkpoints of one run, as translation papers evaluate it."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import InputError
from ..records.checkpoints import find_defect

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def average_checkpoints(checkpoint_dirs) -> dict[str, torch.Tensor]:
    """Averages the weights of checkpoints in safetensors format, in one file each or sharded.

    Args:
        checkpoint_dirs: folders written by a Trainer, oldest first.

    Returns:
        For each name the mean of the checkpoints' tensors, summed in float64, on the CPU in the last
        checkpoint's dtype. Integer and boolean tensors (counters) are the last checkpoint's.

    Raises:
        InputError: no folder given, one without safetensors weights, or different names or shapes.
    """
    checkpoint_dirs = [Path(folder) for folder in checkpoint_dirs]
    if not checkpoint_dirs:
        raise InputError("average_checkpoints: no checkpoint given; give at least one folder")
    files = [_find_weight_files(folder) for folder in checkpoint_dirs]
    for folder, by_name in zip(checkpoint_dirs, files, strict=True):
        different = sorted(by_name.keys() ^ files[-1].keys())
        if different:
            raise InputError(
                f"{folder}: has other weights than {checkpoint_dirs[-1]} ({different[0]}); "
                "average checkpoints of one run"
            )
    return {name: _average_tensor(name, checkpoint_dirs, files) for name in files[-1]}


def find_last_checkpoints(output_dir, num_checkpoints: int) -> list[Path]:
    """Returns the folders of the last `num_checkpoints` whole checkpoints in `output_dir`, oldest first.

    Raises:
        InputError: there are fewer.
    """
    folders = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and folder.is_dir() and find_defect(folder) is None:
            folders[int(step)] = folder
    if len(folders) < num_checkpoints:
        raise InputError(
            f"average_checkpoints={num_checkpoints}: {output_dir} has only {len(folders)} whole checkpoints; "
            "average fewer or save more often"
        )
    return [folders[step] for step in sorted(folders)[-num_checkpoints:]]


def load_average_of_last(trainer, num_checkpoints: int) -> list[Path]:
    """Put the mean of the last `num_checkpoints` whole checkpoints of the run into the Trainer's model; return their folders.

    Raises:
        InputError: there are fewer, or they hold weights that the model lacks.
    """
    trainer.accelerator.wait_for_everyone()
    folders = find_last_checkpoints(trainer.args.output_dir, num_checkpoints)
    network = trainer.accelerator.unwrap_model(trainer.model)
    unexpected = network.load_state_dict(average_checkpoints(folders), strict=False).unexpected_keys
    if unexpected:
        raise InputError(f"{folders[-1]}: has weights that the model lacks ({unexpected[0]})")
    network.tie_weights()
    return folders


def require_enough_checkpoints(training_args, num_checkpoints: int, num_steps: int | None = None) -> None:
    """Refuses save settings that cannot leave `num_checkpoints` checkpoints, before any training.

    Args:
        training_args: transformers TrainingArguments.
        num_checkpoints: how many will be averaged.
        num_steps: optimizer steps of the run, where known.

    Raises:
        InputError: naming the setting to change.
    """
    remedy = None
    limit, strategy = training_args.save_total_limit, training_args.save_strategy.value
    num_saves = None
    if strategy == "epoch":
        num_saves = math.ceil(training_args.num_train_epochs) if training_args.max_steps <= 0 else None
    elif strategy == "steps" and num_steps is not None:
        interval = training_args.save_steps
        num_saves = math.ceil(num_steps / (interval if interval >= 1 else math.ceil(num_steps * interval)))
    if num_checkpoints < 1:
        remedy = "must be 1 or more; leave it out for no averaging"
    elif training_args.load_best_model_at_end:
        remedy = "excludes load_best_model_at_end; choose one of the two"
    elif strategy not in ("epoch", "steps"):
        remedy = f"save_strategy is '{strategy}'; set it to 'steps' or 'epoch'"
    elif limit is not None and 0 < limit < num_checkpoints:
        remedy = f"save_total_limit={limit} deletes all but {limit}; raise or drop it"
    elif num_saves is not None and num_saves < num_checkpoints:
        remedy = f"this run will save only {num_saves}; lower save_steps or train longer"
    if remedy:
        raise InputError(f"average_checkpoints={num_checkpoints}: {remedy}")


def _find_weight_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint, by the tensor's name."""
    if (folder / _INDEX).is_file():
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{folder}: has no {_WEIGHTS}; averaging needs checkpoints with whole safetensors weights")
    with safe_open(folder / _WEIGHTS, framework="pt") as weights:
        return dict.fromkeys(weights.keys(), folder / _WEIGHTS)


def _average_tensor(name: str, folders: list[Path], files: list[dict[str, Path]]) -> torch.Tensor:
    total = None
    for folder, by_name in zip(folders, files, strict=True):
        with safe_open(by_name[name], framework="pt") as weights:
            tensor = weights.get_tensor(name)
        if not tensor.is_floating_point():
            total = tensor
            continue
        if total is None:
            total = torch.zeros(tensor.shape, dtype=torch.float64)
        elif total.shape != tensor.shape:
            raise InputError(f"{folder}: {name} has shape {tuple(tensor.shape)}, elsewhere {tuple(total.shape)}")
        total += tensor
    return total if not tensor.is_floating_point() else (total / len(folders)).to(tensor.dtype)
