"""The rows of a run: from the Hub, from local files, or as a stream; limited, and mapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
from transformers import TrainingArguments

from hf_v0init import InputError

from .models import ModelArguments
from .script_support import flag
from .text_files import load_local_files

ROLES = ("train", "validation", "test")


@dataclass
class DatasetArguments:
    """data: what it is trained and measured on"""

    dataset_name: str | None = flag(None, "Data set by Hub name or folder.")
    dataset_config_name: str | None = flag(None, "Configuration of that data set.")
    dataset_revision: str | None = flag(None, "Branch, tag or commit of that data set.")

    local_flags: ClassVar[tuple[str, ...]] = ("train_file", "validation_file", "test_file")
    streaming: ClassVar[bool] = False  # whether rows are read while they are used; a flag where it can be chosen

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        local = [name for name in self.local_flags if getattr(self, name)]
        if self.dataset_name and local:
            raise InputError(f"--dataset_name and --{local[0]}: give one source of data, not both")
        if not self.dataset_name and not local:
            raise InputError(f"no data: give --dataset_name or --{self.local_flags[0]}")

    def load_dataset(self, hub):
        """Load all splits of `dataset_name`, as streams if `streaming`: a mapping of split names to data sets.

        Raises:
            InputError: it cannot be loaded, for whatever reason.
        """
        try:
            return datasets.load_dataset(
                self.dataset_name,
                self.dataset_config_name,
                revision=self.dataset_revision,
                cache_dir=hub.cache_dir,
                streaming=self.streaming,
            )
        except Exception as error:  # of many kinds: no network, no such name, no such configuration
            raise InputError(
                f"--dataset_name={self.dataset_name}: cannot be loaded ({error}); check name and network"
            ) from error

    def load_local(self, role: str, hub: ModelArguments):
        """Load the local data of "train", "validation" or "test"; None if there are none."""
        raise NotImplementedError

    def select(self, rows, role: str):
        """Select what is used of a role's rows; raise `InputError` if it is not there."""
        return rows

    def split_off_validation(self, train) -> dict[str, Any]:
        """Split training rows (None: there are none) into "train" and "validation"; raise `InputError` where that cannot be."""
        raise InputError(self.describe_missing("validation"))

    def describe_missing(self, role: str) -> str:
        """Say that there are no data of a role, and what to give."""
        file, *pair = [name for name in self.local_flags if name.startswith(role)]
        files = f"--{file}" + (f", or --{' and --'.join(pair)}" if pair else "")
        return f"there is no {role} data; give {files}, or a --dataset_name that has this split"

    def load_roles(self, hub: ModelArguments, training: TrainingArguments) -> dict[str, Any]:
        """Load the rows of each role that the run needs: the data set's split, else local files, else of the training rows.

        Raises:
            InputError: a role without data, or what the loaders refuse.
        """
        needed, rows = find_needed_roles(training), {}
        splits = self.load_dataset(hub) if self.dataset_name else {}
        for role in needed:
            found = splits[role] if role in splits else self.load_local(role, hub)
            if found is not None:
                rows[role] = self.select(found, role)
            elif role != "validation":
                raise InputError(self.describe_missing(role))
        if "validation" in needed and "validation" not in rows:
            rows |= self.split_off_validation(rows.get("train"))
        return {role: rows[role] for role in needed}

    def list_local(self) -> list[str]:
        """List the local files or folders of the data."""
        return [getattr(self, name) for name in self.local_flags if getattr(self, name)]


@dataclass
class SplitDataArguments(DatasetArguments):
    """data: what it is trained and measured on"""

    max_train_samples: int | None = flag(None, "Use only so many training samples (or rows).")
    max_eval_samples: int | None = flag(None, "The same for validation.")
    max_predict_samples: int | None = flag(None, "The same for test.")

    def get_limit(self, role: str) -> int | None:
        """Return how many samples (or rows) of "train", "validation" or "test" are used at most; None: all."""
        limits = (self.max_train_samples, self.max_eval_samples, self.max_predict_samples)
        return dict(zip(ROLES, limits, strict=True))[role]


@dataclass
class TextDataArguments(SplitDataArguments):
    """data: what it is trained and measured on"""

    train_file: str | None = flag(
        None,
        "Local training data: .txt (one text per line), .json, .jsonl, .csv, .tsv or .parquet; text and tables also as .gz.",
    )
    validation_file: str | None = flag(None, "The same for validation.")
    test_file: str | None = flag(None, "The same for test.")
    max_tokens_per_batch: int | None = flag(
        None,
        "Where samples differ in length: training batches by token budget, padded tokens per batch, process and forward pass "
        "(of source or target, whichever is longer); replaces --per_device_train_batch_size.",
    )
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenize. Default: none beside this one.")

    def load_local(self, role: str, hub: ModelArguments):
        """Load a role's local file, as a stream if `streaming`."""
        path = getattr(self, f"{role}_file")
        options = {"streaming": self.streaming, "cache_dir": hub.cache_dir}
        return None if path is None else load_local_files(path, role=role, **options)


def find_needed_roles(training: TrainingArguments) -> list[str]:
    """Return those of "train", "validation" and "test" whose data the run needs, in this order."""
    evaluates = training.do_eval or (training.do_train and training.eval_strategy != "no")
    needed = (training.do_train, evaluates, training.do_predict)
    return [role for role, is_needed in zip(ROLES, needed, strict=True) if is_needed]


def is_stream(rows) -> bool:
    """Whether rows are read while they are used, their number unknown."""
    return isinstance(rows, datasets.IterableDataset)


def list_columns(rows: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """The names of the columns; of a stream that does not know them, those of its first row."""
    return rows.column_names if rows.column_names is not None else list(next(iter(rows), {}))


def limit_rows(rows, limit: int | None):
    """Keep the first `limit` rows; None: all."""
    if limit is None:
        return rows
    return rows.take(limit) if is_stream(rows) else rows.select(range(min(limit, len(rows))))


def map_rows(
    rows: datasets.Dataset | datasets.IterableDataset,
    function: Any,
    features: datasets.Features | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """`rows.map(function)` in batches, without the columns that were there. `datasets` keeps the result of files on disk."""
    options = {} if is_stream(rows) else {"num_proc": num_proc, "desc": "Tokenizing"}
    return rows.map(function, batched=True, remove_columns=list_columns(rows), features=features, **options)
