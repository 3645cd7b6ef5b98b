"""What surrounds a training script: its flags, its log, its exit status. Knows no task and no model."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging as transformers_logging

from hf_v0init import InputError

from ..yaml_file import read_mapping
from .help_page import HELP_FLAGS, compose_help
from .value_checks import choose_better_direction, join_lines, require_possible_flags, require_possible_training

logger = logging.getLogger("hf_v0init")

CONFIG_FILE_SUFFIXES = (".yaml", ".yml", ".json")
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# How long another process waits for the main one to report the same error first. The launcher ends this
# process as soon as the main one has exited, so the wait is only served in full if the main one is well.
SECONDS_FOR_MAIN_PROCESS_TO_REPORT = 10.0


# ---- flags -------------------------------------------------------------------------------------------------------------


def flag(default, text: str, **metadata):
    """Return a dataclass field that becomes a flag with this help text."""
    return field(default=default, metadata={"help": text, **metadata})


class _OneLineParser(HfArgumentParser):
    """`HfArgumentParser` whose complaints are an `InputError` and whose flags cannot be abbreviated."""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(re.sub(r"^argument (--\w+)\S*:", r"\1:", join_lines(message)))


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
        argv: `[FILE] --flag value ...`. FILE (.yaml, .yml or .json) holds flags as a flat mapping; flags on the command line
            override it. In FILE, `1e-3` is a number (plain YAML reads text), `no` is the choice "no" where a flag has such a
            choice, and `null` stands for the flag's default.
        examples: commands that `--help` shows on top, one a line, with `{}` for the program.

    Returns:
        A tuple of instances, in the order of `dataclass_types`. `--help` prints and exits with status 0.

    Raises:
        InputError: FILE cannot be read; an unknown flag; a value of the wrong type, not among the choices, or that can never
            be right; whatever the dataclasses' own checks refuse; several processes that were started together but are not
            joined.
    """
    argv, parser = list(argv), make_parser(dataclass_types)
    if {*HELP_FLAGS} & {*argv}:
        program = "hf-v0init " + sys.argv[0].split()[-1] if " " in sys.argv[0] else Path(sys.argv[0]).name
        say(compose_help(parser, dataclass_types, program, examples).rstrip())
        raise SystemExit(0)
    values = {}
    if argv and not argv[0].startswith("-"):
        values = read_configuration_file(argv.pop(0))
    tokens = [*_turn_values_into_flags(parser, values), *argv]
    _require_deepspeed_mapping(tokens)
    unknown = parser.parse_known_args(tokens)[1]
    if unknown:  # before what the known ones rule out
        close = difflib.get_close_matches(unknown[0].split("=")[0], list(parser._option_string_actions), n=1)
        suggestion = f"; did you mean {close[0]}?" if close else ";"
        raise InputError(
            f"unknown: {' '.join(unknown)}{suggestion} --help lists the flags of the script and the Trainer's common ones"
        )
    try:
        parsed = parser.parse_args_into_dataclasses(tokens, look_for_args_file=False)
        given = {token.split("=")[0].lstrip("-").replace("-", "_") for token in tokens if token.startswith("--")}
        require_possible_flags(parsed)
        for arguments in parsed:
            if isinstance(arguments, TrainingArguments):
                _finish_training_arguments(arguments, given)
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:  # an InputError is a ValueError
        raise InputError(join_lines(str(error)) or type(error).__name__) from error
    return tuple(parsed)


def _require_deepspeed_mapping(tokens: list[str]) -> None:
    """Refuse a DeepSpeed file that `TrainingArguments` would meet with a traceback."""
    words = [word for token in tokens for word in token.split("=", 1)]
    path = Path(words[words.index("--deepspeed") + 1]) if "--deepspeed" in words[:-1] else None
    if path is not None and path.is_file() and not path.read_text(encoding="utf-8").lstrip().startswith("{"):
        raise InputError(f"--deepspeed={path}: must hold one JSON object of settings")


def _finish_training_arguments(training: TrainingArguments, given: set[str]) -> None:
    """Check the Trainer's flags, and choose what the user left open."""
    training._v0_is_taken = True  # the Trainers of the scripts heed the flags of v0
    require_possible_training(training)
    choose_better_direction(training, was_given="greater_is_better" in given)
    _require_joined_processes(training)
    try:
        for make_tracker in get_reporting_integration_callbacks(
            training.report_to
        ):  # refuses a name that it does not know
            make_tracker()
    except RuntimeError as error:  # of a tracker that is not installed
        raise InputError(f"--report_to={' '.join(training.report_to)}: {error}") from error
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
        InputError: another suffix, missing or unreadable file, bad syntax, no flat mapping.
    """
    path = Path(path)
    if path.suffix.lower() not in CONFIG_FILE_SUFFIXES:
        raise InputError(f"{str(path)!r}: is neither a --flag with its value nor a file of flags (.yaml, .yml, .json)")
    named: dict[str, Any] = {}
    for key, value in read_mapping(path).items():
        name = key.lstrip("-").replace("-", "_")
        if name in named:
            raise InputError(
                f"the file of flags {path}: {name!r} is given twice, with - and with _; remove one of the two"
            )
        named[name] = value
    return named


def _turn_values_into_flags(parser: HfArgumentParser, values: dict[str, Any]) -> list[str]:
    """Command-line tokens for the values of a file; None becomes the flag's default."""
    actions = {action.dest: action for action in parser._actions}
    tokens = []
    for key, value in values.items():
        choices = [getattr(choice, "value", choice) for choice in getattr(actions.get(key), "choices", None) or ()]
        if value is None and key in actions:
            parser.set_defaults(**{key: None})
        elif isinstance(value, list):
            tokens += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            tokens.append(f"--{key}={json.dumps(value)}")
        else:
            tokens.append(f"--{key}={'no' if value is False and 'no' in choices else value}")
    return tokens


# ---- exit status -------------------------------------------------------------------------------------------------------


class NothingToDoError(Exception):
    """The run that is asked for has been made; the message says where. Ends a script with status 0."""


def run_script(main: Callable[[list[str]], Any]) -> None:
    """Call `main(sys.argv[1:])` and turn bad input into one line on stderr and exit status 2.

    `InputError` ends with `error: ...` and status 2, Ctrl-C with one line and status 130, `NothingToDoError` with its message
    on stdout and status 0; every other exception is a defect and keeps its traceback. With several processes the main one prints
    the line; another one prints only if the main process has not failed too (a file that one machine lacks).
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
