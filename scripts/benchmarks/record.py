"""The committed record of the benchmark: written, read, and compared with what was measured now."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measuring import DIGITS, MET, MISSED, Row
from hf_v0init.compare.launch import describe_hardware, list_versions
from hf_v0init.errors import InputError

RECORD_PATH = Path(__file__).resolve().parents[2] / "configs" / "benchmark" / "record.json"
SMALLEST_CHANGE = 0.03  # of a ratio, below which it is not called worse


def compose_record(rows: Sequence[Row], command: str, quick: bool, seconds: float) -> dict:
    """Put rows, command, machine and versions together as plain JSON types."""
    return {
        "command": command,
        "quick": quick,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "hardware": describe_hardware(),
        "versions": list_versions(),
        "rows": [_describe(row) for row in rows],
    }


def _describe(row: Row) -> dict:
    first, third = row.quartiles
    described = asdict(row) | {"median": row.median, "quartiles": [first, third], "verdict": row.verdict}
    described["figures"] = {name: float(f"{value:.{DIGITS}g}") for name, value in row.figures.items()}
    return {name: _round(value) for name, value in described.items()}


def _round(value):
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return [_round(one) for one in value] if isinstance(value, list) else value


def write_record(record: dict, path: Path = RECORD_PATH) -> None:
    """Write a record; it replaces the one there was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(path: Path = RECORD_PATH) -> dict:
    """Read a record.

    Raises:
        InputError: there is none, or it is no record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: no record there ({error.strerror}); --write_record makes one") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); --write_record makes a new one") from error
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        raise InputError(f"{path} is no record of a benchmark; --write_record makes a new one")
    return record


def read_rows(record: dict) -> list[Row]:
    """Return the rows of a record."""
    names = Row.__dataclass_fields__
    return [Row(**{name: row[name] for name in names if name in row}) for row in record["rows"]]


def find_worse(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """Name the rows that got worse than the record beyond noise, a line each.

    Worse is: the middle halves of the ratios do not overlap, and the medians differ by more than 3%; or an aim that was met is
    missed by more than that.
    """
    old = {row.name: row for row in before}
    lines = []
    for row in now:
        earlier = old.get(row.name)
        if earlier is None or not row.ratios or not earlier.ratios:
            continue
        sign = -1.0 if row.at_least else 1.0
        low, high = sorted(sign * value for value in row.quartiles)
        old_low, old_high = sorted(sign * value for value in earlier.quartiles)
        change = sign * (row.median - earlier.median) / earlier.median
        apart = low > old_high and change > SMALLEST_CHANGE
        beyond_aim = row.aim is not None and sign * (row.median - row.aim) / row.aim > SMALLEST_CHANGE
        if apart or (earlier.verdict == MET and row.verdict == MISSED and beyond_aim):
            lines.append(
                f"{row.name}: {earlier.median:.3f} -> {row.median:.3f} (middle halves {sign * old_low:.3f} to "
                f"{sign * old_high:.3f}, now {sign * low:.3f} to {sign * high:.3f}): {row.what} / {row.against}"
            )
    return lines
