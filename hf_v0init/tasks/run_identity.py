"""What tells one training run from another, so that a folder's run is only ever continued by the same one.

The record stands in `trainer_state.json` (of every checkpoint, and of the output folder when the run has finished) among the
Trainer's callbacks. Runs without it, of the stock Trainer, are continued as the Trainer does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_v0init import InputError, V0InitArguments

REMEDY = "To continue it, give what it was started with; to start anew, --overwrite_output_dir or another --output_dir"
RECORD_KEY, STATE_FILE, TRAIN_RESULTS_FILE = "HfV0InitRun", "trainer_state.json", "train_results.json"

# With another value it is another run. What may be changed on the way (learning rate, length, how often to log) is not here.
IDENTITY_FLAGS = (
    "dataset_name", "dataset_config_name", "dataset_revision", "source_lang", "target_lang", "source_column", "target_column",
    "text_column", "prompt_column", "completion_column", "image_column", "label_column", "source_prefix", "prompt_prefix",
    "model_name_or_path", "model_type", "config_overrides", "tokenizer_name", "tokenizer_kind", "vocab_size", "max_source_length",
    "max_target_length", "block_size", "max_train_samples", "streaming", "whole_word_mask", "line_by_line",
    "mlm_probability", "optim", "optim_args", "v0_optimizer", "latent_size", "base_channels",
)  # fmt: skip
LENGTH_FLAGS = ("max_steps", "num_train_epochs")
# With another value a finished run would have come to another model.
SETTING_FLAGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
    "weight_decay", "max_grad_norm", "label_smoothing_factor", "lr_decay_epochs", "lr_decay_factor", "average_checkpoints",
    "random_crop", "random_flip", "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_tokens_per_batch", "world_size",
    *(name for name in V0InitArguments.__dataclass_fields__ if name not in ("v0_optimizer", "v0_record_run")),
)  # fmt: skip
TRAIN_PATHS = ("train_file", "train_source_file", "train_target_file", "train_dir")
HASHED_BYTES = 1 << 24  # of a file: whoever edits or replaces it changes its size or these


def describe_run(training: TrainingArguments, *others) -> dict[str, Any]:
    """Describe a run by its flags and the contents of its training files.

    Args:
        training: the Trainer's arguments.
        others: the script's other dataclasses of flags.

    Returns:
        "identity", "length" and "settings", each a mapping of flags (and files) to plain values.
    """
    flags: dict[str, Any] = {"world_size": training.world_size}
    for arguments in (*others, training):
        flags |= vars(arguments)
    for name in ("model_name_or_path", "tokenizer_name", "dataset_name"):  # whose folder may have been moved
        flags[name] = flags.get(name) and Path(flags[name]).name
    kinds = {"identity": IDENTITY_FLAGS, "length": LENGTH_FLAGS, "settings": SETTING_FLAGS}
    record = {
        kind: {name: _make_plain(flags[name]) for name in names if name in flags} for kind, names in kinds.items()
    }
    if training.do_train:
        record["identity"] |= {
            name: describe_content(Path(flags[name])) for name in TRAIN_PATHS if flags.get(name) is not None
        }
    return record


def describe_content(path: Path) -> str:
    """A word that is another one for other content of a file or folder; one that is missing is found by whoever reads it."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
    if path.is_file():
        with open(path, "rb") as content:
            digest.update(content.read(HASHED_BYTES))
    return digest.hexdigest()[:16]


def get_record(stateful_callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record among what the Trainer keeps of its callbacks; empty if there is none."""
    stored = stateful_callbacks.get(RECORD_KEY)
    return stored["attributes"] if isinstance(stored, dict) else {}


def read_state(folder: str | os.PathLike) -> dict[str, Any]:
    """Read a folder's `trainer_state.json`; empty if it is missing or damaged."""
    try:
        return json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def list_differences(folder: str | os.PathLike, now: Mapping[str, Any], kind: str) -> list[str]:
    """List in which flags of a kind the run of a folder differs from the one asked for, in words."""
    old, new = get_record(read_state(folder).get("stateful_callbacks", {})).get(kind, {}), now[kind]
    names = [name for name in {**old, **new} if (name in old and name in new) or (old and name in TRAIN_PATHS)]
    return [
        f"{name} has other content" if name in TRAIN_PATHS else f"{name} was {old[name]} and is now {new[name]}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def require_same_run(folder: str | os.PathLike, now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with what makes it another one.

    Args:
        folder: a checkpoint, or the output folder of a finished run.
        now: what `describe_run` returned.

    Raises:
        InputError: naming the flags with their values then and now.
    """
    others = list_differences(folder, now, "identity")
    if others:
        raise InputError(f"{folder} is of another run: {'; '.join(others)}. {REMEDY}")


def find_finished_step(training: TrainingArguments) -> int | None:
    """Return the step at which the run of the output folder ended, if it is as long as `training` asks for; else None."""
    state = read_state(training.output_dir)
    if "global_step" not in state or not Path(training.output_dir, TRAIN_RESULTS_FILE).is_file():
        return None
    step, length = state["global_step"], get_record(state.get("stateful_callbacks", {})).get("length")
    if training.max_steps > 0:
        is_as_long = step >= training.max_steps or (length and length["max_steps"] == training.max_steps)
    else:
        is_as_long = length == {name: _make_plain(getattr(training, name)) for name in LENGTH_FLAGS}
    return step if is_as_long else None


def _make_plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
