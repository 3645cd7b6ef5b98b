"""`--help` and `--help_all`: the flags in groups, each once, with examples on top."""

from __future__ import annotations

import argparse
import dataclasses
import re
import textwrap
import typing
from collections.abc import Sequence

from transformers import TrainingArguments

from ..settings import V0InitArguments

HELP_FLAGS = ("-h", "--help")
HELP_ALL_FLAGS = ("--help_all", "--help-all")

WIDTH = 120
FLAG_WIDTH = 34
LONGEST_TRAINING_HELP = 160  # characters; transformers' own texts run to paragraphs

GROUPS = {
    "model": "which model, which tokenizer",
    "data": "what it is trained and measured on",
    "training": "how long, how fast, what is kept",
    "v0": "how Adam's second moment starts",
    "generation": "how text is generated",
}
GENERATION_FLAGS = {
    "num_beams", "length_penalty", "no_repeat_ngram_size", "min_length", "num_return_sequences", "max_length_a", "max_length_b",
    "forced_bos_token", "predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config",
    "sample_prompt", "max_new_tokens", "num_sample_translations", "val_max_target_length", "sacrebleu_tokenize",
    "sacrebleu_lowercase",
}  # fmt: skip
MODEL_FLAGS = {"cache_dir", "model_revision", "token", "trust_remote_code"}
COMMON_TRAINING_FLAGS = {
    "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "label_smoothing_factor", "eval_strategy", "eval_steps", "eval_on_start", "save_strategy", "save_steps",
    "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "logging_steps", "seed",
    "data_seed", "use_cpu", "bf16", "fp16", "tf32", "torch_compile", "gradient_checkpointing", "dataloader_num_workers",
    "report_to", "run_name", "disable_tqdm", "log_level", "push_to_hub", "hub_model_id", "hub_token",
}  # fmt: skip


def compose_help(
    parser: argparse.ArgumentParser, dataclass_types: Sequence[type], program: str, examples: str, everything: bool
) -> str:
    """Compose the help page.

    Args:
        parser: with all flags, for their defaults and texts.
        dataclass_types: whose fields they are.
        program: name of the script, for the first line.
        examples: commands to show on top, one a line.
        everything: all of the Trainer's flags, with the whole of their texts, not the common ones alone.

    Returns:
        The text, lines of at most 120 characters.
    """
    groups: dict[str, list[argparse.Action]] = {name: [] for name in GROUPS}
    places = {f.name: choose_group(f.name, t) for t in dataclass_types for f in dataclasses.fields(t)}
    shown = set()
    num_left_out = 0
    for action in parser._actions:
        if action.dest in shown or action.dest not in places:
            continue
        shown.add(action.dest)
        if not everything and is_seldom_used(action.dest, dataclass_types):
            num_left_out += 1
            continue
        groups[places[action.dest]].append(action)
    lines = [f"usage: {program} [FILE.yaml | FILE.json] --flag value ...", ""]
    lines += ["FILE holds flags as a mapping; flags on the command line override it.", ""]
    if examples:
        lines += ["examples:", *(f"  {line.rstrip()}" for line in examples.strip().splitlines()), ""]
    for name, actions in groups.items():
        if actions:
            lines.append(f"{name}: {GROUPS[name]}")
            for action in actions:
                lines += _compose_flag(action, is_short=not everything and name == "training")
            lines.append("")
    if num_left_out:
        lines.append(
            f"--help_all lists {num_left_out} more flags of transformers' TrainingArguments, and the texts in full."
        )
    return "\n".join(lines).rstrip() + "\n"


def choose_group(name: str, dataclass_type: type) -> str:
    """Return the group of a flag: by its name where that tells, else by the dataclass it belongs to."""
    if name in GENERATION_FLAGS:
        return "generation"
    if name in V0InitArguments.__dataclass_fields__:
        return "v0"
    if name in MODEL_FLAGS or "Model" in dataclass_type.__name__:
        return "model"
    is_data = any(word in dataclass_type.__name__ for word in ("Data", "Quality")) and name != "overwrite_output_dir"
    return "data" if is_data else "training"


def is_seldom_used(name: str, dataclass_types: Sequence[type]) -> bool:
    """Whether a flag is one of transformers' own that `--help` leaves to `--help_all`."""
    owners = [t for t in dataclass_types if name in t.__dataclass_fields__]
    of_trainer = all(issubclass(t, TrainingArguments) for t in owners)
    return of_trainer and name not in V0InitArguments.__dataclass_fields__ and name not in (
        COMMON_TRAINING_FLAGS | GENERATION_FLAGS
    )  # fmt: skip


def _compose_flag(action: argparse.Action, is_short: bool) -> list[str]:
    text = " ".join((action.help or "").replace("%%", "%").split())
    if is_short:
        text = re.split(r"(?<=[.:;])\s", text.replace("`", ""), maxsplit=1)[0].rstrip(":;")
        if len(text) > LONGEST_TRAINING_HELP:
            text = text[: LONGEST_TRAINING_HELP - 4].rsplit(" ", 1)[0] + " ..."
    default = getattr(action.default, "value", action.default)
    if "efault" not in text and default not in (None, "", [], {}) and default is not argparse.SUPPRESS:
        text = f"{text.rstrip('.')}. Default: {default}." if text else f"Default: {default}."
    head = f"  --{action.dest} {_name_value(action)}".rstrip()
    body = textwrap.wrap(text, WIDTH - FLAG_WIDTH) or [""]
    if len(head) >= FLAG_WIDTH:
        return [head, *(" " * FLAG_WIDTH + line for line in body)]
    return [f"{head:<{FLAG_WIDTH}}{body[0]}".rstrip(), *(" " * FLAG_WIDTH + line for line in body[1:])]


def _name_value(action: argparse.Action) -> str:
    if action.choices is not None:
        names = [str(getattr(choice, "value", choice)) for choice in action.choices]
        return "{" + ",".join(names) + "}" if len(names) <= 4 and sum(map(len, names)) < 40 else "NAME"
    if action.nargs == "?":
        return ""
    kind = getattr(action.type, "__name__", "") if not typing.get_args(action.type) else ""
    word = {"int": "N", "float": "X", "str": "TEXT"}.get(kind, "VALUE")
    return f"{word} ..." if action.nargs == "+" else word
