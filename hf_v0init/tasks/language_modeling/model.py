"""The causal language model of a run, with its tokenizer: pretrained, or from scratch by type or configuration."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import InputError
from ..script_stages import HubArguments, flag, load_config, require_buildable, require_sole_model_source
from ..tokenizer_training import train_bpe_tokenizer, train_on_main_process, train_word_tokenizer
from .awd_lstm import AwdLstmConfig

logger = logging.getLogger("hf_v0init")

MODEL_TYPES = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AwdLstmConfig.model_type]
LONGEST_DEFAULT_BLOCK = 1024
DEFAULT_SEGMENT = 70  # tokens through which AWD-LSTM's paper back-propagates


@dataclass
class ModelArguments(HubArguments):
    """Which model, and which tokenizer.

    Raises:
        InputError: no source of the model or two, an unknown type, overrides of a pretrained configuration.
    """

    model_name_or_path: str | None = flag(
        None, "Pretrained model, by Hub name or folder. Without it a model is trained from scratch."
    )
    model_type: str | None = flag(
        None,
        "From scratch: a transformers model type, such as gpt2, with its default configuration; or awd_lstm, an LSTM that reads "
        "contiguous streams and keeps its state from batch to batch.",
    )
    config_name: str | None = flag(None, "From scratch: a configuration, by Hub name, folder or JSON file.")
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
        require_sole_model_source(self)
        if not (self.model_name_or_path or self.model_type or self.config_name):
            raise InputError(
                "no model: give --model_name_or_path (pretrained), or --model_type or --config_name (from scratch)"
            )
        if self.model_name_or_path and self.config_overrides:
            raise InputError(
                f"--config_overrides={self.config_overrides}: is for training from scratch; drop it, or "
                f"--model_name_or_path={self.model_name_or_path}"
            )
        if self.model_type is not None and self.model_type not in MODEL_TYPES:
            (closest,) = difflib.get_close_matches(self.model_type, MODEL_TYPES, n=1, cutoff=0)
            raise InputError(f"--model_type={self.model_type}: is no causal language model; for example {closest}")

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration of the model, before the tokenizer is known.

        Raises:
            InputError: it cannot be loaded, not be changed so, or no model can be built of it.
        """
        config = load_config(self.model_type, self.model_name_or_path or self.config_name, self.config_overrides, self)
        if self.model_name_or_path is None:
            source = f"--model_type={self.model_type}" if self.model_type else f"--config_name={self.config_name}"
            changes = f"--config_overrides={self.config_overrides}" if self.config_overrides else source
            require_buildable(config, AutoModelForCausalLM, changes)
        return config


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

    def train() -> PreTrainedTokenizerBase:
        if model.tokenizer_kind == "word":
            return train_word_tokenizer(texts, model.vocab_size)
        return train_bpe_tokenizer(texts, model.vocab_size, for_translation=False)

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
            network = AutoModelForCausalLM.from_pretrained(
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
        network = AutoModelForCausalLM.from_config(config, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"the model cannot be made: {error}") from error
    logger.info(f"from scratch: {type(network).__name__}, {network.num_parameters():,} parameters")
    return network


def choose_block_size(requested: int | None, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Choose the tokens of a block: as asked, else as many as model and tokenizer take, at most 1,024; of an AWD-LSTM 70.

    Raises:
        InputError: more than they take.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if isinstance(limit, int) and limit > 0]
    if requested is None:
        return min([DEFAULT_SEGMENT if isinstance(config, AwdLstmConfig) else LONGEST_DEFAULT_BLOCK, *limits])
    if limits and requested > min(limits):
        raise InputError(
            f"--block_size={requested}: model and tokenizer take {min(limits)} tokens; lower it, or raise the number of "
            "positions with --config_overrides"
        )
    return requested
