"""Local text and table files as `datasets.Dataset`: plain or gzipped, one sentence a line, or JSON and CSV.

Everything that can be wrong with a file is found here, before any training time is spent.
"""

import gzip
import json
import zlib
from pathlib import Path

import datasets

from ..errors import InputError

_TABLE_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv"}


def read_lines(path) -> list[str]:
    """Reads a text file, plain or gzipped (told by its first bytes, not by its name).

    Returns:
        The lines, UTF-8 decoded, without line ends ('\\n' or '\\r\\n'). Only '\\n' ends a line, so that
        parallel files stay parallel whatever Unicode separators they contain.

    Raises:
        InputError: the file is missing, a folder, empty, a corrupt gzip, or not UTF-8 (names line and byte).
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
        InputError: as `read_lines`; or the JSON or CSV cannot be parsed, or holds no rows.
    """
    path = Path(path)
    lines = read_lines(path)  # also for tables: finds missing, non-UTF-8 and corrupt files with one message each
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = _TABLE_SUFFIXES.get(suffixes[-1]) if suffixes else None
    if kind is None:
        return datasets.Dataset.from_dict({"text": lines})
    if kind == "json" and lines[0].lstrip().startswith("["):
        return _from_json_list(path, lines, role)
    if kind == "json" and path.suffix != ".gz":
        _require_json_lines(path, lines, role)
    # pandas, which reads CSV, would take the German word "null" and other texts for missing values
    options = {"keep_default_na": False} if kind == "csv" else {}
    try:
        data = datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", **options)
    except Exception as error:  # `datasets` wraps what its parsers raise in exceptions of many kinds
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise InputError(f"{path}: the {role} file is not valid {kind.upper()} ({reason}); repair it") from error
    if len(data) == 0:
        raise InputError(f"{path}: the {role} file has no rows; give at least one example")
    return data


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
