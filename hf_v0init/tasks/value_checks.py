"""Refuses flags whose value can never be right, for all scripts, before anything is read.

Of the Trainer's flags only what transformers lets through and what would then cost a run, or end in a traceback, is checked here.
"""

from __future__ import annotations

import difflib
import json
import math
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

# What is allowed, in words and as a test, an example, and the flags of which it holds; None may always stand.
COUNT = (
    "a whole number, 1 or more",
    lambda x: x == int(x) and x >= 1,
    "8",
)  # all whole numbers of the scripts' own flags, too
RANGES = (
    (
        "a finite number, 0 or more", lambda x: x >= 0, "1e-3",
        ("learning_rate", "adam_epsilon", "weight_decay", "max_grad_norm", "eval_delay", "early_stopping_threshold", "warmup_init_lr", "min_lr",
         "max_length_a"),
    ),
    ("a finite number", lambda x: True, "0.6", ("length_penalty",)),
    ("a finite number above 0", lambda x: x > 0, "3", ("num_train_epochs", "neftune_noise_alpha")),
    (
        *COUNT,
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "eval_accumulation_steps",
         "save_total_limit", "dataloader_prefetch_factor", "generation_max_length", "generation_num_beams"),
    ),
    (
        "a whole number, 0 or more", lambda x: x == int(x) and x >= 0, "2",
        ("dataloader_num_workers", "num_sample_translations", "max_length_b"),
    ),
    (
        "a whole number, 1 or more, or left out to train for --num_train_epochs",
        lambda x: x == -1 or (x == int(x) and x >= 1), "1000", ("max_steps",),
    ),
    (
        "a number of steps of 1 or more, or a share of the run between 0 and 1", lambda x: x > 0 and (x < 1 or x == int(x)), "100",
        ("logging_steps", "save_steps", "eval_steps"),
    ),
    (
        "0, a number of steps of 1 or more, or a share of the run between 0 and 1",
        lambda x: x >= 0 and (x < 1 or x == int(x)), "500", ("warmup_steps",),
    ),
    ("at least 0 and less than 1", lambda x: 0 <= x < 1, "0.9", ("adam_beta1", "adam_beta2", "label_smoothing_factor")),
    ("above 0 and less than 1", lambda x: 0 < x < 1, "0.15", ("mlm_probability", "lr_decay_factor")),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "0.875", ("crop_fraction",)),
    ("above 0 and less than 100", lambda x: 0 < x < 100, "5", ("validation_split_percentage",)),
    (f"a whole number from 0 to {LARGEST_SEED}", lambda x: 0 <= x <= LARGEST_SEED, "42", ("seed", "data_seed")),
)  # fmt: skip


RULES = {name: tuple(rule) for *rule, names in RANGES for name in names}


def require_in_range(arguments: Any) -> None:
    """Refuse numbers outside the ranges of `RANGES` among the fields of a dataclass of flags.

    Raises:
        InputError: naming the flag, its value, what is allowed and a value that would do.
    """
    own = None if isinstance(arguments, TrainingArguments) else COUNT
    for name, value in vars(arguments).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        rule = RULES.get(name, own if isinstance(value, int) else None)
        if rule is not None and not (math.isfinite(value) and rule[1](value)):
            raise InputError(f"--{name}={value}: must be {rule[0]}, such as {rule[2]}")


def require_makeable_folder(name: str, folder: str | None) -> None:
    """Refuse a folder that is none, or that cannot be made or written. Makes nothing that stays.

    Raises:
        InputError: naming flag and folder.
    """
    if folder is None:
        return
    existing = Path(folder).expanduser().absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"--{name}={folder}: {existing} is a file, so the folder cannot be written; give another")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--{name}={folder}: cannot be written ({error.strerror}); give another folder") from error


def require_possible_training(training: TrainingArguments) -> None:
    """Refuse flags of the Trainer that can never be right: optimizer, schedule, and what excludes each other.

    Raises:
        InputError: naming the flag and the remedy.
    """
    if training.save_strategy == "best" and training.metric_for_best_model is None:
        raise InputError("--save_strategy=best: needs to know by what; add --metric_for_best_model loss, for example")
    if training.save_strategy == "best" and training.eval_strategy == "no":
        raise InputError("--save_strategy=best: saves at evaluations; add --eval_strategy steps, or epoch")
    if training.fsdp and training.world_size == 1:
        raise InputError(
            "--fsdp: shards over several processes, and this is one; start them with torchrun or `accelerate launch`, or drop it"
        )
    _require_usable_optimizer(training)
    _require_usable_schedule(training)


def require_deepspeed_mapping(path: Any) -> None:
    """Refuse a DeepSpeed configuration that is no mapping, which transformers meets with a traceback."""
    if not isinstance(path, str) or not Path(path).is_file():
        return
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"--deepspeed={path}: is not valid JSON ({error}); repair it") from error
    if not isinstance(content, dict):
        raise InputError(
            f"--deepspeed={path}: must hold one JSON object of settings, and holds a {type(content).__name__}"
        )


def _require_usable_optimizer(training: TrainingArguments) -> None:
    """Find out now what the Trainer would say of `optim`, `optim_args` and a v0 for it only after the data are prepared."""
    for part in (training.optim_args or "").replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if training.optim_args and not (key and equals and value):
            raise InputError(f"--optim_args={training.optim_args}: {part!r} is not key=value; write key=value,...")
    if getattr(training, "v0_optimizer", None) is not None or training.deepspeed:
        return
    name = getattr(training.optim, "value", training.optim)
    given = f"--optim={name}" + (f" with --optim_args={training.optim_args}" if training.optim_args else "")
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if "model" in str(error).lower():
            return  # an optimizer that wants to see the model first
        raise InputError(f"{given}: {join_lines(str(error))}; or use --optim adamw_torch") from error
    try:
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1, 1))], **options)
    except (TypeError, ValueError, AssertionError) as error:
        if not training.optim_args:
            return
        raise InputError(f"{given}: {join_lines(str(error))}; or use --optim adamw_torch") from error
    except Exception:  # of an optimizer that needs a device or a whole model: the Trainer will know
        return
    plan = training.resolve() if isinstance(training, V0InitArguments) else V0Plan()
    if plan.init != "zeros":
        moments = SecondMoment(optimizer)
        if plan.decay == "linear":
            moments.require_linear_decay()


def _require_usable_schedule(training: TrainingArguments) -> None:
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    options = training.lr_scheduler_kwargs or {}
    if not isinstance(options, dict):
        raise InputError(f"--lr_scheduler_kwargs={options}: must be JSON such as '{{\"num_cycles\": 2}}'")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate or 1e-3)
    num_steps = training.max_steps if training.max_steps > 0 else 1000
    try:
        get_scheduler(
            name, optimizer, training.get_warmup_steps(num_steps), num_steps, scheduler_specific_kwargs=options
        )
    except (TypeError, ValueError, AssertionError) as error:
        given = f" with --lr_scheduler_kwargs={options}" if options else ""
        raise InputError(
            f"--lr_scheduler_type={name}{given}: {join_lines(str(error))}; see --lr_scheduler_kwargs"
        ) from error


def require_available_metric(
    training: TrainingArguments, names: Iterable[str], missing: dict[str, str] | None = None
) -> None:
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
    closest = difflib.get_close_matches(name, [*names, *missing], n=1, cutoff=0.5)
    hint = missing.get(name) or (f"did you mean {closest[0]}?" if closest else "choose one of these")
    given = f"--metric_for_best_model={training.metric_for_best_model}"
    raise InputError(f"{given}: the evaluation gives {', '.join(names)}; {hint}")


def choose_better_direction(training: TrainingArguments, was_given: bool) -> None:
    """Set `greater_is_better` where the user did not: the Trainer takes more of anything but a loss for better."""
    if training.metric_for_best_model is not None and not was_given:
        name = training.metric_for_best_model.removeprefix("eval_")
        training.greater_is_better = not (name.endswith("loss") or name in LOWER_IS_BETTER)


def join_lines(message: str) -> str:
    """`message` with every run of white space, line breaks included, as one space."""
    return " ".join(message.split())
