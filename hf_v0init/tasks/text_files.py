"""Local text and table files as `datasets.Dataset`: plain or gzipped, one sentence a line, or JSON and CSV.

Everything that can be wrong with a file is found here, before any training time is spent, by one rule: what damages the file
(bytes that are no text, a row without its columns, a quote that is never closed) is an error that names the line; what is only
of no use (an empty line in a table) is left out and counted in one line of the log.
"""

import csv
import gzip
import json
import logging
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets

from ..errors import InputError

logger = logging.getLogger("hf_v0init")

_TABLE_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv"}


def read_lines(path) -> list[str]:
    """Reads a text file, plain or gzipped (told by its first bytes, not by its name).

    Returns:
        The lines, UTF-8 decoded, without line ends ('\\n' or '\\r\\n'). Only '\\n' ends a line, so that
        parallel files stay parallel whatever Unicode separators they contain.

    Raises:
        InputError: the file is missing, a folder, empty, a corrupt gzip, not UTF-8 (names line and byte), or holds
            a NUL byte (names the line).
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path (relative paths start at {Path.cwd()})")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a text file, plain or .gz")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if raw[:2] == b"\x1f\x8b" or path.suffix == ".gz":
        raw = _decompress(path, raw)
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
    if "\0" in text:
        line_number = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(
            f"{path}: line {line_number} holds a NUL byte, so this is no text file, or not in UTF-8; remove it, for example with "
            "tr -d '\\0', or convert the file with iconv"
        )
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def load_local_files(path, *, role: str) -> datasets.Dataset:
    """Loads one local file; its name's suffix (a final .gz aside) says how.

    Args:
        path: `.json` or `.jsonl` (objects one a line, or one list of objects), `.csv` (first line: names), or
            anything else: text, one example a line. Each may be gzipped.
        role: what the file is for ("train", "validation", "test"); only errors mention it.

    Returns:
        A data set with all the file's columns, or with the single column "text".

    Raises:
        InputError: as `read_lines`; or the JSON or CSV cannot be parsed, has a row with other columns than its
            header (names the line), or holds no rows.
    """
    path = Path(path)
    lines = read_lines(path)  # also for tables: finds missing, non-UTF-8 and corrupt files with one message each
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = _TABLE_SUFFIXES.get(suffixes[-1]) if suffixes else None
    if kind is None:
        return datasets.Dataset.from_dict({"text": lines})
    if kind == "json" and lines[0].lstrip().startswith("["):
        return _from_json_list(path, lines, role)
    if kind == "csv":
        return _read_csv(path, lines, role)
    _require_json_lines(path, lines, role)
    try:
        data = datasets.load_dataset(kind, data_files={"train": str(path)}, split="train")
    except Exception as error:  # `datasets` wraps what its parsers raise in exceptions of many kinds
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise InputError(f"{path}: the {role} file is not valid JSON ({reason}); repair it") from error
    if len(data) == 0:
        raise InputError(f"{path}: the {role} file has no rows; give at least one example")
    return data


def iterate_lines(path) -> Iterator[str]:
    """Iterates over the lines of a text file as `read_lines` returns them, without holding more than one.

    Raises:
        InputError: as `read_lines`, when the place is reached.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path (relative paths start at {Path.cwd()})")
    with open(path, "rb") as plain:
        is_gzip = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        number = 0
        try:
            for number, raw in enumerate(gzip.GzipFile(fileobj=plain) if is_gzip else plain, start=1):
                if b"\0" in raw:
                    raise InputError(
                        f"{path}: line {number} holds a NUL byte, so this is no UTF-8 text; convert the file"
                    )
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield line.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number + 1} is not UTF-8; convert the file, for example with iconv -t UTF-8"
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{path}: cannot be read after line {number} ({error}); fetch or compress it again"
            ) from error
    if number == 0:
        raise InputError(f"{path}: is empty; give a file with at least one line of text")


def open_table_stream(path) -> datasets.IterableDataset | None:
    """Opens a local table as a stream of rows; None if its name is not one of a table.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path (relative paths start at {Path.cwd()})")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = _TABLE_SUFFIXES.get(suffixes[-1]) if suffixes else None
    if kind is None:
        return None
    options = {"keep_default_na": False} if kind == "csv" else {}  # or "null" would be a missing value
    stream = datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", streaming=True, **options)
    try:
        first = next(iter(stream), None)
    except Exception as error:  # of many kinds, from the readers of each format
        raise InputError(f"{path}: cannot be read as {kind} ({error}); repair the file") from error
    if first is None:
        raise InputError(f"{path}: is empty; give a file with at least one row")
    return stream


def load_parallel_files(source_path, target_path) -> datasets.Dataset:
    """Loads two text files whose lines belong together.

    Returns:
        A data set with the columns "source" and "target", one row a line.

    Raises:
        InputError: as `read_lines`; or the two files have different numbers of lines.
    """
    sources, targets = read_lines(source_path), read_lines(target_path)
    if len(sources) != len(targets):
        raise InputError(
            f"{source_path} has {len(sources)} lines but {target_path} has {len(targets)}; "
            "parallel files need the same number of lines, line n of one translating line n of the other"
        )
    return datasets.Dataset.from_dict({"source": sources, "target": targets})


def _decompress(path: Path, raw: bytes) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is not a whole gzip file ({error}); fetch or compress it again") from error


def _read_csv(path: Path, lines: list[str], role: str) -> datasets.Dataset:
    """Reads a table of texts. Not with pandas, which takes "null" for a missing value and fills short rows in silence."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line + "\n" for line in lines), strict=True)
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
                f"{path}: line {first_line} of the {role} file is not valid CSV ({why}); a quote inside a quoted field is "
                'written twice ("")'
            ) from error
        if not row:
            num_empty += 1
        elif not columns:
            columns = _read_header(path, row, role)
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


def _read_header(path: Path, names: list[str], role: str) -> dict[str, list[str]]:
    names = [name.strip() for name in names]
    if len(names) == 1:
        for separator, called in ((";", "';'"), ("\t", "tabs"), ("|", "'|'")):
            if separator in names[0]:
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
    return {name: [] for name in names}


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
