"""Weights of a checkpoint, all of them: by the model's own `from_pretrained`, and refused where one is missing. And their mean over
several checkpoints of one run, as translation papers evaluate it.

transformers saves many families under other names than their modules have (ViT, BEIT, DINOv2, Swin, ESM, GPT-NeoX, Mixtral,
Qwen-MoE, OLMoE, ...), and its Trainer loads the file by these names with `strict=False`: what it does not find stays as it was
drawn, and the run goes on with another model (huggingface/transformers#43701).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_v0init import InputError

from ..records.checkpoints import find_defect, list_checkpoints

logger = logging.getLogger("hf_v0init")

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def read_whole_weights(model: PreTrainedModel, folder: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights that `save_pretrained` wrote into `folder`, under the names of the model's `state_dict`.

    No random state changes, and `model` is not touched.

    Returns:
        CPU tensors for every name of the model's `state_dict`, in the model's dtype; tied weights under each of their names.

    Raises:
        InputError: a weight is missing, has another shape or belongs to no module of the model, or the file is damaged.
    """
    try:
        with torch.random.fork_rng():
            loaded, info = type(model).from_pretrained(
                folder, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
            )
    except Exception as error:  # of many kinds, from the readers of each format
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: its weights cannot be loaded ({reason}); give another checkpoint") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise InputError(
                f"{folder}: is no checkpoint of this {type(model).__name__} ({kind}: {names}); give one that is"
            )
    return loaded.state_dict()


def load_whole_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load `read_whole_weights` into the model, in place.

    Raises:
        InputError: as `read_whole_weights`.
    """
    model.load_state_dict(read_whole_weights(model, folder))
    model.tie_weights()


class WholeWeightsMixin(Trainer):
    """Put before a Trainer: what it resumes from and its best model are loaded whole, or refused by name.

    Adapters (PEFT), quantized models, FSDP and DeepSpeed keep the Trainer's own ways, which do not go by these files.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self._load_whole(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_whole(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_whole(self, model, folder: str) -> bool:
        """Load the weights whole where the Trainer would load them by their names; return whether it was done."""
        is_plain = isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None
        has_file = any(Path(folder, name).is_file() for name in WEIGHT_FILES)
        is_ours = is_plain and has_file and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if is_ours:
            load_whole_weights(model, folder)
        return is_ours


# ---- the mean of several checkpoints -----------------------------------------------------------------------------------


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
