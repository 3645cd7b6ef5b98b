"""What surrounds a training script: its flags, its log, its exit status. Knows no task and no model."""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import difflib
import json
import logging
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging as transformers_logging

from hf_v0init import InputError

from ..yaml_file import read_mapping
from .full_disk import describe_full_disk
from .help_page import HELP_ALL_FLAGS, HELP_FLAGS, compose_help
from .value_checks import (
    choose_better_direction,
    join_lines,
    require_deepspeed_mapping,
    require_in_range,
    require_possible_training,
)

logger = logging.getLogger("hf_v0init")

CONFIG_FILE_SUFFIXES = (".yaml", ".yml", ".json")
HUB_ERROR_PACKAGES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests")
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_DISK_FULL = 74  # EX_IOERR of sysexits.h
MOST_CHOICES_NAMED = 8
NOTHING = ("None", "null")  # on the command line they take back what FILE says

# How long another process waits for the main one to report the same error first. The launcher ends this
# process as soon as the main one has exited, so the wait is only served in full if the main one is well.
SECONDS_FOR_MAIN_PROCESS_TO_REPORT = 10.0

# Of the run whose flags were read last: where `run_script` looks for a checkpoint when something fails.
_output_dir: contextvars.ContextVar[str | None] = contextvars.ContextVar("output_dir", default=None)


# ---- flags -------------------------------------------------------------------------------------------------------------


def flag(default, text: str, **metadata):
    """Return a dataclass field that becomes a flag with this help text."""
    return field(default=default, metadata={"help": text, **metadata})


class _OneLineParser(HfArgumentParser):
    """`HfArgumentParser` whose complaints are an `InputError` and whose flags cannot be abbreviated."""

    def error(self, message: str) -> typing.NoReturn:
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", join_lines(message))
        found = re.fullmatch(r"--(\w+): invalid choice: (.*) \(choose from (.*)\)", message)
        if found is not None:  # argparse would list all choices, of which some flags have hundreds
            choices = [choice.strip("' ") for choice in found[3].split(",")]
            closest = difflib.get_close_matches(found[2].strip("'").lower(), choices, n=3, cutoff=0.0)
            few = len(choices) <= MOST_CHOICES_NAMED
            known = ", ".join(choices) if few else f"its {len(choices)} choices; the closest are {', '.join(closest)}"
            message = f"--{found[1]}: {found[2]} is none of {known}"
        raise InputError(message)


def make_parser(dataclass_types: Sequence[type]) -> HfArgumentParser:
    """Make the parser whose flags are the fields of these dataclasses."""
    parser = _OneLineParser(dataclass_types, allow_abbrev=False)
    # argparse before Python 3.14 takes -1e-3 for a flag
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    return parser


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str], examples: str = "") -> tuple:
    """Read a script's flags into one instance of each of `dataclass_types`.

    Args:
        dataclass_types: dataclasses whose fields are the flags, as `HfArgumentParser` takes them.
        argv: `[FILE] --flag value ...`. FILE (.yaml, .yml or .json) holds flags as a flat mapping; flags on
            the command line override it, and `--flag=null` takes one back. In FILE, `1e-3` is a number (plain YAML reads
            text), `no` is the choice "no" where a flag has such a choice, and lists and mappings are taken where the flag's
            type has them.
        examples: commands that `--help` shows on top, one a line, with `{}` for the program.

    Returns:
        A tuple of instances, in the order of `dataclass_types`. `--help` and `--help_all` print and exit with status 0.

    Raises:
        InputError: FILE is missing or not a mapping; an unknown flag (the closest valid one is named); a value of the wrong
            type, not among the choices, or that can never be right; whatever the dataclasses' own checks refuse; several
            processes that were started together but are not joined; a tracker that is not installed.
    """
    argv, parser = list(argv), make_parser(dataclass_types)
    if {*HELP_FLAGS, *HELP_ALL_FLAGS} & {*argv}:
        everything = bool({*HELP_ALL_FLAGS} & {*argv})
        program = "hf-v0init " + sys.argv[0].split()[-1] if " " in sys.argv[0] else Path(sys.argv[0]).name
        say(compose_help(parser, dataclass_types, program, examples, everything).rstrip())
        raise SystemExit(0)
    path = argv.pop(0) if argv and not argv[0].startswith("-") else None
    values = {} if path is None else read_configuration_file(path)
    known = {name: kind for t in dataclass_types for name, kind in typing.get_type_hints(t).items()}
    for token in [t for t in argv if t.startswith("--") and t.partition("=")[2] in NOTHING]:
        name = token.partition("=")[0].lstrip("-").replace("-", "_")
        if type(None) in typing.get_args(known.get(name)):
            argv.remove(token)
            values[name] = None
    tokens = _turn_values_into_flags(parser, known, values, path)
    overridden = {token.split("=")[0].lstrip("-").replace("-", "_") for token in argv if token.startswith("--")}
    _require_readable_settings([*tokens, *argv])
    try:
        # Warnings of the dataclasses' own checks stay; what they raise about the values is the user's to fix.
        *parsed, unknown = parser.parse_args_into_dataclasses(
            [*tokens, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except InputError as error:
        name = re.match(r"--(\w+):", str(error))
        from_file = name is not None and name[1] in set(values) - overridden
        raise InputError(f"{path}: {error}" if from_file else str(error)) from None
    except json.JSONDecodeError as error:
        raise InputError(f"the JSON value {error.doc!r} cannot be parsed: {error}") from error
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:
        raise InputError(join_lines(str(error)) or type(error).__name__) from error
    if unknown:
        wrong = next((token for token in unknown if token.startswith("-")), unknown[0])
        if not wrong.startswith("-"):
            raise InputError(
                f"{wrong!r} belongs to no flag: every value follows its --flag (only a file may come first)"
            )
        raise InputError(f"unknown flag {wrong.split('=')[0]}{_suggest_flag(parser, wrong)}")
    for arguments in parsed:
        require_in_range(arguments)
        if isinstance(arguments, TrainingArguments):
            _output_dir.set(arguments.output_dir)
            _finish_training_arguments(arguments, overridden | set(values))
    return tuple(parsed)


def _require_readable_settings(tokens: list[str]) -> None:
    """Refuse a DeepSpeed file that `TrainingArguments` would meet with a traceback."""
    for number, token in enumerate(tokens):
        if token.split("=")[0] == "--deepspeed":
            require_deepspeed_mapping(token.partition("=")[2] or "".join(tokens[number + 1 : number + 2]))


def _finish_training_arguments(training: TrainingArguments, given: set[str]) -> None:
    """Check the Trainer's flags, and choose what the user left open."""
    training._v0_is_taken = True  # the Trainers of the scripts heed the flags of v0
    require_possible_training(training)
    choose_better_direction(training, was_given="greater_is_better" in given)
    _require_joined_processes(training)
    available = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise InputError(f"--report_to={name}: unknown; choose of {known}, none")
        if name not in available and name != "flyte":  # which is never listed
            raise InputError(f"--report_to={name}: is not installed (pip install {name}); or use --report_to none")
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # without effect there, but torch would warn of it
    if "disable_tqdm" not in given and not sys.stderr.isatty():
        training.disable_tqdm = True  # a bar in a log file is a line for every few batches


def _require_joined_processes(training: TrainingArguments) -> None:
    """Refuse processes started together that know nothing of each other: each would write over the others' files."""
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if num_launched > 1 and training.world_size == 1:
        raise InputError(
            f"the launcher started {num_launched} processes, but each of them would train alone; add --use_cpu to "
            "the script's flags (no GPU was found), or start one process"
        )


def read_configuration_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read a flat YAML or JSON mapping of flags.

    Returns:
        Flag names (underscores, no leading dashes) to values as the file has them.

    Raises:
        InputError: another suffix, missing or unreadable file, bad syntax (with its line), a key that is given
            twice, no flat mapping.
    """
    path = Path(path)
    if path.suffix.lower() not in CONFIG_FILE_SUFFIXES:
        raise InputError(
            f"the first argument, {str(path)!r}, is neither a --flag nor a file of flags (.yaml, .yml, .json)"
        )
    named: dict[str, Any] = {}
    for key, value in read_mapping(path).items():
        name = key.lstrip("-").replace("-", "_")
        if name in named:
            raise InputError(
                f"the file of flags {path}: {name!r} is given twice, with - and with _; remove one of the two"
            )
        named[name] = value
    return named


def _turn_values_into_flags(
    parser: HfArgumentParser, hints: dict[str, Any], values: dict[str, Any], path: str | None
) -> list[str]:
    """Command-line tokens for the values of a file; None becomes the flag's default."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    tokens = []
    for key, value in values.items():
        if key not in actions:
            raise InputError(f"{path}: unknown key {key!r}{_suggest_flag(parser, key)}")
        accepted = {typing.get_origin(t) or t for t in typing.get_args(hints[key]) or (hints[key],)}
        takes_lists = typing.get_origin(hints[key]) is list or actions[key].nargs == "+"
        if value is None:
            if type(None) not in accepted:
                raise InputError(f"{path}: --{key} cannot be null; remove the key or give a value")
            parser.set_defaults(**{key: None})
        elif isinstance(value, list) and takes_lists:
            tokens += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict | list) and type(value) not in accepted:
            kind = "list" if isinstance(value, list) else "mapping"
            raise InputError(f"{path}: --{key}: expects a single value, got a {kind}")
        elif isinstance(value, dict | list):
            parser.set_defaults(**{key: value})
            actions[key].required = False
        else:
            choices = [str(getattr(choice, "value", choice)) for choice in actions[key].choices or ()]
            tokens.append(f"--{key}={'no' if value is False and 'no' in choices else value}")
    return tokens


def _suggest_flag(parser: argparse.ArgumentParser, flag_name: str) -> str:
    names = [action.dest for action in parser._actions]
    name = flag_name.split("=")[0].lstrip("-").replace("-", "_")
    closest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean --{closest[0]}?" if closest else "; --help lists the flags"


# ---- exit status -------------------------------------------------------------------------------------------------------


class NothingToDoError(Exception):
    """The run that is asked for has been made; the message says where. Ends a script with status 0."""


def run_script(main: Callable[[list[str]], Any]) -> None:
    """Call `main(sys.argv[1:])` and turn bad input into one line on stderr and exit status 2.

    `InputError` ends with `error: ...` and status 2, Ctrl-C with one line and status 130, a full disk with one line
    that names the newest whole checkpoint and status 74, `NothingToDoError` with its message on stdout and status 0;
    every other exception is a defect and keeps its traceback. With several processes the main one prints the line;
    another one prints only if the main process has not failed too (a file that one machine lacks).
    """
    try:
        main(sys.argv[1:])
    except NothingToDoError as done:
        if int(os.environ.get("RANK", "0")) == 0:
            say(join_lines(str(done)))
    except InputError as error:
        exit_with_line(f"error: {join_lines(str(error))}", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        exit_with_line("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        line = describe_full_disk(error, _output_dir.get())
        if line is None:
            raise
        exit_with_line(f"error: {line}", EXIT_DISK_FULL)


def exit_with_line(line: str, status: int) -> typing.NoReturn:
    """End the process with a line on stderr and this status; not the main process of several: after that one has had its say."""
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(SECONDS_FOR_MAIN_PROCESS_TO_REPORT)
        line = f"{line} (process {rank})"
    sys.stdout.flush()
    say(line, sys.stderr)
    raise SystemExit(status)


def say(line: str, file: typing.TextIO | None = None) -> None:
    """Write a line to the terminal, or to `file`: all that a script says beside its log and its summary."""
    print(line, file=file, flush=True)


@contextlib.contextmanager
def explain_hub_errors(training_args: TrainingArguments) -> Iterator[None]:
    """Around the making of a Trainer: with `--push_to_hub` it makes the repository, and may not be allowed to.

    Raises:
        InputError: instead of the errors of the Hub's client and of its connection; others pass.
    """
    try:
        yield
    except Exception as error:
        from_hub = type(error).__module__.split(".")[0] in HUB_ERROR_PACKAGES
        if not (training_args.push_to_hub and from_hub):
            raise
        raise InputError(
            f"--push_to_hub: the repository cannot be made ({join_lines(str(error))}); check the network, --hub_model_id "
            "and `hf auth login`, or drop the flag and push later"
        ) from error


# ---- the log -----------------------------------------------------------------------------------------------------------


def start_logging(training_args: TrainingArguments) -> None:
    """Log to stdout at `--log_level` on the main process and `--log_level_replica` on the others.

    `--log_level passive` (the default) shows what a user acts on: INFO of this package, WARNING of all others. Progress bars
    of `datasets` and of loading are shown on the main process if stderr is a terminal.
    """
    is_passive = training_args.log_level == "passive"
    level = logging.WARNING if is_passive or not training_args.should_log else training_args.get_process_log_level()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
        level=level,
        force=True,
    )
    logger.setLevel(logging.INFO if is_passive and training_args.should_log else level)
    # One handler for everything: transformers' own would write the same lines to stderr.
    transformers_logging.set_verbosity(level)
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    datasets.utils.logging.set_verbosity(level)
    if not (training_args.should_log and sys.stderr.isatty()):
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()  # of loading weights
        huggingface_hub.utils.disable_progress_bars()
    for talkative in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(talkative).setLevel(max(level, logging.WARNING))
