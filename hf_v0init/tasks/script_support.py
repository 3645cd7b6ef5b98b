"""What the training scripts share around the training: arguments, logging, output folder, exit status.

Nothing here knows a task, a model or the Trainer's internals.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import difflib
import errno
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
import yaml
from datasets.utils import logging as datasets_logging
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..records.checkpoints import describe_passed_over, find_newest_whole, list_checkpoints, require_whole
from .help_page import HELP_ALL_FLAGS, HELP_FLAGS, compose_help
from .value_checks import (
    choose_better_direction,
    join_lines,
    require_findable_names,
    require_makeable_folder,
    require_possible_training,
)

logger = logging.getLogger("hf_v0init")

CONFIG_FILE_SUFFIXES = (".yaml", ".yml", ".json")
HUB_ERROR_PACKAGES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests")
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_DISK_FULL = 74  # EX_IOERR of sysexits.h
STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MOST_CHOICES_NAMED = 8

# How long another process waits for the main one to report the same error first. The launcher ends this
# process as soon as the main one has exited, so the wait is only served in full if the main one is well.
SECONDS_FOR_MAIN_PROCESS_TO_REPORT = 10.0

# Of the run whose flags were read last: where `run_script` looks for a checkpoint when something fails.
_output_dir: contextvars.ContextVar[str | None] = contextvars.ContextVar("output_dir", default=None)


# ---------------------------------------------------------------------------------------------- arguments


class _OneLineParser(HfArgumentParser):
    """`HfArgumentParser` whose complaints are an `InputError` and whose flags cannot be abbreviated."""

    def error(self, message: str) -> typing.NoReturn:
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", join_lines(message))
        raise InputError(_shorten_choices(message))


def _shorten_choices(message: str) -> str:
    """argparse's complaint with the closest few of many choices in place of all of them."""
    found = re.fullmatch(r"--(\w+): invalid choice: (.*) \(choose from (.*)\)", message)
    if found is None:
        return message
    flag, value, choices = found[1], found[2], [choice.strip("' ") for choice in found[3].split(",")]
    if len(choices) <= MOST_CHOICES_NAMED:
        return f"--{flag}: {value} is none of {', '.join(choices)}"
    closest = difflib.get_close_matches(value.strip("'").lower(), choices, n=3, cutoff=0.0)
    return f"--{flag}: {value} is none of its {len(choices)} choices; the closest are {', '.join(closest)}"


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str], examples: str = "") -> tuple:
    """Read a script's flags into one instance of each of `dataclass_types`.

    Args:
        dataclass_types: dataclasses whose fields are the flags, as `HfArgumentParser` takes them.
        argv: `[FILE] --flag value ...`. FILE (.yaml, .yml or .json) holds flags as a flat mapping; flags on
            the command line override it. In FILE, `1e-3` is a number (plain YAML reads text), `no` is the
            choice "no" where a flag has such a choice, `null` is None, and lists and mappings are taken
            where the flag's type has them.
        examples: commands that `--help` shows on top, one a line.

    Returns:
        A tuple of instances, in the order of `dataclass_types`. `--help` and `--help_all` print and exit with status 0.

    Raises:
        InputError: FILE is missing or not a mapping; an unknown flag (the closest valid one is named); a
            value of the wrong type, not among the choices, or that can never be right; whatever the
            dataclasses' own checks refuse; a model, tokenizer or data set that is neither a folder nor a name of
            the Hub; several processes that were started together but are not joined; a tracker that is not
            installed.
    """
    argv = list(argv)
    parser = _OneLineParser(dataclass_types, allow_abbrev=False)
    # argparse before Python 3.14 takes -1e-3 for a flag
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    if {*HELP_FLAGS, *HELP_ALL_FLAGS} & {*argv}:
        everything = bool({*HELP_ALL_FLAGS} & {*argv})
        print(compose_help(parser, dataclass_types, Path(sys.argv[0]).name, examples, everything), end="")
        raise SystemExit(0)
    path, tokens, keys_in_file = None, [], set()
    if argv and not argv[0].startswith("-"):
        path = argv.pop(0)
        values = read_configuration_file(path)
        tokens = _turn_values_into_flags(parser, dataclass_types, values, path)
        keys_in_file = set(values)

    overridden = {token.split("=")[0].lstrip("-").replace("-", "_") for token in argv if token.startswith("--")}
    try:
        # Warnings of the dataclasses' own checks stay; what they raise about the values is the user's to fix.
        *parsed, unknown = parser.parse_args_into_dataclasses(
            [*tokens, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except InputError as error:
        flag = re.match(r"--(\w+):", str(error))
        from_file = flag is not None and flag[1] in keys_in_file - overridden
        raise InputError(f"{path}: {error}" if from_file else str(error)) from None
    except json.JSONDecodeError as error:
        raise InputError(f"the JSON value {error.doc!r} cannot be parsed: {error}") from error
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise InputError(join_lines(str(error)) or type(error).__name__) from error
    if unknown:
        flag = next((token for token in unknown if token.startswith("-")), unknown[0])
        if not flag.startswith("-"):
            raise InputError(
                f"{flag!r} belongs to no flag: every value follows its --flag (only a file may come first)"
            )
        raise InputError(f"unknown flag {flag.split('=')[0]}{_suggest_flag(parser, flag)}")
    given = overridden | keys_in_file
    for arguments in parsed:
        require_findable_names(arguments)
        require_makeable_folder("cache_dir", getattr(arguments, "cache_dir", None))
        if isinstance(arguments, TrainingArguments):
            _output_dir.set(arguments.output_dir)
            require_possible_training(arguments)
            choose_better_direction(arguments, was_given="greater_is_better" in given)
            _require_joined_processes(arguments)
            _require_installed_trackers(arguments)
            if arguments.device.type == "cpu":
                arguments.dataloader_pin_memory = False  # without effect there, but torch would warn of it
            if "disable_tqdm" not in given and not sys.stderr.isatty():
                arguments.disable_tqdm = True  # a bar in a log file is a line for every few batches
    return tuple(parsed)


def _require_joined_processes(training_args: TrainingArguments) -> None:
    """Refuse processes that a launcher started together but that know nothing of each other.

    It happens on machines without a GPU: each would do the whole training and write over the others' files.
    """
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if num_launched > 1 and training_args.world_size == 1:
        raise InputError(
            f"the launcher started {num_launched} processes, but each of them would train alone; add --use_cpu to "
            "the script's flags (no GPU was found), or start one process"
        )


def _require_installed_trackers(training_args: TrainingArguments) -> None:
    available = get_available_reporting_integrations()
    for name in training_args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(
                f"--report_to={name}: unknown; choose of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, none"
            )
        if name not in available and name != "flyte":  # which is never listed
            raise InputError(f"--report_to={name}: is not installed (pip install {name}); or use --report_to none")


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
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=_make_mapping)
        else:
            values = yaml.load(text, Loader=_StrictLoader)
    except OSError as error:
        raise InputError(f"cannot read the file of flags {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the file of flags {path} is not UTF-8 (byte {error.start})") from error
    except _DuplicateKeyError as error:
        raise InputError(f"the file of flags {path}: {error}") from error
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(f"the file of flags {path} cannot be parsed: {join_lines(str(error))}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"the file of flags {path} must be a mapping of flag names to values")
    try:
        return _make_mapping([(key.lstrip("-").replace("-", "_"), value) for key, value in values.items()])
    except _DuplicateKeyError as error:
        raise InputError(f"the file of flags {path}: {error}") from error


class _DuplicateKeyError(Exception):
    """A key that stands twice; the message says where."""


def _make_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise _DuplicateKeyError(f"{key!r} is given twice; remove one of the two")
        mapping[key] = value
    return mapping


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, that does not take the last of several values of one key in silence."""

    def construct_mapping(self, node, deep=False):
        """Construct a mapping whose keys are different ones."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, str) and key in lines:
                raise _DuplicateKeyError(
                    f"{key!r} is given twice, in lines {lines[key]} and {line}; remove one of the two"
                )
            if isinstance(key, str):
                lines[key] = line
        return super().construct_mapping(node, deep)


def _turn_values_into_flags(
    parser: HfArgumentParser, dataclass_types: Sequence[type], values: dict[str, Any], path: str
) -> list[str]:
    """Command-line tokens for the values of a file; what a token cannot carry becomes the flag's default."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    hints = {}
    for dataclass_type in dataclass_types:
        hints.update(typing.get_type_hints(dataclass_type))
    tokens = []
    for key, value in values.items():
        if key not in actions:
            raise InputError(f"{path}: unknown key {key!r}{_suggest_flag(parser, key)}")
        accepted = {typing.get_origin(t) or t for t in typing.get_args(hints[key]) or (hints[key],)}
        action = actions[key]
        if value is None:
            if type(None) not in accepted:
                raise InputError(f"{path}: --{key} cannot be null; remove the key or give a value")
            parser.set_defaults(**{key: None})
        elif isinstance(value, dict | list):
            if isinstance(value, list) and typing.get_origin(hints[key]) is list:
                convert = typing.get_args(hints[key])[0]
                try:
                    value = [convert(element) for element in value]
                except (TypeError, ValueError) as error:
                    raise InputError(f"{path}: --{key}: {join_lines(str(error))}") from error
            elif type(value) not in accepted:
                kind = "list" if isinstance(value, list) else "mapping"
                raise InputError(f"{path}: --{key}: expects a single value, got a {kind}")
            parser.set_defaults(**{key: value})
            action.required = False
        else:
            if isinstance(value, bool) and _has_choice_no(action):
                value = "no" if value is False else value
            tokens.append(f"--{key}={value}")
    return tokens


def _has_choice_no(action: argparse.Action) -> bool:
    return action.choices is not None and "no" in [str(getattr(c, "value", c)) for c in action.choices]


def _suggest_flag(parser: argparse.ArgumentParser, flag: str) -> str:
    names = [action.dest for action in parser._actions]
    name = flag.split("=")[0].lstrip("-").replace("-", "_")
    closest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean --{closest[0]}?" if closest else "; --help lists the flags"


# ----------------------------------------------------------------------------------------------- exit status


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
            print(join_lines(str(done)))
    except InputError as error:
        _exit_with_line(f"error: {join_lines(str(error))}", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        _exit_with_line("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        line = describe_full_disk(error, _output_dir.get())
        if line is None:
            raise
        _exit_with_line(f"error: {line}", EXIT_DISK_FULL)


def describe_full_disk(error: BaseException, output_dir: str | None) -> str | None:
    """Describe in one line an error that comes of a full disk, a quota or a limit on files; None for other errors.

    Args:
        output_dir: the run's, whose newest whole checkpoint is named.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    reason = next((reason for link in chain if (reason := _find_storage_reason(link))), None)
    if reason is None:
        return None
    line = f"{reason}; free some, and give the same command again"
    newest = None
    if output_dir is not None and Path(output_dir).is_dir():
        newest, _ = find_newest_whole(list_checkpoints(output_dir))
    return f"{line}: it goes on from {newest}, which is whole" if newest else f"{line} (no checkpoint was saved yet)"


def _find_storage_reason(error: BaseException) -> str | None:
    text = join_lines(str(error))
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        at = f" at {error.filename}" if error.filename else ""
        return f"{os.strerror(error.errno).lower()}{at}"
    for number in STORAGE_ERRNOS:  # the Rust of safetensors, and Arrow, put the error of the system into words
        if os.strerror(number) in text or f"os error {number})" in text or f"code: {number}," in text:
            return os.strerror(number).lower()
    if isinstance(error, RuntimeError) and re.search(
        "PytorchStreamWriter failed|inline_container|unexpected pos", text
    ):
        return "a file could not be written to its end, so there is no space left on the disk, or a quota is used up"
    return None


def _exit_with_line(line: str, status: int) -> typing.NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(SECONDS_FOR_MAIN_PROCESS_TO_REPORT)
        line = f"{line} (process {rank})"
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(status)


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


# -------------------------------------------------------------------------------------------- output folder


def require_writable_output(path: str | os.PathLike, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written or that holds something else. Creates nothing.

    Args:
        path: the folder; it need not exist.
        overwrite: that the folder may hold files (the user asked to overwrite, or the run resumes from it).

    Raises:
        InputError: not a folder, not writable, or not empty without `overwrite`.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"the output folder {path} is a file; give another --output_dir")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(
            f"the output folder {path} is not empty; give another --output_dir or --overwrite_output_dir, "
            "or resume with --resume_from_checkpoint"
        )
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"the output folder {path} cannot be written ({error.strerror}); give another --output_dir"
        ) from error


def find_checkpoint_to_resume(training_args: TrainingArguments, overwrite: bool) -> str | None:
    """The checkpoint folder this run continues from, or None for a fresh start; checks the output folder.

    `--resume_from_checkpoint FOLDER` is taken as given and `--resume_from_checkpoint true` means the newest
    whole checkpoint of the output folder. Without either, an output folder with checkpoints is continued from
    its newest whole one, unless `overwrite`. Checkpoints whose save was cut off are passed over with a warning;
    if there are only such, the run starts anew in the same folder.

    Raises:
        InputError: the checkpoint does not exist or is not whole, or `require_writable_output` refuses the folder.
    """
    output_dir = Path(training_args.output_dir)
    wanted = training_args.resume_from_checkpoint
    if wanted in ("false", "False", False):
        wanted = None
    checkpoints = list_checkpoints(output_dir)
    continues = wanted is not None or (bool(checkpoints) and not overwrite)
    if wanted in ("true", "True", True) and not checkpoints:
        raise InputError(f"--resume_from_checkpoint: {output_dir} holds no checkpoint-* folder")
    if wanted not in (None, "true", "True", True):
        if not Path(wanted).is_dir():
            raise InputError(
                f"--resume_from_checkpoint: there is no folder {wanted}; give a checkpoint-* folder, or 'true' "
                "for the last one of --output_dir"
            )
        require_whole(wanted, list_checkpoints(Path(wanted).absolute().parent))
    elif continues:
        was_asked_for = wanted is not None
        wanted, passed_over = find_newest_whole(checkpoints)
        if passed_over and training_args.process_index == 0:
            logger.warning(describe_passed_over(passed_over, wanted))
        if wanted is not None and not was_asked_for and training_args.process_index == 0:
            logger.warning(
                f"{output_dir} holds checkpoints of this run: it goes on from {Path(wanted).name}; to start anew instead, give "
                "--overwrite_output_dir or another --output_dir"
            )
    require_writable_output(output_dir, overwrite=overwrite or continues)
    return wanted


def remove_old_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """Delete the `checkpoint-*` folders of an earlier run, so that neither resume nor averaging meets them.

    For a fresh run into a folder that the user said may be overwritten; call it on the main process only.

    Returns:
        The names of the deleted folders, sorted.
    """
    output_dir = Path(output_dir)
    folders = sorted(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) if output_dir.is_dir() else []
    folders = [folder for folder in folders if folder.is_dir() and folder.name.split("-")[-1].isdigit()]
    for folder in folders:
        shutil.rmtree(folder)
    return [folder.name for folder in folders]


class RemoveOldCheckpoints(TrainerCallback):
    """Removes an earlier run's checkpoints when nothing stands between this run and its first step any more.

    Add it last, so that it is called when v0 has been written: a run that is refused costs the user nothing.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Remove them, on the main process."""
        if state.is_world_process_zero:
            remove_old_checkpoints(args.output_dir)


# ---------------------------------------------------------------------------------------------------- logging


def start_logging(training_args: TrainingArguments) -> None:
    """Log to stdout at `--log_level` on the main process and `--log_level_replica` on the others.

    `--log_level passive` (the default) means INFO for the scripts and for transformers, as in transformers'
    own examples; `datasets` speaks from WARNING on unless a level is given. Its progress bars are shown on
    the main process if stderr is a terminal.
    """
    if training_args.should_log and training_args.log_level == "passive":
        transformers_logging.set_verbosity_info()
    level = training_args.get_process_log_level()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
        level=level,
        force=True,
    )
    # One handler for everything: transformers' own would write the same lines to stderr.
    transformers_logging.set_verbosity(level)
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    at_least_warning = max(level, logging.WARNING)
    datasets_logging.set_verbosity(at_least_warning if training_args.log_level == "passive" else level)
    if not (training_args.should_log and sys.stderr.isatty()):
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()  # of loading weights
        huggingface_hub.utils.disable_progress_bars()
    for talkative in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(talkative).setLevel(at_least_warning)
