"""What the training scripts share of a run: common flags, data and configuration by name, training, saving, model card."""

import difflib
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, TrainingArguments

from ..errors import InputError
from .checkpoint_averaging import load_average_of_last
from .script_support import RemoveOldCheckpoints, find_checkpoint_to_resume, require_writable_output

logger = logging.getLogger("hf_v0init")


def flag(default, text: str, **metadata):
    """Return a dataclass field that becomes a flag with this help text."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class HubArguments:
    """How to speak to the Hub."""

    cache_dir: str | None = flag(None, "Folder for what comes from the Hub and for prepared data.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the Hub.")
    token: str | None = flag(None, "Access token for the Hub. Default: that of `hf auth login`.")
    trust_remote_code: bool = flag(False, "Run code that the Hub repositories contain.")

    def get_hub_options(self) -> dict:
        """Return the arguments that every `from_pretrained` takes."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class DatasetArguments:
    """Which data set of the Hub."""

    dataset_name: str | None = flag(None, "Data set by Hub name or folder.")
    dataset_config_name: str | None = flag(None, "Configuration of that data set.")
    dataset_revision: str | None = flag(None, "Branch, tag or commit of that data set.")

    def load_dataset(
        self, hub: HubArguments, streaming: bool = False
    ) -> datasets.DatasetDict | datasets.IterableDatasetDict:
        """Load all splits of `dataset_name`, as streams if asked.

        Raises:
            InputError: it cannot be loaded, for whatever reason.
        """
        try:
            return datasets.load_dataset(
                self.dataset_name,
                self.dataset_config_name,
                revision=self.dataset_revision,
                cache_dir=hub.cache_dir,
                token=hub.token,
                streaming=streaming,
            )
        except Exception as error:  # of many kinds: no network, no such name, no such configuration
            raise InputError(
                f"--dataset_name={self.dataset_name}: cannot be loaded ({error}); check name and network"
            ) from error


def require_sole_model_source(model, config_may_join: bool = False) -> None:
    """Refuse more than one of `model_name_or_path`, `config_name` and `model_type`.

    Args:
        config_may_join: the first two may be given together, weights and another configuration for them.
    """
    ways = [name for name in ("model_name_or_path", "config_name", "model_type") if getattr(model, name)]
    if len(ways) > 1 and not (config_may_join and ways == ["model_name_or_path", "config_name"]):
        raise InputError(f"--{ways[0]} and --{ways[1]}: give one source of the model, not both")


def require_positive_counts(arguments) -> None:
    """Refuse whole numbers below 1 among the fields of a dataclass."""
    for name, value in vars(arguments).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise InputError(f"--{name}={value}: must be 1 or more")


def require_possible_run(
    training: TrainingArguments, model_name_or_path: str | None, overwrite_output_dir: bool
) -> str | None:
    """Refuse what can be refused before any data is read.

    Returns:
        The checkpoint to resume from, if any.

    Raises:
        InputError: nothing to do, nothing to evaluate, an output folder that cannot be used.
    """
    if not (training.do_train or training.do_eval or training.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if training.do_train:
        return find_checkpoint_to_resume(training, overwrite_output_dir)
    if model_name_or_path is None:
        raise InputError("evaluation needs a trained model; give --model_name_or_path, or --do_train")
    require_writable_output(training.output_dir, overwrite=True)
    return None


def find_needed_roles(training: TrainingArguments) -> list[str]:
    """Return those of "train", "validation" and "test" whose data the run needs, in this order."""
    evaluates = training.do_eval or (training.do_train and training.eval_strategy != "no")
    needed = {"train": training.do_train, "validation": evaluates, "test": training.do_predict}
    return [role for role, is_needed in needed.items() if is_needed]


def load_config(
    model_type: str | None, name_or_path: str | None, overrides: str | None, hub: HubArguments
) -> PreTrainedConfig:
    """Load a configuration by type, or by Hub name, folder or JSON file, and change it by `key=value,...`.

    Raises:
        InputError: it cannot be loaded or changed so.
    """
    if model_type is not None and model_type not in CONFIG_MAPPING:
        (closest,) = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1, cutoff=0)
        raise InputError(f"--model_type={model_type}: transformers has no such model; did you mean {closest}?")
    try:
        if model_type is not None:
            config = CONFIG_MAPPING[model_type]()
        else:
            config = AutoConfig.from_pretrained(name_or_path, **hub.get_hub_options())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the configuration of {model_type or name_or_path!r} cannot be loaded ({error}); check the name"
        ) from error
    if overrides:
        override_config(config, overrides)
    return config


def override_config(config: PreTrainedConfig, overrides: str) -> None:
    """Change a configuration by `key=value,...`, in place; raise `InputError` on what it cannot take."""
    try:
        config.update_from_string(overrides)
    except (ValueError, TypeError) as error:
        raise InputError(f"--config_overrides={overrides}: {error}; write key=value,...") from error


def count_steps(training: TrainingArguments, num_samples: int | None) -> int | None:
    """Count the optimizer steps of the run before the Trainer exists; None if they depend on more than these numbers.

    Args:
        num_samples: of training; None where batches hold varying numbers of samples.
    """
    if training.max_steps > 0:
        return training.max_steps
    if num_samples is None:
        return None
    batches = math.ceil(num_samples / (training.train_batch_size * training.world_size))
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


def train_and_save(
    trainer, checkpoint: str | None, overwrite_output_dir: bool, average_checkpoints: int | None = None
) -> dict:
    """Train, from `checkpoint` if there is one, and save the model: the last, or the average of the last checkpoints.

    Returns:
        The metrics of training, with `train_samples` where their number is known.
    """
    if checkpoint is None and overwrite_output_dir:
        trainer.add_callback(RemoveOldCheckpoints())  # added last, so called when v0 has been written
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if average_checkpoints is not None:
        folders = load_average_of_last(trainer, average_checkpoints)
        logger.info(f"The model is now the average of {', '.join(folder.name for folder in folders)}")
    trainer.save_model()
    metrics = dict(result.metrics)
    if hasattr(trainer.train_dataset, "__len__"):
        metrics["train_samples"] = len(trainer.train_dataset)
    return metrics


def describe_for_card(task: str, model_name_or_path: str | None, data: DatasetArguments, local_data: list[str]) -> dict:
    """Describe the run to the Trainer's `create_model_card`; of local files or folders only the names are told."""
    card = {"tasks": task, "finetuned_from": model_name_or_path}
    if data.dataset_name:
        card |= {"dataset_tags": data.dataset_name, "dataset": data.dataset_name}
        if data.dataset_config_name:
            card["dataset_args"] = data.dataset_config_name
    else:
        card["dataset"] = ", ".join(Path(path).name for path in local_data) or "local"
    return card


def publish_card(trainer, card: dict) -> None:
    """Write the model card, and push everything if `--push_to_hub` was given."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
