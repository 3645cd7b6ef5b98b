"""Local text and table files as `datasets.Dataset`: plain or gzipped text, one example per line, or JSON, CSV, TSV, parquet.

JSON and parquet are read by `datasets`. Text and CSV are read here, because pandas fills a short row in silence and other readers
break lines at Unicode separators, so that parallel files would not stay parallel. What damages a file (bytes that are no text, a
row without its columns, a quote that is never closed) is an error that names the line; the log says what was taken for a header.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets

from hf_v0init import InputError

logger = logging.getLogger("hf_v0init")

TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
UNREADABLE = (".xlsx", ".xls", ".ods", ".zst", ".zip", ".xz", ".bz2", ".7z", ".pdf", ".docx", ".arrow", ".feather")
READABLE = "text (.txt), .json, .jsonl, .csv, .tsv, all of these also as .gz, and .parquet"
LONGEST_WORD = 100_000  # characters without white space: a tokenizer would take hours over more
DELIMITERS = {".csv": ",", ".tsv": "\t"}
GZIP_MAGIC = b"\x1f\x8b"


def get_format(path) -> str:
    """Return the suffix of a file's name that says how it is read, in lower case; a final .gz does not count."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def find_kind(path) -> str | None:
    """Return "json", "csv" or "parquet" by a file's name, None for text.

    Raises:
        InputError: no such file, a folder, a pipe, or a format that is not read here.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path (relative paths start at {Path.cwd()})")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or a device, which cannot be read twice"
        raise InputError(f"{path}: {what}; give a file: {READABLE}")
    if path.suffix.lower() in UNREADABLE:
        raise InputError(f"{path}: {path.suffix} cannot be read here; convert it to {READABLE}")
    return TABLES.get(get_format(path))


def iterate_lines(path) -> Iterator[str]:
    """Iterate over the lines of a text file, plain or gzipped (told by its first bytes, not by its name), holding one at a time.

    Yields:
        The lines, UTF-8 decoded, without line ends ('\\n', '\\r\\n', or '\\r' in a file without '\\n'). Nothing else ends a line.

    Raises:
        InputError: when the place is reached: the file is missing, a folder, empty, a corrupt gzip, not UTF-8 (names line and
            byte), holds a NUL byte or a word of more than 100,000 characters (names the line).
    """
    find_kind(path)
    position, is_blank = 0, True
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                line = _decode(path, raw, number, position)
                position += len(raw)
                is_blank = is_blank and not line.strip()
                if number == 1 and not line.endswith("\n"):  # the only '\n' there may be is this one's
                    yield from line.removesuffix("\r").split("\r")
                else:
                    yield line.removesuffix("\n").removesuffix("\r")
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is not a whole gzip file ({error}); fetch or compress it again") from error
    if is_blank:
        raise InputError(f"{path}: is empty; give a file with at least one line of text")


def read_lines(path) -> list[str]:
    """Read all lines of a text file; see `iterate_lines`."""
    return list(iterate_lines(path))


def _open(path):
    with open(path, "rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC or Path(path).suffix == ".gz"
    return gzip.open(path) if is_gzip else open(path, "rb")


def _decode(path, raw: bytes, number: int, position: int) -> str:
    """Decode the bytes of a line, which is the file's `number`th and begins at byte `position`."""
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: line {number}, byte {position + error.start}: 0x{raw[error.start]:02x} is not UTF-8; "
            "convert the file, for example with iconv -t UTF-8"
        ) from error
    if "\0" in line:
        raise InputError(
            f"{path}: line {number} holds a NUL byte, so this is no text file, or not in UTF-8; remove it, for example with "
            "tr -d '\\0', or convert the file with iconv"
        )
    if len(line) > LONGEST_WORD and re.search(rf"\S{{{LONGEST_WORD}}}", line):
        raise InputError(
            f"{path}: line {number} has more than {LONGEST_WORD:,} characters without white space, which no tokenizer takes in "
            "reasonable time; split it"
        )
    return line


def load_local_files(path, *, role: str) -> datasets.Dataset:
    """Load one local file; its name's suffix (a final .gz aside) says how.

    Args:
        path: `.json` or `.jsonl` (objects one per line, or one list of objects), `.csv` or `.tsv` (first line: names),
            `.parquet`, or anything else: text, one example per line.
        role: what the file is for ("train", "validation", "test"); only messages mention it.

    Returns:
        A data set with all the file's columns, or with the single column "text".

    Raises:
        InputError: as `iterate_lines`; or the table cannot be parsed, has a row with other columns than its header (names the
            line), or holds no rows.
    """
    kind = find_kind(path)
    if kind is None:
        return datasets.Dataset.from_dict({"text": read_lines(path)})
    if kind == "csv":
        return _read_table(path, role)
    if kind == "json":
        _require_json_objects(path, role)
    try:
        data = datasets.load_dataset(kind, data_files={"train": str(path)}, split="train")
    except Exception as error:  # `datasets` wraps what its parsers raise in exceptions of many kinds
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise InputError(f"{path}: the {role} file is not valid {kind} ({reason}); repair it") from error
    if len(data) == 0:
        raise InputError(f"{path}: the {role} file has no rows; give at least one example")
    return data


def open_stream(path) -> datasets.IterableDataset:
    """Open a local file as a stream of rows, read line by line; of text with the single column "text".

    Raises:
        InputError: it cannot be read, or is empty.
    """
    kind = find_kind(path) or "text"
    options = {"keep_default_na": False, "sep": DELIMITERS[get_format(path)]} if kind == "csv" else {}
    stream = datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", streaming=True, **options)
    try:
        first = next(iter(stream), None)
    except Exception as error:  # of many kinds, from the readers of each format
        raise InputError(f"{path}: cannot be read as {kind} ({error}); repair the file") from error
    if first is None:
        raise InputError(f"{path}: is empty; give a file with at least one row")
    if kind == "csv":
        logger.info(f"{path}: its first line names the columns: {', '.join(first)}")
    return stream


def _read_table(path, role: str) -> datasets.Dataset:
    """Read a table of texts whose first line names its columns; in a .tsv a quote is a character like others."""
    csv.field_size_limit(sys.maxsize)
    suffix = get_format(path)
    quoting = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
    lines = (line + "\n" for line in iterate_lines(path))
    reader = csv.DictReader(lines, delimiter=DELIMITERS[suffix], quoting=quoting, strict=True)
    rows, first_line = [], 1
    try:
        reader.fieldnames = names = _require_header(path, reader.fieldnames or [], role)
        first_line = reader.line_num + 1
        for row in reader:
            num_fields = len(names) + len(row.pop(None, [])) - list(row.values()).count(None)
            if num_fields != len(names):
                raise InputError(
                    f"{path}: line {reader.line_num} of the {role} file has {num_fields} fields, and the header names {len(names)} "
                    f"({', '.join(names)}); repair the row, with quotes around a text that holds commas"
                )
            rows.append(row)
            first_line = reader.line_num + 1
    except csv.Error as error:
        why = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
        raise InputError(
            f"{path}: line {first_line} of the {role} file is not valid {suffix} ({why}); a quote inside a quoted field is "
            'written twice ("")'
        ) from error
    if not rows:
        raise InputError(
            f"{path}: the {role} file has no rows; give a header with the columns' names and at least one row"
        )
    return datasets.Dataset.from_list(rows)


def _require_header(path, names: list[str], role: str) -> list[str]:
    names = [name.strip() for name in names]
    for separator, called in ((";", "';'"), ("\t", "tabs"), ("|", "'|'")):
        if len(names) == 1 and separator in names[0]:
            raise InputError(
                f"{path}: the {role} file is separated by {called}, not by commas (its first line is {names[0]!r}); save it with "
                "commas, or as .jsonl"
            )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or "" in names:
        called = "a column without a name" if twice in (None, "") else f"two columns {twice!r}"
        raise InputError(
            f"{path}: the header of the {role} file has {called}; its first line must name each column once"
        )
    logger.info(f"{path}: its first line names the columns: {', '.join(names)}")
    return names


def _require_json_objects(path, role: str) -> None:
    """Refuse what `datasets` would read as something else, or would not name the line of."""
    lines = read_lines(path)
    is_list = lines[0].lstrip().startswith("[")
    for number, text in enumerate(["\n".join(lines)] if is_list else lines, start=1):
        try:
            value = json.loads(text) if text.strip() else {}
        except json.JSONDecodeError as error:
            if number == 1 and not is_list and text.lstrip().startswith("{"):
                return  # perhaps one object over many lines, which `datasets` reads
            line = number + error.lineno - 1
            raise InputError(f"{path}: line {line} is not valid JSON ({error.msg}); repair it") from error
        rows = value if is_list else [value]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise InputError(
                f"{path}: line {number} of the {role} file is not a JSON object; give one per line, or one list of JSON objects"
            )
