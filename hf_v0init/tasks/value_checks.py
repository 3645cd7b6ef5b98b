"""Refuses flags whose value can never be right, for all scripts, before anything is read: one table, one message.

What depends on the data or on the model is checked where that is known.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from ..errors import InputError

LARGEST_SEED = 2**32 - 1  # of numpy's generator
LOWER_IS_BETTER = ("loss", "perplexity", "pseudo_perplexity", "gen_len", "runtime")
SPEED_METRICS = ("runtime", "samples_per_second", "steps_per_second")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


# ---- the Trainer's flags -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Range:
    """Which numbers a flag may have, in words and as a test; `default` may always stand."""

    allowed: str
    is_allowed: Callable[[float], bool]
    example: str
    default: Any = None


def _count(smallest: int, example: str, default: Any = None) -> _Range:
    return _Range(
        f"a whole number, {smallest} or more", lambda x: x == int(x) and x >= smallest, example, default=default
    )


_NOT_NEGATIVE = "a finite number, 0 or more"
_SHARE = "a number of steps of 1 or more, or a share of the run between 0 and 1"
_BETA = _Range("at least 0 and less than 1", lambda x: 0 <= x < 1, "0.9 or 0.999")
_INTERVAL = _Range(_SHARE, lambda x: x > 0 and (x < 1 or x == int(x)), "100")

TRAINING_RANGES = {
    "learning_rate": _Range(_NOT_NEGATIVE, lambda x: x >= 0, "1e-3"),
    "per_device_train_batch_size": _count(1, "8"),
    "per_device_eval_batch_size": _count(1, "8"),
    "gradient_accumulation_steps": _count(1, "1"),
    "eval_accumulation_steps": _count(1, "1, or leave it out"),
    "num_train_epochs": _Range("a finite number above 0", lambda x: x > 0, "3"),
    "max_steps": _count(1, "1000, or leave it out to train for --num_train_epochs", default=-1),
    "warmup_steps": _Range(
        "0, a number of steps of 1 or more, or a share of the run between 0 and 1",
        lambda x: x >= 0 and (x < 1 or x == int(x)),
        "500",
    ),
    "warmup_ratio": _Range("from 0 to 1", lambda x: 0 <= x <= 1, "0.1"),
    "logging_steps": _INTERVAL,
    "save_steps": _INTERVAL,
    "eval_steps": _INTERVAL,
    "eval_delay": _Range(_NOT_NEGATIVE, lambda x: x >= 0, "0"),
    "save_total_limit": _count(1, "2, or leave it out to keep all"),
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _Range(_NOT_NEGATIVE, lambda x: x >= 0, "1e-8"),
    "weight_decay": _Range(_NOT_NEGATIVE, lambda x: x >= 0, "0.01"),
    "max_grad_norm": _Range(_NOT_NEGATIVE, lambda x: x >= 0, "1.0, or 0 to clip nothing"),
    "label_smoothing_factor": _Range("at least 0 and less than 1", lambda x: 0 <= x < 1, "0.1"),
    "neftune_noise_alpha": _Range("a finite number above 0", lambda x: x > 0, "5, or leave it out"),
    "seed": _Range(f"a whole number from 0 to {LARGEST_SEED}", lambda x: 0 <= x <= LARGEST_SEED, "42"),
    "data_seed": _Range(
        f"a whole number from 0 to {LARGEST_SEED}", lambda x: 0 <= x <= LARGEST_SEED, "42, or leave it out"
    ),
    "dataloader_num_workers": _count(0, "2"),
    "dataloader_prefetch_factor": _count(1, "2"),
    "generation_max_length": _count(1, "128"),
    "generation_num_beams": _count(1, "4"),
}


def require_possible_training(training: TrainingArguments) -> None:
    """Refuse values of the Trainer's flags that can never be right.

    Raises:
        InputError: naming the flag, its value, what is allowed and a value that would do.
    """
    for name, value_range in TRAINING_RANGES.items():
        require_in_range(name, getattr(training, name, None), value_range)
    _require_usable_optimizer(training)
    _require_usable_schedule(training)


def require_in_range(name: str, value: Any, value_range: _Range) -> None:
    """Refuse a number outside its range; None and the range's default may stand."""
    if value is None or value == value_range.default or isinstance(value, str):
        return
    if not math.isfinite(value) or not value_range.is_allowed(value):
        raise InputError(f"--{name}={value}: must be {value_range.allowed}, such as {value_range.example}")


def _require_usable_optimizer(training: TrainingArguments) -> None:
    """Find out now what the Trainer would say of `optim` and `optim_args` only after the data is prepared."""
    if training.optim_args:
        for part in training.optim_args.replace(" ", "").split(","):
            key, equals, value = part.partition("=")
            if not (key and equals and value):
                raise InputError(f"--optim_args={training.optim_args}: {part!r} is not key=value; write key=value,...")
    if getattr(training, "v0_optimizer", None) is not None or training.deepspeed:
        return
    optim = getattr(training.optim, "value", training.optim)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"--optim={optim}: {join_lines(str(error))}; or use --optim adamw_torch") from error
    except (ValueError, KeyError, TypeError) as error:
        if "model" in str(error).lower():
            return  # an optimizer that wants to see the model first
        raise InputError(
            f"--optim={optim} with --optim_args={training.optim_args}: {join_lines(str(error))}"
        ) from error
    if not training.optim_args:
        return
    try:
        optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"--optim_args={training.optim_args}: {optim} refuses it ({join_lines(str(error))})"
        ) from error
    except Exception:  # of an optimizer that needs a device or a whole model: the Trainer will know
        return


def _require_usable_schedule(training: TrainingArguments) -> None:
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    options = training.lr_scheduler_kwargs or {}
    if not isinstance(options, dict):
        raise InputError(f"--lr_scheduler_kwargs={options}: must be JSON such as '{{\"num_cycles\": 2}}'")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate or 1e-3)
    num_steps = training.max_steps if training.max_steps > 0 else 1000
    num_warmup = training.get_warmup_steps(num_steps)
    try:
        get_scheduler(
            name,
            optimizer,
            num_warmup_steps=num_warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        given = f" with --lr_scheduler_kwargs={options}" if options else ""
        raise InputError(
            f"--lr_scheduler_type={name}{given}: {join_lines(str(error))}; see --lr_scheduler_kwargs"
        ) from error


# ---- names and folders -----------------------------------------------------------------------------------------------------


NAME_FLAGS = ("model_name_or_path", "config_name", "tokenizer_name", "dataset_name")


def require_findable_names(arguments: Any) -> None:
    """Refuse names of models, tokenizers and data sets that are neither a folder here nor a name that the Hub could have.

    Raises:
        InputError: naming the flag, the name, and what it could have meant.
    """
    for flag in NAME_FLAGS:
        name = getattr(arguments, flag, None)
        if name:
            _require_findable(flag, str(name))


def _require_findable(flag: str, name: str) -> None:
    path = Path(name)
    if path.is_dir():
        _require_content(flag, path)
        return
    if path.is_file():
        if flag == "config_name" and path.suffix == ".json":
            return
        raise InputError(f"--{flag}={name}: is a file; give the folder that holds it, or a name on the Hub")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith((".json", "/")):
        kind = "file" if name.endswith(".json") else "folder"
        raise InputError(f"--{flag}={name}: no such {kind} {name} (relative paths start at {Path.cwd()})")
    if not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"--{flag}={name}: no such folder, and no name of the Hub either (letters, digits, '-', '_', '.' and one '/')"
        )


def _require_content(flag: str, folder: Path) -> None:
    wanted = {
        "model_name_or_path": ("config.json",),
        "config_name": ("config.json",),
        "tokenizer_name": ("tokenizer_config.json", "tokenizer.json", "config.json", "vocab.json", "spiece.model"),
    }.get(flag)
    if wanted is None or any((folder / name).exists() for name in wanted):
        return
    inside = sorted(child.name for child in folder.glob("checkpoint-*") if (child / wanted[0]).exists())
    hint = f"; it has {', '.join(inside[-3:])}: give one of these" if inside else "; check the path"
    raise InputError(f"--{flag}={folder}: the folder holds no {wanted[0]}{hint}")


def require_makeable_folder(flag: str, folder: str | None) -> None:
    """Refuse a folder that is none, or that cannot be made or written. Makes nothing that stays.

    Raises:
        InputError: naming flag and folder.
    """
    if folder is None:
        return
    path = Path(folder).expanduser().absolute()
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"--{flag}={folder}: {existing} is a file; give another folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"--{flag}={folder}: cannot be written ({error.strerror or os.strerror(error.errno or 0)}); give another folder"
        ) from error


# ---- what depends on the script ----------------------------------------------------------------------------------------------


def require_available_metric(training: TrainingArguments, names: Iterable[str], missing: dict[str, str] | None = None):
    """Refuse a `metric_for_best_model` that the script's evaluation will not produce.

    Args:
        names: the evaluation's metrics without "eval_"; the Trainer's speeds need not be named.
        missing: other metrics of the script, each with what would produce it.

    Raises:
        InputError: naming the metric, those there will be, and what to type.
    """
    if training.metric_for_best_model is None:
        return
    name, names, missing = training.metric_for_best_model.removeprefix("eval_"), list(names), missing or {}
    if name in (*names, *SPEED_METRICS):
        return
    known = f"the evaluation gives {', '.join(names)}"
    if name in missing:
        raise InputError(f"--metric_for_best_model={training.metric_for_best_model}: {known}; {missing[name]}")
    closest = difflib.get_close_matches(name, [*names, *missing], n=1, cutoff=0.5)
    hint = f"; did you mean {closest[0]}?" if closest else ""
    raise InputError(f"--metric_for_best_model={training.metric_for_best_model}: {known}{hint}")


def choose_better_direction(training: TrainingArguments, was_given: bool) -> None:
    """Set `greater_is_better` where the user did not: the Trainer takes more of anything but a loss for better."""
    if training.metric_for_best_model is not None and not was_given:
        name = training.metric_for_best_model.removeprefix("eval_")
        training.greater_is_better = not (name.endswith("loss") or name in LOWER_IS_BETTER)


def join_lines(message: str) -> str:
    """`message` with every run of white space, line breaks included, as one space."""
    return " ".join(message.split())
