"""What a comparison's file says under `slurm`: what each run asks of the cluster."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ...errors import InputError
from .axes import is_number, suggest

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d\d?){0,2})")


@dataclass(frozen=True)
class SlurmSettings:
    """What each run asks for; `minutes` of wall-clock time until it is cut off, to go on from its last checkpoint."""

    partition: str | None = None
    minutes: int = 60
    gpus: int = 1
    cpus: int = 8
    memory_gb: float | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    max_parallel: int = 256
    max_timeouts: int = 10
    setup: tuple[str, ...] = ()
    further: dict[str, Any] = field(default_factory=dict)


KEYS = tuple("time" if f.name == "minutes" else f.name for f in fields(SlurmSettings))
_TEXTS = ("partition", "account", "qos", "constraint")
_LEAST = {"gpus": 0, "cpus": 1, "max_parallel": 1, "max_timeouts": 0}


def read_slurm(value: Any) -> SlurmSettings | None:
    """Read the mapping `slurm`; None if there is none.

    Raises:
        InputError: an unknown key, or a value that cannot be.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError(f"slurm: {value!r} must be a mapping, such as {{partition: gpu, time: 4:00:00, gpus: 1}}")
    settings: dict[str, Any] = {}
    for key, given in value.items():
        if key not in KEYS:
            raise InputError(
                f"slurm: unknown key {key!r}{suggest(str(key), KEYS)}; it may have {', '.join(KEYS)} (sbatch's other options go under "
                "`further`)"
            )
        if key == "time":
            settings["minutes"] = _read_minutes(given)
        elif key in _LEAST:
            if not isinstance(given, int) or isinstance(given, bool) or given < _LEAST[key]:
                raise InputError(f"slurm: {key}={given!r} must be a whole number >= {_LEAST[key]}")
            settings[key] = given
        elif key in _TEXTS:
            settings[key] = str(given)
        elif key == "memory_gb":
            if not is_number(given) or given <= 0:
                raise InputError(f"slurm: memory_gb={given!r} must be a number > 0")
            settings[key] = float(given)
        elif key == "setup":
            lines = [given] if isinstance(given, str) else given
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
                raise InputError(f"slurm: setup={given!r} must be a list of shell lines, such as [module load cuda]")
            settings[key] = tuple(lines)
        elif not isinstance(given, dict):
            raise InputError(f"slurm: further={given!r} must be a mapping of sbatch's options, such as {{nice: 100}}")
        else:
            settings[key] = given
    return SlurmSettings(**settings)


def _read_minutes(value: Any) -> int:
    """Read a time as sbatch does, in whole minutes, rounded up."""
    found = _TIME.fullmatch(str(value)) if not isinstance(value, bool) else None
    seconds = 0
    if found:
        parts = [int(part) for part in found["rest"].split(":")]
        if found["days"] is not None:  # days-hours[:minutes[:seconds]]
            hours, minutes, rest = parts + [0] * (3 - len(parts))
        else:  # minutes, minutes:seconds, hours:minutes:seconds
            hours, minutes, rest = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        seconds = ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest
    if seconds < 1:
        raise InputError(
            f"slurm: time={value!r} must be minutes, hours:minutes:seconds or days-hours, as sbatch takes it"
        )
    return math.ceil(seconds / 60)
