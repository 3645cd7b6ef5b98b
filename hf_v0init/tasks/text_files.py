"""Local text and table files as `datasets.Dataset`: plain or gzipped text, one example a line, or JSON, CSV, TSV, parquet.

Everything that can be wrong with a file is found here, before any training time is spent: what damages the file (bytes that are
no text, a row without its columns, a quote that is never closed) is an error that names the line; what was taken for the header
of a table stands in the log.
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


def find_kind(path) -> str | None:
    """Return "json", "csv" or "parquet" by the suffix of a file's name (a final .gz aside), None for text.

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
    return TABLES.get(_get_suffix(path))


def _get_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def read_lines(path) -> list[str]:
    """Read a text file, plain or gzipped (told by its first bytes, not by its name).

    Returns:
        The lines, UTF-8 decoded, without line ends ('\\n', '\\r\\n', or '\\r' in a file without '\\n'). Nothing else ends a
        line, so that parallel files stay parallel whatever Unicode separators they contain.

    Raises:
        InputError: the file is missing, a folder, empty, a corrupt gzip, not UTF-8 (names line and byte), holds a NUL byte
            or a word of more than 100,000 characters (names the line).
    """
    path = Path(path)
    find_kind(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b" or path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is not a whole gzip file ({error}); fetch or compress it again") from error
    if not raw.strip():
        raise InputError(f"{path}: is empty; give a file with at least one line of text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: line {line_number}, byte {error.start}: 0x{raw[error.start]:02x} is not UTF-8; "
            "convert the file, for example with iconv -t UTF-8"
        ) from error
    if "\n" not in text:
        text = text.replace("\r", "\n")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, start=1):
        _require_text(path, number, line)
    return lines


def _require_text(path, number: int, line: str) -> None:
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


def load_local_files(path, *, role: str) -> datasets.Dataset:
    """Load one local file; its name's suffix (a final .gz aside) says how.

    Args:
        path: `.json` or `.jsonl` (objects one a line, or one list of objects), `.csv` or `.tsv` (first line: names),
            `.parquet`, or anything else: text, one example a line.
        role: what the file is for ("train", "validation", "test"); only messages mention it.

    Returns:
        A data set with all the file's columns, or with the single column "text".

    Raises:
        InputError: as `read_lines`; or the table cannot be parsed, has a row with other columns than its header (names the
            line), or holds no rows.
    """
    path, kind = Path(path), find_kind(path)
    if kind == "parquet":
        return _load(kind, path, role)
    lines = read_lines(path)
    if kind is None:
        return datasets.Dataset.from_dict({"text": lines})
    if kind == "csv":
        return read_table(path, lines, role)
    if lines[0].lstrip().startswith("["):
        return _from_json_list(path, lines, role)
    _require_json_lines(path, lines, role)
    return _load(kind, path, role)


def _load(kind: str, path: Path, role: str) -> datasets.Dataset:
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
    options = {"keep_default_na": False} if kind == "csv" else {}  # or "null" would be a missing value
    if kind == "csv":
        options["sep"] = DELIMITERS[_get_suffix(Path(path))]
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


def iterate_lines(path) -> Iterator[str]:
    """Iterate over the lines of a text file as `read_lines` returns them, without holding more than one.

    Raises:
        InputError: as `read_lines`, when the place is reached.
    """
    find_kind(path)
    number = 0
    with open(path, "rb") as plain:
        is_gzip = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        try:
            for number, raw in enumerate(gzip.GzipFile(fileobj=plain) if is_gzip else plain, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
                _require_text(path, number, line)
                yield line
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number} is not UTF-8; convert the file, for example with iconv -t UTF-8"
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{path}: cannot be read after line {number} ({error}); fetch or compress it again"
            ) from error
    if number == 0:
        raise InputError(f"{path}: is empty; give a file with at least one line of text")


def read_table(path: Path, lines: list[str], role: str) -> datasets.Dataset:
    """Read a table of texts whose first line names its columns.

    Not with pandas, which takes "null" for a missing value and fills short rows in silence.

    Raises:
        InputError: see `load_local_files`.
    """
    csv.field_size_limit(sys.maxsize)
    suffix = _get_suffix(path)
    options = {"delimiter": DELIMITERS[suffix], "strict": True}
    if suffix == ".tsv":
        options["quoting"] = csv.QUOTE_NONE
    reader = csv.reader((line + "\n" for line in lines), **options)
    columns: dict[str, list[str]] = {}
    num_empty = 0
    while True:
        first_line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            why = "a quote is opened and never closed" if "unexpected end" in str(error) else str(error)
            raise InputError(
                f"{path}: line {first_line} of the {role} file is not valid {suffix} ({why}); a quote inside a quoted field is "
                'written twice ("")'
            ) from error
        if not row:
            num_empty += 1
        elif not columns:
            columns = {name: [] for name in _read_header(path, row, role)}
        elif len(row) != len(columns):
            raise InputError(
                f"{path}: line {first_line} of the {role} file has {len(row)} fields, and the header names {len(columns)} "
                f"({', '.join(columns)}); repair the row, with quotes around a text that holds commas"
            )
        else:
            for values, value in zip(columns.values(), row, strict=True):
                values.append(value.removesuffix("\n"))
    if num_empty:
        logger.info(f"{path}: {num_empty} empty lines are left out")
    if not columns or not next(iter(columns.values())):
        raise InputError(
            f"{path}: the {role} file has no rows; give a header with the columns' names and at least one row"
        )
    return datasets.Dataset.from_dict(columns)


def _read_header(path: Path, row: list[str], role: str) -> list[str]:
    names = [name.strip() for name in row]
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


def _from_json_list(path: Path, lines: list[str], role: str) -> datasets.Dataset:
    """One JSON list of objects, which the `datasets` loader takes only uncompressed and with guesses."""
    try:
        rows = json.loads("\n".join(lines))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} is not valid JSON ({error.msg}); repair it") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: the {role} file must hold a non-empty list of JSON objects")
    return datasets.Dataset.from_list(rows)


def _require_json_lines(path: Path, lines: list[str], role: str) -> None:
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if line_number == 1 and line.lstrip().startswith("{"):
                return  # perhaps one object over many lines: `datasets` may know better
            raise InputError(f"{path}: line {line_number} is not valid JSON ({error.msg}); repair it") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {line_number} of the {role} file is not a JSON object; write one a line")
