"""The language model of a run, with its tokenizer: pretrained, or from scratch by type or configuration."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ...errors import InputError
from ..script_stages import HubArguments, flag, load_config, require_buildable, require_sole_model_source
from ..tokenizer_training import train_bpe_tokenizer, train_on_main_process, train_word_tokenizer
from .awd_lstm import AwdLstmConfig

logger = logging.getLogger("hf_v0init")

CAUSAL_MODEL_TYPES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AwdLstmConfig.model_type)
ENCODER_DECODERS = {"bart", "mbart", "mvp"}  # which guess a whole text, not the masked tokens of it
MASKED_MODEL_TYPES = tuple(name for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES if name not in ENCODER_DECODERS)
DEFAULT_SEGMENT = 70  # tokens through which AWD-LSTM's paper back-propagates


@dataclass
class ModelArguments(HubArguments):
    """Which causal language model, and which tokenizer.

    Raises:
        InputError: no source of the model or two, an unknown type, overrides of a pretrained configuration.
    """

    auto_class: ClassVar[type] = AutoModelForCausalLM
    model_types: ClassVar[tuple[str, ...]] = CAUSAL_MODEL_TYPES
    kind: ClassVar[str] = "causal language model"
    other_script: ClassVar[str] = "run_mlm"
    longest_default_block: ClassVar[int] = 1024

    model_name_or_path: str | None = flag(
        None, "Pretrained model, by Hub name or folder. Without it a model is trained from scratch."
    )
    model_type: str | None = flag(
        None,
        "From scratch: a transformers model type, such as gpt2, with its default configuration; or awd_lstm, an LSTM that reads "
        "contiguous streams and keeps its state from batch to batch.",
    )
    config_name: str | None = flag(
        None,
        "From scratch: a configuration, by Hub name, folder or JSON file. With --model_name_or_path: what differs from the "
        "model's own without changing its weights, such as dropout.",
    )
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example n_embd=256,n_layer=4."
    )
    tokenizer_name: str | None = flag(None, "Tokenizer, by Hub name or folder. Default: the model's.")
    tokenizer_kind: str = flag(
        "bpe",
        "From scratch without a tokenizer, one is trained on the training text and saved: 'bpe' (byte-level BPE), or "
        "'word' (words between white space and a </s> after every line or row, as PTB perplexities count).",
        choices=["bpe", "word"],
    )
    vocab_size: int = flag(10000, "Entries of that tokenizer at most, its 4 special tokens included.")
    dtype: str | None = flag(
        None,
        "Type of the weights; 'auto' takes the checkpoint's. Default: float32.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = flag(None, "Attention: eager, sdpa, flash_attention_2, ... Default: by itself.")

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        require_sole_model_source(self, config_may_join=True)
        if not (self.model_name_or_path or self.model_type or self.config_name):
            raise InputError(
                "no model: give --model_name_or_path (pretrained), or --model_type or --config_name (from scratch)"
            )
        if self.model_name_or_path and self.config_overrides:
            raise InputError(
                f"--config_overrides={self.config_overrides}: is for training from scratch; drop it, or "
                f"--model_name_or_path={self.model_name_or_path}"
            )
        if self.model_type is not None:
            self._require_type(self.model_type, f"--model_type={self.model_type}:")

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration of the model, before the tokenizer is known.

        Raises:
            InputError: it cannot be loaded, not be changed so, or no model can be built of it.
        """
        name = self.config_name or self.model_name_or_path
        config = load_config(self.model_type, name, self.config_overrides, self)
        if self.model_type is None and config.model_type in CONFIG_MAPPING:  # not code of the user's own
            self._require_type(config.model_type, f"{name}: {config.model_type}")
        if self.model_name_or_path is None:
            source = f"--model_type={self.model_type}" if self.model_type else f"--config_name={self.config_name}"
            changes = f"--config_overrides={self.config_overrides}" if self.config_overrides else source
            require_buildable(config, self.auto_class, changes)
        if self.model_name_or_path and self.config_name:
            self._require_same_weights(config, load_config(None, self.model_name_or_path, None, self))
        return config

    def _require_same_weights(self, config: PreTrainedConfig, own: PreTrainedConfig) -> None:
        """Refuse a configuration under which the pretrained weights would be left out, or others be drawn at random."""
        flags = f"--config_name={self.config_name}: does not fit --model_name_or_path={self.model_name_or_path}"
        remedy = "only what has no weights, such as dropout, may differ; drop one of the two"
        if config.model_type != own.model_type:
            raise InputError(f"{flags}: it is of {config.model_type}, the model of {own.model_type}; {remedy}")
        shapes, own_shapes = (self._list_shapes(each) for each in (config, own))
        different = sorted(name for name in shapes.keys() | own_shapes if shapes.get(name) != own_shapes.get(name))
        if different:
            name = different[0]
            one, other = (str(each.get(name, "absent")) for each in (shapes, own_shapes))
            raise InputError(f"{flags}: {name} is {one} by it and {other} in the model; {remedy}")

    def _list_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        try:
            with torch.device("meta"):  # nothing is allocated
                network = self.auto_class.from_config(copy.deepcopy(config), trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise InputError(f"the model cannot be made: {error}") from error
        return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    def _require_type(self, model_type: str, what: str) -> None:
        if model_type not in self.model_types:
            (closest,) = difflib.get_close_matches(model_type, self.model_types, n=1, cutoff=0)
            raise InputError(f"{what} is no {self.kind}; give one, for example {closest}, or use {self.other_script}")


@dataclass
class MaskedModelArguments(ModelArguments):
    """Which masked language model, and which tokenizer.

    Raises:
        InputError: as `ModelArguments`.
    """

    auto_class: ClassVar[type] = AutoModelForMaskedLM
    model_types: ClassVar[tuple[str, ...]] = MASKED_MODEL_TYPES
    kind: ClassVar[str] = "masked language model"
    other_script: ClassVar[str] = "run_clm"
    longest_default_block: ClassVar[int] = 512

    model_type: str | None = flag(
        None, "From scratch: a transformers model type, such as bert, with its default configuration."
    )
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example hidden_size=256,num_hidden_layers=4."
    )
    tokenizer_kind: str = flag(
        "bpe",
        "From scratch without a tokenizer, one is trained on the training text and saved: 'bpe' (byte-level BPE), or "
        "'word' (words between white space).",
        choices=["bpe", "word"],
    )
    vocab_size: int = flag(10000, "Entries of that tokenizer at most, its 5 special tokens included.")


def load_tokenizer(model: ModelArguments, texts: Iterable[str], checkpoint: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer named, or that of the checkpoint resumed, or train one on `texts`, which is read only then.

    Raises:
        InputError: it cannot be loaded, or not be trained on these texts.
    """
    name = model.tokenizer_name or model.model_name_or_path
    if name is None and checkpoint is not None and (Path(checkpoint) / "tokenizer_config.json").is_file():
        name = checkpoint
    if name is not None:
        try:
            return AutoTokenizer.from_pretrained(name, **model.get_hub_options())
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"the tokenizer of {name!r} cannot be loaded ({error}); check the name") from error

    for_masking = isinstance(model, MaskedModelArguments)

    def train() -> PreTrainedTokenizerBase:
        if model.tokenizer_kind == "word":
            return train_word_tokenizer(texts, model.vocab_size, for_masking=for_masking)
        return train_bpe_tokenizer(texts, model.vocab_size, for_translation=False, for_masking=for_masking)

    tokenizer = train_on_main_process(train)
    logger.info(f"tokenizer trained on the training text: {model.tokenizer_kind}, {len(tokenizer)} entries")
    return tokenizer


def load_model(model: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the pretrained model named, or build one from scratch that fits the tokenizer.

    Raises:
        InputError: it cannot be made, or its vocabulary is smaller than the tokenizer's.
    """
    options = {"trust_remote_code": model.trust_remote_code, "dtype": model.dtype or "float32"}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    try:
        if model.model_name_or_path is not None:
            network = model.auto_class.from_pretrained(
                model.model_name_or_path, config=config, **model.get_hub_options() | options
            )
            if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
                network.resize_token_embeddings(len(tokenizer))
            return network
        if "vocab_size=" not in (model.config_overrides or ""):
            config.vocab_size = len(tokenizer)
        elif config.vocab_size < len(tokenizer):
            raise InputError(
                f"--config_overrides: vocab_size={config.vocab_size} is less than the tokenizer's {len(tokenizer)}"
            )
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, special, getattr(tokenizer, special))
        if options["dtype"] == "auto":
            options["dtype"] = "float32"
        network = model.auto_class.from_config(config, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"the model cannot be made: {error}") from error
    logger.info(f"from scratch: {type(network).__name__}, {network.num_parameters():,} parameters")
    return network


def choose_block_size(
    requested: int | None, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest_default: int
) -> int:
    """Choose the tokens of a block: as asked, else as many as model and tokenizer take, at most `longest_default`; of an AWD-LSTM 70.

    Raises:
        InputError: more than they take.
    """
    limits = [limit for limit in (count_positions(network), tokenizer.model_max_length) if limit and limit > 0]
    if requested is None:
        return min([DEFAULT_SEGMENT if isinstance(network.config, AwdLstmConfig) else longest_default, *limits])
    if limits and requested > min(limits):
        raise InputError(
            f"--block_size={requested}: model and tokenizer take {min(limits)} tokens; lower it, or raise the number of "
            "positions with --config_overrides"
        )
    return requested


def count_positions(network: PreTrainedModel) -> int | None:
    """Count the tokens that a model has positions for; None: any number.

    RoBERTa and its like number positions from behind their padding's, so some of their table is never used.
    """
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return min(positions, module.num_embeddings - module.padding_idx - 1)
    return positions
