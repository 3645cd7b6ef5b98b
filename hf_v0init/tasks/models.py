"""The model of a run and its tokenizer: pretrained, or from scratch by type or configuration, changed by `key=value,...`."""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from hf_v0init import InputError

from .script_support import flag
from .tokenizer_training import train_on_main_process
from .value_checks import require_makeable_folder

logger = logging.getLogger("hf_v0init")


@dataclass
class HubArguments:
    """hub: how to speak to the Hub"""

    cache_dir: str | None = flag(None, "Folder for what comes from the Hub and for prepared data.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = flag(None, "Access token for the Hub. Default: that of `hf auth login`.")
    trust_remote_code: bool = flag(False, "Run code that the Hub repositories contain.")

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        require_makeable_folder("cache_dir", self.cache_dir)

    def get_hub_options(self) -> dict:
        """Return the arguments that every `from_pretrained` takes."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class ModelArguments(HubArguments):
    """model: which model

    Raises:
        InputError: no source of the model or two, an unknown type, overrides of a pretrained configuration.
    """

    auto_class: ClassVar[type]
    model_types: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]  # in words, for errors
    other_script: ClassVar[str] = ""  # that takes models which this one refuses
    needs_source: ClassVar[bool] = True

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
        super().__post_init__()
        ways = [name for name in ("model_name_or_path", "config_name", "model_type") if getattr(self, name)]
        if len(ways) > 1:
            raise InputError(f"--{ways[0]} and --{ways[1]}: give one source of the model, not both")
        if not ways and self.needs_source:
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
        for name in ("model_name_or_path", "config_name"):
            self._require_place(name, getattr(self, name))

    def _require_place(self, name: str, value: str | None) -> None:
        """Refuse a path that is not there: transformers would ask the Hub for it."""
        if value is None or (Path(value).exists() and (Path(value).is_dir() or name == "config_name")):
            return
        if (
            Path(value).is_file()
            or value.startswith((".", "/", "~"))
            or value.count("/") > 1
            or value.endswith(".json")
        ):
            what = "is a file; give the folder that holds it" if Path(value).is_file() else "no such file or folder"
            raise InputError(f"--{name}={value}: {what} (relative paths start at {Path.cwd()})")

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration of the model, before tokenizer and data are known.

        Raises:
            InputError: it cannot be loaded, not be changed so, or no model can be built of it.
        """
        name = self.config_name or self.model_name_or_path
        config = self.read_config(name)
        if self.model_type is None and config.model_type in CONFIG_MAPPING:  # not code of the user's own
            self._require_type(config.model_type, f"{name}: {config.model_type}")
        if self.config_overrides:
            override_config(config, self.config_overrides)
        if self.model_name_or_path is None:
            source = f"--model_type={self.model_type}" if self.model_type else f"--config_name={name}"
            changes = f"--config_overrides={self.config_overrides}" if self.config_overrides else source
            require_buildable(config, self.auto_class, changes)
        return config

    def read_config(self, name: str | None) -> PreTrainedConfig:
        """Read the configuration of `model_type`, or of this name."""
        try:
            if self.model_type is not None:
                return CONFIG_MAPPING[self.model_type]()
            return AutoConfig.from_pretrained(name, **self.get_hub_options())
        except (OSError, ValueError, KeyError) as error:
            given = f"--model_type={self.model_type}" if self.model_type else repr(name)
            inside = sorted(folder.name for folder in Path(name or "").glob("checkpoint-*/config.json"))
            hint = f"; its checkpoints {', '.join(inside)} have one" if inside else "; check the name"
            raise InputError(f"{given}: the configuration cannot be loaded ({error}){hint}") from error

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
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise InputError(f"the model cannot be made: {error}") from error
        logger.info(f"from scratch: {type(network).__name__}, {network.num_parameters():,} parameters")
        return network

    def _require_type(self, model_type: str, what: str) -> None:
        if model_type not in self.model_types:
            (closest,) = difflib.get_close_matches(model_type, self.model_types, n=1, cutoff=0)
            other = f", or use {self.other_script}" if self.other_script else ""
            raise InputError(f"{what} is no {self.kind}; give one, for example {closest}{other}")


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

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        super().__post_init__()
        self._require_place("tokenizer_name", self.tokenizer_name)

    def get_tokenizer(
        self, texts: Iterable[str] | None, place: str | None, train: Callable[[Iterable[str]], PreTrainedTokenizerBase]
    ) -> PreTrainedTokenizerBase:
        """Load the tokenizer named, or that of the checkpoint resumed, or train one on `texts`, which is read only then.

        Args:
            texts: the training text; None where there is none.
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
        if texts is None:
            raise InputError("no model and no tokenizer given, and no training to make them; give --model_name_or_path")
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
        InputError: a key that it does not have, or a value of the wrong type or out of range.
    """
    for part in overrides.split(","):
        key, equals, text = (word.strip() for word in part.partition("="))
        if not (key and equals and text):
            raise InputError(f"--config_overrides={overrides}: {part!r} is not key=value; write key=value,...")
        if not hasattr(config, key):
            closest = difflib.get_close_matches(key, list(config.to_dict()), n=1, cutoff=0.5)
            hint = f"; did you mean {closest[0]}?" if closest else ""
            raise InputError(f"--config_overrides={overrides}: a {config.model_type} configuration has no {key}{hint}")
        present = getattr(config, key)
        try:
            config.update_from_string(f"{key}={text}")
        except Exception as error:  # of configurations that check themselves, each in its own way
            kinds = {bool: "true or false", int: "a whole number", float: "a number"}
            wanted = kinds.get(type(present), f"a value that fits ({error})")
            raise InputError(f"--config_overrides={overrides}: {key}={text}: must be {wanted}") from error
        allowed = _find_allowed(key, getattr(config, key), present)
        if allowed is not None:
            raise InputError(f"--config_overrides={overrides}: {key}={text}: must be {allowed}")


def _find_allowed(key: str, value, present) -> str | None:
    """What values a key may have, in words; None if it has one of them."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str):
        is_activation = "activation" in key or key.endswith("_act")
        return f"an activation ({', '.join(sorted(ACT2FN))})" if is_activation and value not in ACT2FN else None
    if not math.isfinite(value):
        return "a finite number"
    if isinstance(value, float) and "drop" in key:
        return None if 0 <= value < 1 else "at least 0 and less than 1"
    if (
        value < 1
        and isinstance(value, int)
        and isinstance(present, int)
        and present >= 1
        and not key.endswith("_token_id")
    ):
        return "1 or more"
    return "0 or more" if value < 0 else None


def require_buildable(config: PreTrainedConfig, auto_class, what: str) -> None:
    """Refuse a configuration of which no model can be built, before any data is read; nothing is allocated.

    Args:
        what: the flags to change, for the error.

    Raises:
        InputError: with what the model says of its configuration.
    """
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups:
        raise InputError(f"{what}: num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
    try:
        with torch.device("meta"):
            auto_class.from_config(copy.deepcopy(config))
    except InputError:
        raise
    except Exception as error:  # every model says in its own way what it cannot be
        raise InputError(f"{what}: no {config.model_type} model can be built so: {error}") from error
