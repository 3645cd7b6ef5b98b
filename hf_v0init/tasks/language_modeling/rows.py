"""The rows of a causal language model's data: from the Hub, from local files, or read as a stream while training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import TrainingArguments

from ...errors import InputError
from ..script_stages import DatasetArguments, HubArguments, find_needed_roles, flag, require_positive_counts
from ..text_files import load_local_files
from .samples import list_columns

TABLE_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv"}
MAX_TOKENIZER_TEXTS = 2_000_000  # a vocabulary does not get better from more, but memory runs out
TEXT_COLUMN_FLAGS = ("text_column", "prompt_column", "completion_column")


@dataclass
class DataArguments(DatasetArguments):
    """Which text, and how it is cut.

    Raises:
        InputError: no source of data or two, flags that exclude each other, numbers out of range.
    """

    train_file: str | None = flag(
        None, "Local training data: .json, .jsonl, .csv, or text, one document a line; also .gz."
    )
    validation_file: str | None = flag(None, "The same for validation.")
    test_file: str | None = flag(None, "The same for test.")
    validation_split_percentage: float = flag(
        5.0, "Without validation data, --do_eval takes this percentage from the beginning of the training data."
    )
    text_column: str | None = flag(None, "Column with the text. Default: 'text', else the first column.")
    prompt_column: str | None = flag(
        None, "Column with prompts; needs --completion_column. One sample a row, the loss on the completion only."
    )
    completion_column: str | None = flag(None, "Column with the completions.")
    prompt_prefix: str = flag("", "Text put before every prompt.")
    block_size: int | None = flag(
        None,
        "Tokens of a block, and the longest prompt with completion (longer ones lose the beginning of the prompt). Default: what "
        "model and tokenizer take, at most 1024. awd_lstm: tokens of a segment, through which it back-propagates; 70.",
    )
    vary_block_size: bool = flag(
        False,
        "awd_lstm: draw the segments' lengths anew in every epoch, around --block_size or, 5 in 100, half of it, and scale the "
        "learning rate of each step by its length (Merity et al., section 5). Depends on --seed alone.",
    )
    keep_linebreaks: bool = flag(True, "Text files: keep the line break at the end of every line.")
    append_eos: bool = flag(False, "End every line or row with the tokenizer's end-of-text token.")
    streaming: bool = flag(
        False, "Read the data while training instead of before; needs --max_steps. Nothing is cached."
    )
    shuffle_buffer_size: int | None = flag(
        None, "With --streaming: draw training rows at random from a buffer of this many. Default: in order."
    )
    max_train_samples: int | None = flag(None, "Use only the first so many blocks (or rows) for training.")
    max_eval_samples: int | None = flag(None, "Use only the first so many blocks (or rows) for validation.")
    max_predict_samples: int | None = flag(None, "Use only the first so many blocks (or rows) of the test set.")
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenize. Default: none beside this one.")
    overwrite_cache: bool = flag(False, "Tokenize again although a cached result exists.")

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        require_positive_counts(self)
        files = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name)]
        if self.dataset_name and files:
            raise InputError(f"--dataset_name and --{files[0]}: give one source of data, not both")
        if not self.dataset_name and not files:
            raise InputError("no data: give --dataset_name, or --train_file and --validation_file")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise InputError("--prompt_column and --completion_column: give both or neither")
        if self.prompt_column is None and self.prompt_prefix:
            raise InputError(f"--prompt_prefix={self.prompt_prefix!r}: needs --prompt_column and --completion_column")
        if self.prompt_column is not None and (self.text_column or self.append_eos):
            raise InputError(
                "--text_column and --append_eos: are for running text; drop them, or --prompt_column and "
                "--completion_column"
            )
        smallest = 2 if self.prompt_column is None else 3
        if self.block_size is not None and self.block_size < smallest:
            raise InputError(f"--block_size={self.block_size}: must be {smallest} or more")
        if not 0 < self.validation_split_percentage < 100:
            raise InputError(
                f"--validation_split_percentage={self.validation_split_percentage}: must lie between 0 and 100"
            )
        if self.shuffle_buffer_size and not self.streaming:
            raise InputError(f"--shuffle_buffer_size={self.shuffle_buffer_size}: is for --streaming; drop it")

    def get_limit(self, role: str) -> int | None:
        """Return how many blocks (or rows) of "train", "validation" or "test" are used at most; None: all."""
        return {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_predict_samples}[
            role
        ]


def load_rows(data: DataArguments, hub: HubArguments, training: TrainingArguments) -> dict:
    """Load the rows of each role that the run needs: "train", "validation", "test".

    Returns:
        By role a `datasets.Dataset`, or with `streaming` an `IterableDataset`.

    Raises:
        InputError: data that is missing, cannot be read, has no rows or not the columns named.
    """
    needed = find_needed_roles(training)
    from_hub = data.load_dataset(hub, streaming=data.streaming) if data.dataset_name else {}
    rows = {}
    for role in needed:
        path = getattr(data, f"{role}_file")
        if role in from_hub:
            rows[role] = from_hub[role]
        elif path is not None:
            rows[role] = open_stream(path) if data.streaming else load_local_files(path, role=role)
        elif role != "validation":
            raise InputError(f"there is no {role} data; give --{role}_file, or a data set that has that split")
    if "validation" in needed and "validation" not in rows:
        rows |= split_off_validation(rows.get("train"), data)
    for role, role_rows in rows.items():
        if not data.streaming and len(role_rows) == 0:
            raise InputError(f"the {role} data has no rows; give a file or split with at least one")
        require_columns(role_rows, role, data)
    if "train" in rows and data.shuffle_buffer_size:
        rows["train"] = rows["train"].shuffle(seed=training.seed, buffer_size=data.shuffle_buffer_size)
    return rows


def open_stream(path: str) -> datasets.IterableDataset:
    """Open a local file as a stream of rows, read line by line; raise `InputError` if it cannot be read or is empty."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; check the path (relative paths start at {Path.cwd()})")
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
    kind = TABLE_SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"
    stream = datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", streaming=True)
    try:
        first = next(iter(stream), None)
    except Exception as error:  # of many kinds, from the readers of each format
        raise InputError(f"{path}: cannot be read as {kind} ({error}); repair the file") from error
    if first is None:
        raise InputError(f"{path}: is empty; give a file with at least one row")
    return stream


def split_off_validation(train, data: DataArguments) -> dict:
    """Split rows into "train" and "validation"; raise `InputError` if one of them would be empty."""
    if train is None or data.streaming:
        raise InputError("there is no validation data; give --validation_file, or a data set that has that split")
    num_validation = round(len(train) * data.validation_split_percentage / 100)
    if not 0 < num_validation < len(train):
        raise InputError(
            f"--validation_split_percentage={data.validation_split_percentage}: of {len(train)} rows that leaves "
            f"{num_validation} for validation and {len(train) - num_validation} for training; give --validation_file"
        )
    return {
        "train": train.select(range(num_validation, len(train))),
        "validation": train.select(range(num_validation)),
    }


def require_columns(rows, role: str, data: DataArguments) -> None:
    """Raise `InputError` if a column that a flag names is not there."""
    names = list_columns(rows)
    for flag_name in TEXT_COLUMN_FLAGS:
        column = getattr(data, flag_name)
        if column is not None and column not in names:
            raise InputError(f"--{flag_name}={column}: the {role} data has no such column, only {', '.join(names)}")


def choose_text_column(rows, data: DataArguments) -> str:
    """Choose the column with running text: the one named, else 'text', else the first."""
    names = list_columns(rows)
    return data.text_column or ("text" if "text" in names else names[0])


def choose_text_suffix(data: DataArguments, role: str) -> str:
    """Return the line break that reading a text file by lines took away, or nothing."""
    path = getattr(data, f"{role}_file") or data.train_file
    is_text = path is not None and not any(suffix.lower() in TABLE_SUFFIXES for suffix in Path(path).suffixes)
    return "\n" if is_text and data.keep_linebreaks and data.prompt_column is None else ""


def iterate_texts(rows, data: DataArguments) -> Iterator[str]:
    """Yield the training texts, for a tokenizer to be trained on; raise `InputError` for a row without text."""
    columns = [data.prompt_column, data.completion_column] if data.prompt_column else [choose_text_column(rows, data)]
    suffix = choose_text_suffix(data, "train")
    for row in itertools.islice(rows, MAX_TOKENIZER_TEXTS):
        for column in columns:
            if not isinstance(row[column], str):
                raise InputError(f"column {column!r} holds {row[column]!r} in some row; every row must hold text there")
            yield row[column] + suffix


def limit_rows(rows, limit: int | None):
    """Keep the first `limit` rows; None: all."""
    if limit is None:
        return rows
    return rows.take(limit) if isinstance(rows, datasets.IterableDataset) else rows.select(range(min(limit, len(rows))))
