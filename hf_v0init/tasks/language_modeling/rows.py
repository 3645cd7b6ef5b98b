"""The rows of a language model's data: from the Hub, from local files, or read as a stream while training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
from transformers import TrainingArguments

from ...errors import InputError
from ..script_stages import DatasetArguments, HubArguments, find_needed_roles, flag, require_positive_counts
from ..text_files import load_local_files
from .samples import list_columns

TABLE_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv"}
MAX_TOKENIZER_TEXTS = 2_000_000  # a vocabulary does not get better from more, but memory runs out


@dataclass
class TextArguments(DatasetArguments):
    """Which text a language model is trained on, and how much of it.

    Raises:
        InputError: no source of data or two, flags that exclude each other, numbers out of range.
    """

    column_flags: ClassVar[tuple[str, ...]] = ("text_column",)
    uneven_flag: ClassVar[str]  # the one with which samples differ in length

    train_file: str | None = flag(
        None, "Local training data: .json, .jsonl, .csv, or text, one document per line; also .gz."
    )
    validation_file: str | None = flag(None, "The same for validation.")
    test_file: str | None = flag(None, "The same for test.")
    validation_split_percentage: float = flag(
        5.0, "Without validation data, --do_eval takes this percentage from the beginning of the training data."
    )
    validation_split_rows: int | None = flag(
        None,
        "The same by number: validation data are the first so many rows of the training data. A stream, whose length is unknown, "
        "takes no percentage.",
    )
    text_column: str | None = flag(None, "Column with the text. Default: 'text', else the first column.")
    streaming: bool = flag(
        False, "Read the data while training instead of before; needs --max_steps. Nothing is cached."
    )
    shuffle_buffer_size: int | None = flag(
        None, "With --streaming: draw training rows at random from a buffer of this many. Default: in order."
    )
    max_train_samples: int | None = flag(None, "Use only the first so many samples (or rows) for training.")
    max_eval_samples: int | None = flag(None, "Use only the first so many samples (or rows) for validation.")
    max_predict_samples: int | None = flag(None, "Use only the first so many samples (or rows) of the test set.")
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
        if not 0 < self.validation_split_percentage < 100:
            raise InputError(
                f"--validation_split_percentage={self.validation_split_percentage}: must lie between 0 and 100"
            )
        if self.shuffle_buffer_size and not self.streaming:
            raise InputError(f"--shuffle_buffer_size={self.shuffle_buffer_size}: is for --streaming; drop it")

    def get_limit(self, role: str) -> int | None:
        """Return how many samples (or rows) of "train", "validation" or "test" are used at most; None: all."""
        return {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_predict_samples}[
            role
        ]

    def choose_text_columns(self, rows) -> list[str]:
        """Choose the columns that hold text: of running text the one named, else 'text', else the first."""
        names = list_columns(rows)
        return [self.text_column or ("text" if "text" in names else names[0])]

    def choose_text_suffix(self, role: str) -> str:
        """Return what is put after each text of "train", "validation" or "test"."""
        return ""


@dataclass
class DataArguments(TextArguments):
    """The text of a causal language model, and how it is cut.

    Raises:
        InputError: as `TextArguments`.
    """

    column_flags: ClassVar[tuple[str, ...]] = ("text_column", "prompt_column", "completion_column")
    uneven_flag: ClassVar[str] = "prompt_column"

    prompt_column: str | None = flag(
        None, "Column with prompts; needs --completion_column. One sample per row, the loss on the completion only."
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

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        super().__post_init__()
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

    def choose_text_columns(self, rows) -> list[str]:
        """Choose the columns that hold text: prompt and completion, or the one of running text."""
        return [self.prompt_column, self.completion_column] if self.prompt_column else super().choose_text_columns(rows)

    def choose_text_suffix(self, role: str) -> str:
        """Return the line break that reading a text file by lines took away, or nothing."""
        path = getattr(self, f"{role}_file") or self.train_file
        is_text = path is not None and not any(suffix.lower() in TABLE_SUFFIXES for suffix in Path(path).suffixes)
        return "\n" if is_text and self.keep_linebreaks and self.prompt_column is None else ""


@dataclass
class MaskedDataArguments(TextArguments):
    """The text of a masked language model, how it is cut, and what of it is masked.

    Raises:
        InputError: as `TextArguments`.
    """

    uneven_flag: ClassVar[str] = "line_by_line"

    block_size: int | None = flag(
        None,
        "Tokens of a sample, its first and last special token included. Default: what model and tokenizer take, at most 512.",
    )
    line_by_line: bool = flag(
        False,
        "Make each line or row a sample, cut at --block_size; empty ones are left out. Default: join them, each ended by the "
        "tokenizer's separator, and cut them into blocks.",
    )
    mlm_probability: float = flag(0.15, "Share of the tokens that are to be guessed.")
    mask_replace_prob: float = flag(0.8, "Share of those that become the mask token.")
    random_replace_prob: float = flag(0.1, "Share of those that become a random token; the rest stays as it is.")
    whole_word_mask: bool = flag(
        False, "Choose words instead of tokens, and mask all of a word's tokens. Words are the tokenizer's."
    )

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        super().__post_init__()
        if not 0 < self.mlm_probability < 1:
            raise InputError(f"--mlm_probability={self.mlm_probability}: must lie between 0 and 1, such as 0.15")
        for name in ("mask_replace_prob", "random_replace_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name}={getattr(self, name)}: must be at least 0 and at most 1")
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise InputError(
                f"--mask_replace_prob={self.mask_replace_prob} and --random_replace_prob={self.random_replace_prob}: together "
                "they must be at most 1"
            )


def load_rows(data: TextArguments, hub: HubArguments, training: TrainingArguments) -> dict:
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
    if data.validation_split_rows is not None and ("validation" not in needed or "validation" in rows):
        why = "there is validation data" if "validation" in rows else "the run evaluates nothing (--do_eval)"
        raise InputError(f"--validation_split_rows={data.validation_split_rows}: {why}; drop it")
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


def split_off_validation(train, data: TextArguments) -> dict:
    """Split rows into "train" and "validation", its first rows; raise `InputError` if one of them would be empty."""
    if train is None:
        raise InputError("there is no validation data; give --validation_file, or a data set that has that split")
    num_validation = data.validation_split_rows
    if data.streaming:
        if num_validation is None:
            raise InputError(
                "there is no validation data; give --validation_file, or --validation_split_rows 1000 for the first rows of the "
                "training stream"
            )
        if next(iter(train.skip(num_validation)), None) is None:
            raise InputError(
                f"--validation_split_rows={num_validation}: the training stream has no more rows; lower it, or give --validation_file"
            )
        return {"train": train.skip(num_validation), "validation": train.take(num_validation)}
    source = f"--validation_split_rows={num_validation}"
    if num_validation is None:
        source = f"--validation_split_percentage={data.validation_split_percentage}"
        num_validation = round(len(train) * data.validation_split_percentage / 100)
    if not 0 < num_validation < len(train):
        raise InputError(
            f"{source}: of {len(train)} rows that leaves {num_validation} for validation and "
            f"{max(len(train) - num_validation, 0)} for training; give --validation_file"
        )
    return {
        "train": train.select(range(num_validation, len(train))),
        "validation": train.select(range(num_validation)),
    }


def require_columns(rows, role: str, data: TextArguments) -> None:
    """Raise `InputError` if a column that a flag names is not there."""
    names = list_columns(rows)
    for flag_name in data.column_flags:
        column = getattr(data, flag_name)
        if column is not None and column not in names:
            raise InputError(f"--{flag_name}={column}: the {role} data has no such column, only {', '.join(names)}")


def iterate_texts(rows, data: TextArguments) -> Iterator[str]:
    """Yield the training texts, for a tokenizer to be trained on; raise `InputError` for a row without text."""
    columns, suffix = data.choose_text_columns(rows), data.choose_text_suffix("train")
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
