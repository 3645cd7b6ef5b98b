"""What tells one training run from another, so that a folder's run is only ever continued by the same one.

The record stands in `trainer_state.json` (of every checkpoint, and of the output folder when the run has finished) among the
Trainer's callbacks. Runs without it, of the stock Trainer, are judged by their `config.json` alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainingArguments

from hf_v0init import InputError, V0InitArguments

logger = logging.getLogger("hf_v0init")

REMEDY = (
    "To continue it, give what it was started with; to start anew, give --overwrite_output_dir or another --output_dir (and no "
    "--resume_from_checkpoint)"
)
RECORD_KEY, STATE_FILE, TRAIN_RESULTS_FILE = "HfV0InitRun", "trainer_state.json", "train_results.json"

# With another value it is another run. What may be changed on the way (learning rate, length, how often to log) is not here.
IDENTITY_FLAGS = (
    "dataset_name", "dataset_config_name", "dataset_revision", "source_lang", "target_lang", "source_column", "target_column",
    "text_column", "prompt_column", "completion_column", "image_column", "label_column", "source_prefix", "prompt_prefix",
    "model_name_or_path", "model_type", "tokenizer_name", "tokenizer_kind", "vocab_size", "max_source_length",
    "max_target_length", "block_size", "max_train_samples", "streaming", "whole_word_mask", "line_by_line",
    "mlm_probability", "optim", "optim_args", "v0_optimizer", "latent_size", "base_channels",
)  # fmt: skip
# With another value the run goes on, but not as it would have: the order of the samples is another.
ORDER_FLAGS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch", "world_size",
)  # fmt: skip
LENGTH_FLAGS = ("max_steps", "num_train_epochs")
# With another value a finished run would have come to another model.
SETTING_FLAGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm", "label_smoothing_factor", "lr_decay_epochs", "lr_decay_factor", "warmup_init_lr", "min_lr",
    "average_checkpoints", "config_overrides", "random_crop", "random_flip",
    *(name for name in V0InitArguments.__dataclass_fields__ if name not in ("v0_optimizer", "v0_record_run")),
)  # fmt: skip
TRAIN_PATHS = ("train_file", "train_source_file", "train_target_file", "train_dir")
NAME_FLAGS = ("model_name_or_path", "tokenizer_name", "dataset_name")  # whose folder may have been moved
HASHED_BYTES = 1 << 20  # at either end of a file: whoever edits or replaces it changes its size or these

# Follow from the data or from the place where a configuration is kept, not from what the user asked for.
DERIVED_CONFIG_KEYS = {
    "vocab_size", "decoder_vocab_size", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures",
    "id2label", "label2id", "num_labels", "image_size", "num_channels", "use_cache", "problem_type", "attn_implementation",
}  # fmt: skip


def describe_run(training: TrainingArguments, *others) -> dict[str, Any]:
    """Describe a run by its flags and the contents of its training files.

    Args:
        training: the Trainer's arguments.
        others: the script's other dataclasses of flags.

    Returns:
        "identity", "order", "length" and "settings", each a mapping of flags (and files) to plain values.
    """
    flags: dict[str, Any] = {"world_size": training.world_size}
    for arguments in (*others, training):
        flags |= vars(arguments)
    kinds = {"identity": IDENTITY_FLAGS, "order": ORDER_FLAGS, "length": LENGTH_FLAGS, "settings": SETTING_FLAGS}
    record = {
        kind: {name: _shorten(name, _make_plain(flags[name])) for name in names if name in flags}
        for kind, names in kinds.items()
    }
    for name in TRAIN_PATHS:
        if training.do_train and flags.get(name):
            record["identity"][name] = _describe_content(Path(flags[name]))
    return record


def get_record(stateful_callbacks: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record among what the Trainer keeps of its callbacks; None if there is none."""
    stored = stateful_callbacks.get(RECORD_KEY)
    return stored["attributes"] if isinstance(stored, dict) else None


def read_state(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Read a folder's `trainer_state.json`; None if it is missing or damaged."""
    try:
        state = json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def require_same_run(folder: str | os.PathLike, now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with what makes it another one; warn of what changes the order of its samples.

    Args:
        folder: a checkpoint, or the output folder of a finished run.
        now: what `describe_run` returned.

    Raises:
        InputError: naming the flags with their values then and now.
    """
    then = _read_record(folder)
    if then is None:
        return
    others = _list_differences(then.get("identity", {}), now.get("identity", {}))
    if others:
        raise InputError(f"{folder} is of another run: {'; '.join(others)}. {REMEDY}")
    changed = _list_differences(then.get("order", {}), now.get("order", {}))
    if changed:
        logger.warning(
            f"{folder} was saved with other settings ({'; '.join(changed)}): the run goes on, but with the samples in another "
            "order than a run in one piece"
        )


def list_changed_settings(folder: str | os.PathLike, now: Mapping[str, Any]) -> list[str]:
    """List in which settings a finished run differs from the one asked for, in words."""
    then = _read_record(folder) or {}
    return _list_differences(
        then.get("settings", {}) | then.get("order", {}), now.get("settings", {}) | now.get("order", {})
    )


def require_same_model(folder: str | os.PathLike | None, config: PreTrainedConfig) -> None:
    """Refuse to continue with a model of another shape than that of the checkpoint `folder`; None refuses nothing.

    Raises:
        InputError: naming the settings with their values then and now.
    """
    path = Path(folder, "config.json") if folder is not None else None
    if path is None or not path.is_file():
        return
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # whoever loads it says what is wrong with it
    now = json.loads(config.to_json_string(use_diff=False))
    both = [key for key in then if key in now and not _is_derived(key)]
    others = _list_differences({key: then[key] for key in both}, {key: now[key] for key in both})
    if others:
        raise InputError(f"{folder} holds another model: {'; '.join(others)}. {REMEDY}")


def find_finished_step(training: TrainingArguments) -> int | None:
    """Return the step at which the run of the output folder ended, if it is as long as `training` asks for; else None."""
    state = read_state(training.output_dir)
    if state is None or not Path(training.output_dir, TRAIN_RESULTS_FILE).is_file():
        return None
    step = state.get("global_step")
    length = (get_record(state.get("stateful_callbacks", {})) or {}).get("length")
    wanted = {name: _make_plain(getattr(training, name)) for name in LENGTH_FLAGS}
    if training.max_steps > 0 and isinstance(step, int) and step >= training.max_steps:
        return step
    same = length == wanted or (length and training.max_steps > 0 and length["max_steps"] == training.max_steps)
    return step if same else None


def _read_record(folder: str | os.PathLike) -> dict[str, Any] | None:
    return get_record((read_state(folder) or {}).get("stateful_callbacks", {}))


def _list_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in now if name in then and then[name] != now[name]]
    names += [name for name in TRAIN_PATHS if (name in then) != (name in now)]
    return [
        f"--{name} has other content" if name in TRAIN_PATHS and name in then and name in now
        else f"{name} was {_show(then.get(name))} and is now {_show(now.get(name))}"
        for name in names
    ]  # fmt: skip


def _show(value: Any) -> str:
    return "not given" if value is None else str(value)


def _shorten(name: str, value: Any) -> Any:
    return Path(value).name if name in NAME_FLAGS and isinstance(value, str) else value


def _make_plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _is_derived(key: str) -> bool:
    return key.startswith("_") or key in DERIVED_CONFIG_KEYS or key.endswith(("_token_id", "_token_ids"))


def _describe_content(path: Path) -> str:
    """A word that is another one for other content; a file that is missing is found by whoever reads it."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
    elif path.is_file():
        try:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(str(size).encode())
                for start in {0, max(0, size - HASHED_BYTES)}:
                    file.seek(start)
                    digest.update(file.read(HASHED_BYTES))
        except OSError:
            return "unreadable"
    else:
        return "missing"
    return digest.hexdigest()[:16]
