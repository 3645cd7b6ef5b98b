"""Local files as `datasets` reads them: text (one example per line), JSON, CSV, TSV, parquet; text and tables also as .gz."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import datasets
import pandas

from hf_v0init import InputError

logger = logging.getLogger("hf_v0init")

TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
UNREADABLE = (".xlsx", ".xls", ".ods", ".zst", ".zip", ".xz", ".bz2", ".7z", ".pdf", ".docx", ".arrow", ".feather")
READABLE = "text (.txt), .json, .jsonl, .csv, .tsv, all of these also as .gz, and .parquet"
LONGEST_WORD = 100_000  # characters without white space: a tokenizer would take hours over more


def get_format(path) -> str:
    """Return the suffix of a file's name that says how it is read, in lower case; a final .gz does not count."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def find_kind(path) -> str:
    """Return the name by which `datasets` knows the format: "json", "csv", "parquet", or "text".

    Raises:
        InputError: no such file, an empty one, a folder, a pipe, or a format that is not read here.
    """
    path = Path(path)
    if not path.is_file():
        what = (
            "is a folder" if path.is_dir() else "is a pipe or a device, and data are read twice: write them to a file"
        )
        raise InputError(f"{path}: {what if path.exists() else 'no such file'}; give a file: {READABLE}")
    if path.suffix.lower() in UNREADABLE:
        raise InputError(f"{path}: {path.suffix} cannot be read here; convert it to {READABLE}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; give one with text or rows")
    return TABLES.get(get_format(path), "text")


def load_local_files(
    path, *, role: str, streaming: bool = False, cache_dir: str | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one local file; its name's suffix (a final .gz aside) says how.

    Args:
        path: `.json` or `.jsonl` (objects one per line, or one list of objects), `.csv` or `.tsv` (first line: names; all
            columns are texts, in a .tsv a quote is a character like others), `.parquet`, or anything else: text in UTF-8.
        role: what the file is for ("train", "validation", "test"); only messages mention it.
        streaming: read the file while it is used.
        cache_dir: where `datasets` keeps what it has read. Default: its own folder.

    Returns:
        A data set with all the file's columns, or with the single column "text".

    Raises:
        InputError: the file cannot be read, or holds no rows.
    """
    kind = find_kind(path)
    options: dict[str, Any] = {"encoding": "utf-8-sig"} if kind == "text" else {}
    try:
        if kind == "csv":
            options = choose_table_options(path)
        rows = datasets.load_dataset(
            kind, data_files={"train": str(path)}, split="train", streaming=streaming, cache_dir=cache_dir, **options
        )
        first = next(iter(rows), None)
    except InputError:
        raise
    except Exception as error:  # of many kinds: `datasets` wraps what its parsers raise
        raise InputError(f"{path}: the {role} file cannot be read as {kind} ({error.__cause__ or error})") from error
    if first is None:
        raise InputError(f"{path}: the {role} file is empty")
    if kind == "text" and not streaming:
        require_words(path, rows)
    return rows


def require_words(path, rows: datasets.Dataset) -> None:
    """Refuse text with a word that no tokenizer takes in reasonable time."""
    for part in rows.iter(1000):
        long_lines = [line for line in part["text"] if len(line) > LONGEST_WORD]
        if any(len(word) > LONGEST_WORD for line in long_lines for word in line.split()):
            raise InputError(f"{path}: has more than {LONGEST_WORD:,} characters without white space; split them")


def choose_table_options(path) -> dict[str, Any]:
    """Choose how a table is read, and log what its header is.

    Raises:
        InputError: its rows are longer than its header, and pandas would take the first column for an index.
    """
    options: dict[str, Any] = {"keep_default_na": False}
    if get_format(path) == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    head = pandas.read_csv(path, nrows=1, dtype=str, **options)
    if not isinstance(head.index, pandas.RangeIndex):
        raise InputError(f"{path}: its rows have more fields than its header ({', '.join(head.columns)}); repair it")
    logger.info(f"{path}: its first line names the columns: {', '.join(head.columns)}")
    return options | {"features": datasets.Features({name: datasets.Value("string") for name in head.columns})}


def read_lines(path) -> list[str]:
    """Read all lines of a text file, as `load_local_files` does."""
    return list(load_local_files(path, role="text")["text"])
