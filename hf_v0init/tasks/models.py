"""The model of a run and its tokenizer: pretrained, or from scratch by type or configuration, changed by `key=value,...`."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_v0init import InputError

from .script_support import flag
from .tokenizer_training import train_on_main_process

logger = logging.getLogger("hf_v0init")


@dataclass
class ModelArguments:
    """model: which model

    Raises:
        InputError: no source of the model.
    """

    auto_class: ClassVar[type]
    left_out: ClassVar[frozenset[str]] = frozenset()  # model types of the auto class that are not for this task
    kind: ClassVar[str]  # in words, for errors
    needs_source: ClassVar[bool] = True

    cache_dir: str | None = flag(None, "Folder for what comes from the Hub and for prepared data.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = flag(False, "Run code that the Hub repositories contain.")
    model_name_or_path: str | None = flag(
        None, "Pretrained model, by Hub name or folder. Without it a model is trained from scratch."
    )
    model_type: str | None = flag(None, "From scratch: a transformers model type with its default configuration.")
    config_name: str | None = flag(None, "From scratch: a configuration, by Hub name, folder or JSON file.")
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example hidden_size=256,num_hidden_layers=4."
    )

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        if self.needs_source and not (self.model_name_or_path or self.config_name or self.model_type):
            raise InputError(
                "no model: give --model_name_or_path (pretrained), or --model_type or --config_name (from scratch)"
            )

    def get_hub_options(self) -> dict:
        """Return the arguments that every `from_pretrained` takes."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "trust_remote_code": self.trust_remote_code,
        }

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration of the model, before tokenizer and data are known.

        Raises:
            InputError: it cannot be loaded, not be changed so, or is of a model for another task.
        """
        name = self.config_name or self.model_name_or_path
        if self.model_type is not None and self.model_type not in CONFIG_MAPPING:
            close = difflib.get_close_matches(self.model_type, list(CONFIG_MAPPING.keys()), n=1)
            meant = f"; did you mean {close[0]}?" if close else "; give another"
            raise InputError(f"--model_type={self.model_type}: transformers has no model of this type{meant}")
        try:
            if self.model_type is not None:
                config = CONFIG_MAPPING[self.model_type]()
            else:
                config = AutoConfig.from_pretrained(name, **self.get_hub_options())
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"the configuration of {self.model_type or name} cannot be loaded: {error}") from error
        fits = type(config) in self.auto_class._model_mapping and config.model_type not in self.left_out
        if config.model_type in CONFIG_MAPPING and not fits:  # others may be code of the user's own
            raise InputError(f"{name or '--model_type'}: {config.model_type} is no {self.kind}")
        if self.config_overrides:
            override_config(config, self.config_overrides)
        return config

    def build(self, config: PreTrainedConfig, **options) -> PreTrainedModel:
        """Load the pretrained model, or build one from scratch of `config`.

        Args:
            options: for `from_pretrained`.

        Raises:
            InputError: it cannot be made.
        """
        try:
            if self.model_name_or_path is not None:
                name = self.model_name_or_path
                return self.auto_class.from_pretrained(name, config=config, **self.get_hub_options() | options)
            config.name_or_path = ""  # it is a new model
            options.pop("ignore_mismatched_sizes", None)
            if options.get("dtype") == "auto":
                options["dtype"] = "float32"
            network = self.auto_class.from_config(config, trust_remote_code=self.trust_remote_code, **options)
        except Exception as error:  # every model says in its own way what it cannot be
            raise InputError(f"the model cannot be made: {error}") from error
        logger.info(f"from scratch: {type(network).__name__}, {network.num_parameters():,} parameters")
        return network


@dataclass
class TextModelArguments(ModelArguments):
    """model: which model, which tokenizer"""

    tokenizer_name: str | None = flag(None, "Tokenizer, by Hub name or folder. Default: the model's.")
    vocab_size: int = flag(
        10000,
        "From scratch without a tokenizer: entries at most of the one that is trained on the training text and saved.",
    )
    dtype: str | None = flag(
        None,
        "Type of the weights; 'auto' takes the checkpoint's. Default: float32.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = flag(None, "Attention: eager, sdpa, flash_attention_2, ... Default: by itself.")

    def get_tokenizer(
        self, texts: Iterable[str] | None, place: str | None, train: Callable[[Iterable[str]], PreTrainedTokenizerBase]
    ) -> PreTrainedTokenizerBase:
        """Load the tokenizer named, or that of the checkpoint resumed, or train one on `texts`, which is read only then.

        Args:
            texts: the training text; None where nothing is trained, and a pretrained model has its own.
            place: the folder that the run goes on from, if any.
            train: makes a tokenizer of texts.

        Raises:
            InputError: it cannot be loaded, or not be trained on these texts.
        """
        name = self.tokenizer_name or self.model_name_or_path
        if name is None and place is not None and Path(place, "tokenizer_config.json").is_file():
            name = place
        if name is not None:
            try:
                return AutoTokenizer.from_pretrained(name, **self.get_hub_options())
            except (OSError, ValueError, KeyError) as error:
                raise InputError(f"the tokenizer of {name!r} cannot be loaded ({error}); check the name") from error
        tokenizer = train_on_main_process(lambda: train(texts))
        logger.info(f"tokenizer trained on the training text: {len(tokenizer)} entries")
        return tokenizer

    def build_for(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the pretrained model, or build one from scratch, that has an embedding for each of the tokenizer's entries.

        Raises:
            InputError: as `build`; or overrides ask for fewer entries.
        """
        options = {"dtype": self.dtype or "float32"}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.model_name_or_path is not None:
            network = self.build(config, **options)
            if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
                network.resize_token_embeddings(len(tokenizer))
            return network
        if "vocab_size=" not in (self.config_overrides or ""):
            config.vocab_size = len(tokenizer)
        elif config.vocab_size < len(tokenizer):
            raise InputError(
                f"--config_overrides: vocab_size={config.vocab_size} is less than the tokenizer's {len(tokenizer)}"
            )
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, special, getattr(tokenizer, special))
        return self.build(config, **options)


def override_config(config: PreTrainedConfig, overrides: str) -> None:
    """Change a configuration by `key=value,...`, in place.

    Raises:
        InputError: a key that it does not have, or a value of the wrong type.
    """
    try:
        config.update_from_string(overrides.replace(" ", ""))
    except Exception as error:  # of configurations that check themselves, each in its own way
        raise InputError(f"--config_overrides={overrides}: {error}; write key=value,...") from error
