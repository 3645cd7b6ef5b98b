"""`--help` and `--help_all`: the flags in groups, each once, with examples on top.

The commands print `--help` from a file of `help/`, so that it needs neither torch nor an extra; `python -m hf_v0init.cli.scripts`
writes these files anew, and a test compares them with the flags.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence

from transformers import TrainingArguments

from hf_v0init import V0InitArguments

HELP_FLAGS, HELP_ALL_FLAGS = ("-h", "--help"), ("--help_all", "--help-all")
WIDTH, FLAG_WIDTH = 120, 34
COMMON_TRAINING_FLAGS = {
    "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "label_smoothing_factor", "eval_strategy", "eval_steps", "eval_on_start", "save_strategy", "save_steps",
    "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "logging_steps", "seed",
    "data_seed", "use_cpu", "bf16", "fp16", "tf32", "torch_compile", "gradient_checkpointing", "dataloader_num_workers",
    "report_to", "run_name", "disable_tqdm", "log_level", "push_to_hub", "hub_model_id", "hub_token", "predict_with_generate",
}  # fmt: skip


def compose_help(
    parser: argparse.ArgumentParser, dataclass_types: Sequence[type], program: str, examples: str, everything: bool
) -> str:
    """Compose the help page.

    Args:
        parser: with all flags, for their defaults and texts.
        dataclass_types: whose fields they are; each makes a group named by its docstring's first line.
        program: what is typed, such as "hf-v0init clm".
        examples: commands to show on top, one a line; `{}` stands for the program.
        everything: all of the Trainer's flags with the whole of their texts, not the common ones with their first sentence.

    Returns:
        The text, lines of at most 120 characters.
    """
    actions = {action.dest: action for action in reversed(parser._actions)}
    ours = set(V0InitArguments.__dataclass_fields__)
    lines = [f"usage: {program} [FILE.yaml | FILE.json] --flag value ...", ""]
    lines += ["FILE holds flags as a mapping; flags on the command line override it.", ""]
    if examples:
        lines += [
            "examples:",
            *(f"  {line.rstrip()}" for line in examples.replace("{}", program).strip().splitlines()),
            "",
        ]
    shown, num_left_out = set(), 0
    for kind in dataclass_types:
        of_trainer = issubclass(kind, TrainingArguments)
        names = [name for name in kind.__dataclass_fields__ if name in actions and name not in shown]
        shown.update(names)
        taken = getattr(kind, "taken_flags", None)
        kept = [name for name in names if taken is None or name in taken]
        if of_trainer:
            common = [name for name in kept if name in COMMON_TRAINING_FLAGS or name in ours]
            num_left_out += 0 if everything else len(kept) - len(common)
            kept = kept if everything else common
            groups = {
                "v0: how Adam's second moment starts": [name for name in kept if name in ours],
                "training: transformers' own flags": [name for name in kept if name not in ours],
            }
        else:
            groups = {(kind.__doc__ or kind.__name__).strip().splitlines()[0].rstrip("."): kept}
        for title, members in groups.items():
            lines.append(title)
            for name in members:
                lines += _compose_flag(actions[name], is_short=of_trainer and name not in ours and not everything)
            lines.append("")
    if num_left_out:
        lines.append(
            f"--help_all lists {num_left_out} more flags of transformers' TrainingArguments, and the texts in full."
        )
    return "\n".join(lines).rstrip() + "\n"


def _compose_flag(action: argparse.Action, is_short: bool) -> list[str]:
    text = " ".join((action.help or "").replace("%%", "%").split())
    if is_short:
        text = re.split(r"(?<=[.:;])\s", text.replace("`", ""), maxsplit=1)[0].rstrip(":;")
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
    word = {"int": "N", "float": "X", "str": "TEXT"}.get(getattr(action.type, "__name__", ""), "VALUE")
    return f"{word} ..." if action.nargs == "+" else word
