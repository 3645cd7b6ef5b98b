"""`--help`: the flags in groups, each once, with examples on top; of the Trainer's flags the common ones.

The commands print `--help` from a file of `help/`, so that it needs neither torch nor an extra; `python -m hf_v0init.cli.scripts`
writes these files anew, and a test compares them with the flags.
"""

from __future__ import annotations

import argparse
import copy
import re
import textwrap
from collections.abc import Sequence

from transformers import TrainingArguments

from hf_v0init import V0InitArguments

HELP_FLAGS = ("-h", "--help")
WIDTH, FLAG_WIDTH = 80, 30
COMMON_TRAINING_FLAGS = {
    "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "label_smoothing_factor", "eval_strategy", "eval_steps", "eval_on_start", "save_strategy", "save_steps",
    "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "logging_steps", "seed",
    "data_seed", "use_cpu", "bf16", "fp16", "tf32", "torch_compile", "gradient_checkpointing", "dataloader_num_workers",
    "report_to", "run_name", "disable_tqdm", "log_level", "push_to_hub", "hub_model_id", "hub_token", "predict_with_generate",
}  # fmt: skip
TAIL = """
More flags of the Trainer:
https://huggingface.co/docs/transformers/main_classes/trainer"""


def compose_help(parser: argparse.ArgumentParser, dataclass_types: Sequence[type], program: str, examples: str) -> str:
    """Compose the help page.

    Args:
        parser: with all flags, for their defaults and texts.
        dataclass_types: whose fields they are; each makes a group named by its docstring's first line.
        program: what is typed, such as "hf-v0init clm".
        examples: commands to show on top, one a line; `{}` stands for the program.

    Returns:
        The text, lines of at most 80 characters where words allow.
    """
    actions = {action.dest: action for action in reversed(parser._actions)}
    ours = set(V0InitArguments.__dataclass_fields__)
    joined = examples.replace("{}", program).replace("\\\n", "").strip()
    commands = [_wrap_command(" ".join(line.split())) for line in joined.splitlines()]
    head = [
        f"usage: {program} [FILE.yaml | FILE.json] --flag value ...\n",
        "FILE holds flags as a mapping; flags on the command line override it.\n",
        *(["examples:", *commands, ""] if commands else []),
    ]
    page = argparse.HelpFormatter(program, max_help_position=FLAG_WIDTH, width=WIDTH)
    shown: set[str] = set()
    for kind in dataclass_types:
        names = [name for name in kind.__dataclass_fields__ if name in actions and name not in shown]
        shown.update(names)
        groups = {(kind.__doc__ or kind.__name__).strip().splitlines()[0].rstrip("."): names}
        if issubclass(kind, TrainingArguments):
            common = COMMON_TRAINING_FLAGS & getattr(kind, "taken_flags", COMMON_TRAINING_FLAGS)
            groups = {
                "v0: how Adam's second moment starts": [name for name in names if name in ours],
                "training: transformers' own flags": [name for name in names if name in common],
            }
        for title, members in groups.items():
            page.start_section(title)
            page.add_arguments([_describe_flag(actions[name], title.startswith("training")) for name in members])
            page.end_section()
    return "\n".join([*head, page.format_help().strip(), TAIL]) + "\n"


def _wrap_command(line: str) -> str:
    """Break a command before a flag, where a shell goes on reading; a comment into comments."""
    if line.startswith("#"):
        return textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="  # ")
    flags = re.sub(r" (?!-)", "\0", line)  # a flag and its value stay together
    lines = textwrap.wrap(flags, WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return ("  " + " \\\n      ".join(lines)).replace("\0", " ")


def _describe_flag(action: argparse.Action, is_short: bool) -> argparse.Action:
    """The flag as it is shown: by one name, and where its text is short, with the first sentence of it."""
    action = copy.copy(action)
    text = " ".join((action.help or "").split())
    if is_short:
        text = re.split(r"(?<=[.:;])\s", text.replace("`", ""), maxsplit=1)[0].rstrip(":;")
    default = getattr(action.default, "value", action.default)
    if "efault" not in text and default not in (None, "", [], {}) and default is not argparse.SUPPRESS:
        text = f"{text.rstrip('.')}. Default: {default}.".lstrip(". ")
    action.help, action.option_strings = text.replace("%%", "%").replace("%", "%%"), [f"--{action.dest}"]
    if action.choices is not None and len(list(action.choices)) > 4:
        action.choices, action.metavar = None, "NAME"
    elif action.choices is not None:
        action.choices = [str(getattr(choice, "value", choice)) for choice in action.choices]
    elif action.nargs == "?":  # a switch may be given without its value
        action.nargs = 0
    elif action.nargs != 0:
        action.metavar = {"int": "N", "float": "X", "str": "TEXT"}.get(getattr(action.type, "__name__", ""), "VALUE")
    return action
