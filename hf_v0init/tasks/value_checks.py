"""Refuses flags whose value can never be right, for all scripts, before anything is read.

Of the Trainer's flags only what transformers lets through and what would then cost a run, or end in a traceback, is checked here.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from hf_v0init import InputError

from ..second_moment.state import SecondMoment
from ..settings import V0InitArguments, V0Plan

LARGEST_SEED = 2**32 - 1  # of numpy's generator
LOWER_IS_BETTER = ("loss", "perplexity", "pseudo_perplexity", "gen_len", "runtime")
SPEED_METRICS = ("runtime", "samples_per_second", "steps_per_second")

# What is allowed, in words and as a test, and the flags of which it holds; None may always stand.
COUNT = ("a whole number, 1 or more", lambda x: x >= 1 and x == int(x))  # of all of the scripts' own flags, too
RANGES = (
    (*COUNT, ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
              "eval_accumulation_steps", "save_total_limit", "generation_max_length", "generation_num_beams")),
    ("a whole number, 3 or more", lambda x: x >= 3, ("block_size",)),
    ("a whole number, 1 or more, or left out", lambda x: x == -1 or (x >= 1 and x == int(x)), ("max_steps",)),
    ("a whole number, 0 or more", lambda x: x >= 0 and x == int(x), ("dataloader_num_workers",)),
    (f"a whole number from 0 to {LARGEST_SEED}", lambda x: 0 <= x <= LARGEST_SEED, ("seed", "data_seed")),
    ("a number of steps, or a fraction of training between 0 and 1", lambda x: x > 0 and (x < 1 or x == int(x)),
     ("logging_steps", "save_steps", "eval_steps")),
    ("0, a number of steps, or a fraction of training between 0 and 1", lambda x: x >= 0 and (x < 1 or x == int(x)),
     ("warmup_steps",)),
    ("a finite number, 0 or more", lambda x: x >= 0, ("learning_rate", "adam_epsilon", "weight_decay", "max_grad_norm", "eval_delay")),
    ("a finite number above 0", lambda x: x > 0, ("num_train_epochs", "neftune_noise_alpha")),
    ("at least 0 and less than 1", lambda x: 0 <= x < 1, ("adam_beta1", "adam_beta2", "label_smoothing_factor")),
    ("above 0 and less than 1", lambda x: 0 < x < 1, ("mlm_probability", "lr_decay_factor")),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, ("crop_fraction",)),
    ("above 0 and less than 100", lambda x: 0 < x < 100, ("validation_split_percentage",)),
)  # fmt: skip
RULES = {name: (words, test) for words, test, names in RANGES for name in names}
# Flags that have no effect without another one, and flags that exclude each other.
NEEDS = (
    ("crop_padding", "random_crop=pad"), ("lr_decay_factor", "lr_decay_epochs"), ("shuffle_buffer_size", "streaming"),
    ("prompt_column", "completion_column"), ("completion_column", "prompt_column"), ("early_stopping_patience", "eval_strategy"),
    ("early_stopping_patience", "load_best_model_at_end"), ("save_strategy=best", "metric_for_best_model"),
    ("save_strategy=best", "eval_strategy"),
)  # fmt: skip
EXCLUDES = (
    ("model_name_or_path", "model_type"), ("model_name_or_path", "config_name"), ("config_name", "model_type"),
    ("model_name_or_path", "config_overrides"), ("model_name_or_path", "weight_initialization"),
    ("validation_split_percentage", "validation_dir"), ("streaming", "max_tokens_per_batch"), ("streaming", "lr_decay_epochs"),
)  # fmt: skip


def require_possible_flags(parsed: Iterable[Any]) -> None:
    """Refuse numbers out of their `RANGES`, flags without effect (`NEEDS`), flags that exclude each other, and a bad `--cache_dir`.

    Args:
        parsed: dataclasses of flags. A rule on two flags holds where both of them are among them.
    """
    values: dict[str, Any] = {}
    for arguments in parsed:
        values |= vars(arguments)
        own = None if isinstance(arguments, TrainingArguments) else COUNT
        for name, value in vars(arguments).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rule = RULES.get(name, own if isinstance(value, int) else None)
                if rule is not None and not (math.isfinite(value) and rule[1](value)):
                    raise InputError(f"--{name}={value}: must be {rule[0]}")

    def describe(flag: str) -> str:
        """The flag with its value, or nothing where it is not given."""
        name, _, wanted = flag.partition("=")
        value = getattr(values.get(name), "value", values.get(name))
        is_given = str(value) == wanted if wanted else value not in (None, False, 0, "no")
        return f"--{name}={value}" if is_given else ""

    require_makeable_folder("cache_dir", values.get("cache_dir"))
    for flag, other in NEEDS:
        if describe(flag) and other.partition("=")[0] in values and not describe(other):
            raise InputError(f"{describe(flag)}: has no effect without --{other}; give both, or drop it")
    for flag, other in EXCLUDES:
        if describe(flag) and describe(other):
            raise InputError(f"{describe(flag)} and {describe(other)}: exclude each other; drop one")


def require_makeable_folder(name: str, folder: str | os.PathLike | None) -> None:
    """Refuse a folder that is none, or that cannot be made or written. Makes nothing that stays."""
    if folder is None:
        return
    existing = Path(folder).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"--{name}={folder}: {existing} is a file, so the folder cannot be written; give another")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--{name}={folder}: cannot be written ({error.strerror}); give another folder") from error


def require_possible_training(training: TrainingArguments) -> None:
    """Refuse flags of the Trainer that can never be right, and of which it would only speak when the data are prepared.

    Raises:
        InputError: naming the flags.
    """
    if training.fsdp and training.world_size == 1:
        raise InputError("--fsdp: this is one process; start several with torchrun or `accelerate launch`, or drop it")
    optimizer = make_optimizer_of_one_weight(training)
    warms_up_itself = optimizer is None or "warmup_steps" in optimizer.param_groups[0]  # schedule-free ones do
    if training.lr_scheduler_type == "constant" and training.warmup_steps and not warms_up_itself:
        raise InputError(
            f"--warmup_steps={training.warmup_steps}: has no effect with --lr_scheduler_type constant; give constant_with_warmup"
        )
    plan = training.resolve() if isinstance(training, V0InitArguments) else V0Plan()
    if optimizer is not None and plan.init != "zeros":
        moments = SecondMoment(optimizer)
        if plan.decay == "linear":
            moments.require_linear_decay()
    num_steps = training.max_steps if training.max_steps > 0 else 1000
    options = training.lr_scheduler_kwargs or {}
    try:
        get_scheduler(
            training.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
            training.get_warmup_steps(num_steps),
            num_steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"--lr_scheduler_type={training.lr_scheduler_type.value} with --lr_scheduler_kwargs={options}: {error}"
        ) from error


def make_optimizer_of_one_weight(training: TrainingArguments) -> torch.optim.Optimizer | None:
    """Make the Trainer's optimizer for a matrix of one weight; None for one that needs a device or the whole model."""
    if getattr(training, "v0_optimizer", None) is not None or training.deepspeed:
        return None
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training)
        return optimizer_class([torch.nn.Parameter(torch.zeros(1, 1))], **options)
    except Exception as error:  # of many kinds, each optimizer's own
        if training.optim_args is None and not isinstance(error, ImportError):
            return None
        raise InputError(f"--optim={training.optim} with --optim_args={training.optim_args}: {error}") from error


def require_available_metric(training: TrainingArguments, names: Iterable[str]) -> None:
    """Refuse a `metric_for_best_model` that the script's evaluations, which give `names`, will not produce."""
    name = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if name not in (*names, *SPEED_METRICS):
        raise InputError(f"--metric_for_best_model={name}: the evaluation of this run gives {', '.join(names)}")


def choose_better_direction(training: TrainingArguments, was_given: bool) -> None:
    """Set `greater_is_better` where the user did not: the Trainer takes more of anything but a loss for better."""
    if training.metric_for_best_model is not None and not was_given:
        name = training.metric_for_best_model.removeprefix("eval_")
        training.greater_is_better = not (name.endswith("loss") or name in LOWER_IS_BETTER)


def join_lines(message: str) -> str:
    """`message` with every run of white space, line breaks included, as one space."""
    return " ".join(message.split())
