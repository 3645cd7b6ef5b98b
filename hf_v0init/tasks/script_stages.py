"""What the training scripts share of a run: common flags, data and configuration by name, training, saving, model card."""

import copy
import difflib
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, TrainingArguments
from transformers.activations import ACT2FN

from ..errors import InputError
from .checkpoint_averaging import load_average_of_last
from .run_identity import find_finished_step, require_same_run
from .script_support import (
    NothingToDoError,
    RemoveOldCheckpoints,
    find_checkpoint_to_resume,
    require_writable_output,
)
from .script_trainer import CARD_FILE
from .summary import print_summary

logger = logging.getLogger("hf_v0init")

RESULT_NAMES = {"eval": ("eval",), "predict": ("predict", "test")}  # of the files in which scripts keep them


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
    """Refuse whole numbers below 1 among the fields of a dataclass, or of a mapping."""
    for name, value in (arguments if isinstance(arguments, dict) else vars(arguments)).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise InputError(f"--{name}={value}: must be 1 or more")


def require_possible_run(
    training: TrainingArguments,
    model_name_or_path: str | None,
    overwrite_output_dir: bool,
    run: dict | None = None,
) -> str | None:
    """Refuse what can be refused before any data is read.

    Args:
        run: what `describe_run` returned, to be held against the run that the output folder or the checkpoint is of.

    Returns:
        The folder to continue from, if any: a checkpoint, or the output folder of a run that is trained but not evaluated.

    Raises:
        InputError: nothing to do, nothing to evaluate, an output folder that cannot be used, a checkpoint of another run.
        NothingToDoError: the output folder holds this run from beginning to end.
    """
    if not (training.do_train or training.do_eval or training.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if training.do_train:
        if not overwrite_output_dir and training.resume_from_checkpoint in (None, "true", "True", True):
            finished_step = find_finished_step(training)
            if finished_step is not None:
                return _require_stages_left(training, finished_step, run)
        checkpoint = find_checkpoint_to_resume(training, overwrite_output_dir)
        if checkpoint is not None and run is not None:
            require_same_run(checkpoint, run)
        return checkpoint
    if model_name_or_path is None:
        raise InputError("evaluation needs a trained model; give --model_name_or_path, or --do_train")
    require_writable_output(training.output_dir, overwrite=True)
    return None


def _require_stages_left(training: TrainingArguments, finished_step: int, run: dict | None) -> str:
    """Of a run that has been trained to its end: return its folder if results are still to be made."""
    folder = Path(training.output_dir)
    if run is not None:
        require_same_run(folder, run)
    stages = {"eval": training.do_eval, "predict": training.do_predict}
    wanted = [stage for stage, is_wanted in stages.items() if is_wanted]
    left = [stage for stage in wanted if not any((folder / f"{n}_results.json").is_file() for n in RESULT_NAMES[stage])]
    if not left:
        raise NothingToDoError(
            f"{folder}: finished at step {finished_step}; nothing to do. To train anew give --overwrite_output_dir or another "
            "--output_dir; to train longer, a larger --max_steps or --num_train_epochs; to measure again, "
            f"--model_name_or_path {folder} without --do_train"
        )
    logger.warning(f"{folder}: training finished at step {finished_step}; what is left is {' and '.join(left)}")
    return str(folder)


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
        flag_name = f"--model_type={model_type}" if model_type else f"{name_or_path!r}"
        raise InputError(f"{flag_name}: the configuration cannot be loaded ({error}); check the name") from error
    if overrides:
        override_config(config, overrides)
    return config


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
        except (ValueError, TypeError) as error:
            kinds = {bool: "true or false", int: "a whole number", float: "a number"}
            wanted = kinds.get(type(present), "a value that fits")
            detail = "" if type(present) in kinds else f" ({error})"
            raise InputError(f"--config_overrides={overrides}: {key}={text}: must be {wanted}{detail}") from error
        except Exception as error:  # of configurations that check themselves, each in its own way
            raise InputError(f"--config_overrides={overrides}: {key}={text}: {error}") from error
        _require_in_range(overrides, key, getattr(config, key), present)


def _require_in_range(overrides: str, key: str, value, present) -> None:
    allowed = None
    if isinstance(value, float) and not math.isfinite(value):
        allowed = "a finite number"
    elif isinstance(value, int) and not isinstance(value, bool):
        if key.endswith("_token_id"):
            allowed = "0 or more" if value < 0 else None
        elif value < 1 and isinstance(present, int) and present >= 1:
            allowed = "1 or more"
        elif value < 0:
            allowed = "0 or more"
    elif isinstance(value, float) and ("drop" in key or key.endswith("_pdrop")):
        allowed = "at least 0 and less than 1" if not 0 <= value < 1 else None
    elif isinstance(value, float) and value < 0:
        allowed = "0 or more"
    elif isinstance(value, str) and ("activation" in key or key.endswith("_act")) and value not in ACT2FN:
        closest = difflib.get_close_matches(value, list(ACT2FN), n=1, cutoff=0.0)
        known = ", ".join(sorted(ACT2FN))
        raise InputError(
            f"--config_overrides={overrides}: no activation {value}; did you mean {closest[0]}? (known: {known})"
        )
    if allowed is not None:
        raise InputError(f"--config_overrides={overrides}: {key}={value}: must be {allowed}")


def require_buildable(config: PreTrainedConfig, auto_class, what: str) -> None:
    """Refuse a configuration of which no model can be built, before any data is read; nothing is allocated.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
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

    Where `checkpoint` is the output folder itself, the run has been trained: its model is loaded, and nothing is trained.

    Returns:
        The metrics of training, with `train_samples` where their number is known.
    """
    if checkpoint is not None and Path(checkpoint) == Path(trainer.args.output_dir):
        return trainer.load_trained()
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
    """Write the model card, or add to it; push everything if `--push_to_hub` was given; and sum the run up on the terminal."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    elif trainer.args.do_train or Path(trainer.args.output_dir, CARD_FILE).is_file():
        trainer.create_model_card(**card)  # results of a model that is kept elsewhere need no card here
    if trainer.is_world_process_zero():
        print_summary(trainer)
