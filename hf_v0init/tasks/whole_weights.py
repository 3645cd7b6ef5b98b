"""Weights of a checkpoint, all of them: by the model's own `from_pretrained`, and refused where one is missing.

transformers saves many families under other names than their modules have (ViT, BEIT, DINOv2, Swin, ESM, GPT-NeoX, Mixtral,
Qwen-MoE, OLMoE, ...), and its Trainer loads the file by these names with `strict=False`: what it does not find stays as it was
drawn, and the run goes on with another model (huggingface/transformers#43701).
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from hf_v0init import InputError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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
        network = self.model if model is None else model
        if self._loads_by_names(network, resume_from_checkpoint):
            load_whole_weights(network, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if self._loads_by_names(self.model, folder):
            load_whole_weights(self.model, folder)
        else:
            super()._load_best_model()

    def _loads_by_names(self, model, folder: str) -> bool:
        is_plain = isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None
        has_file = any(Path(folder, name).is_file() for name in WEIGHT_FILES)
        return is_plain and has_file and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
