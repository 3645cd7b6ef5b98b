"""Lays out the runs of a comparison's grids: each the product of its axes, named, and sorted into families."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .axes import (
    NO_V0,
    NO_WARMUP,
    OF_THE_RUN,
    OWNERS,
    AxisValue,
    get_optimizer,
    has_v0,
    has_warmup,
    is_number,
    merge_axes,
    name_flags,
    parse_optimizer,
    parse_v0,
    parse_warmup,
)
from .files import TUNE, is_secret
from .plan import NONE, V0, V0_AND_WARMUP, WARMUP, PlannedRun, make_run_name

DEFAULT_LEARNING_RATE, DEFAULT_SEED = 5e-5, 42  # transformers'
MAIN_OPTIMIZER = "adamw"
PARSERS = {"v0": parse_v0, "warmup": parse_warmup, "optimizer": parse_optimizer}
AXES = (*PARSERS, "learning_rate", "seed")
# What people write for an axis. A script would refuse most of them as unknown flags, but only when it is started.
OTHER_WORDS = {"lr": "learning_rate", "rate": "learning_rate", "learningrate": "learning_rate", "random_seed": "seed"}
OTHER_WORDS |= {"optimiser": "optimizer", "opt": "optimizer", "warm_up": "warmup", "init": "v0", "beta2": "adam_beta2"}
OTHER_WORDS |= {f"{axis}s": axis for axis in AXES} | {"lrs": "learning_rate"}


def lay_out(grids: Iterable[dict], common: Mapping[str, Any], script: str, launch: str) -> list[PlannedRun]:
    """Lay out the runs of all grids in their order; a run equal to an earlier one is left out.

    Args:
        grids: of each, axis -> its values.
        common: the flags that all runs have.
        script, launch: what runs are started with, for their names.

    Raises:
        InputError: what cannot be an axis or a value, flags that contradict each other, two settings of one name.
    """
    runs: dict[str, PlannedRun] = {}
    for number, grid in enumerate(grids, start=1):
        try:
            for run in _lay_out_grid(clean_flags(grid, "grid"), common, script, launch):
                runs.setdefault(run.digest, run)
        except InputError as error:
            raise InputError(f"grids, number {number}: {error}") from None
    _require_one_meaning(runs.values())
    return _name_families(list(runs.values()))


def _lay_out_grid(grid: dict, common: Mapping[str, Any], script: str, launch: str) -> Iterable[PlannedRun]:
    lists = _read_axes(grid)
    lists.setdefault("seed", [common.get("seed", DEFAULT_SEED)])
    axes = {axis: [parse(value) for value in lists.pop(axis)] for axis, parse in PARSERS.items() if axis in lists}
    axes |= {axis: [AxisValue(axis, {axis: value}) for value in values] for axis, values in lists.items()}
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        arguments = merge_axes(common, {axis: value.flags for axis, value in values.items()})
        arguments["learning_rate"] = float(arguments.get("learning_rate", DEFAULT_LEARNING_RATE))
        other = {axis: value.flags[axis] for axis, value in values.items() if axis not in AXES}
        other = {flag: value for flag, value in other.items() if common.get(flag) != value}
        v0, warmup, optimizer = (
            values[axis].name if axis in values else _name_by_flags(axis, arguments) for axis in PARSERS
        )
        named = dict(zip(other, name_flags(other), strict=True))
        parts = [v0] if v0 != NO_V0 else []
        parts += [f"warmup {warmup}"] if warmup != NO_WARMUP else []
        parts += [optimizer] if optimizer != MAIN_OPTIMIZER else []
        setting = " + ".join([*parts, *named.values()]) or NONE
        rate, seed = arguments["learning_rate"], arguments["seed"]
        yield PlannedRun(
            name=make_run_name(setting, rate, seed, script, launch, arguments),
            stage=TUNE,
            condition=", ".join(named[flag] for flag in sorted(named) if not flag.startswith("v0_")),
            family="",
            setting=setting,
            v0=v0,
            warmup=warmup,
            optimizer=optimizer,
            other=other,
            learning_rate=rate,
            seed=seed,
            arguments=arguments,
        )


def _name_by_flags(axis: str, arguments: Mapping[str, Any]) -> str:
    """Name what another axis' mapping has set of an axis that the grid does not have."""
    if axis == "optimizer":
        return MAIN_OPTIMIZER
    if not (has_v0 if axis == "v0" else has_warmup)(arguments):
        return NO_V0 if axis == "v0" else NO_WARMUP
    return " ".join(
        name_flags({flag: arguments[flag] for flag in OWNERS if OWNERS[flag] == axis and arguments.get(flag)})
    )


def _read_axes(grid: dict[str, Any]) -> dict[str, list]:
    """Return the values of each axis of a grid."""
    if not grid:
        raise InputError("it is empty; give at least one axis, such as v0: [zeros, random 100]")
    checks = {"learning_rate": _require_rate, "seed": require_seed}
    lists = {}
    for axis, values in grid.items():
        close = difflib.get_close_matches(axis.lower(), AXES, n=1, cutoff=0.85)
        if axis in OTHER_WORDS or (axis not in AXES and close):
            raise InputError(f"{axis} is no axis; did you mean {OTHER_WORDS.get(axis) or close[0]}?")
        if axis in OWNERS:
            raise InputError(
                f"{axis} is set by the axis {OWNERS[axis]}; write it as a mapping there, {{{axis}: value}}"
            )
        if axis in OF_THE_RUN:
            raise InputError(f"{axis} is set by the comparison for each run; leave it out")
        values = values if isinstance(values, list) else [values]
        if not values:
            raise InputError(f"{axis} has no values; give at least one, or leave the axis out")
        if axis not in PARSERS and any(is_secret(axis, value) for value in values):
            raise InputError(f"{axis} is a secret, by which nothing is compared; give it in `arguments`")
        values = ["no" if value is False and axis.endswith("_strategy") else value for value in values]
        lists[axis] = [checks[axis](value) for value in values] if axis in checks else values
    return lists


def _require_rate(value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise InputError(f"learning_rate: {value!r} must be a number > 0")
    return float(value)


def require_seed(value: Any) -> int:
    """Return a seed.

    Raises:
        InputError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise InputError(f"seed: {value!r} must be a whole number from 0 to 2^32 - 1")
    return value


def clean_flags(flags: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Write flags with underscores; `no` of a strategy, which YAML reads as false, is "no" again."""
    cleaned: dict[str, Any] = {}
    for key, value in flags.items():
        key = str(key).lstrip("-").replace("-", "_")
        if key in cleaned:
            raise InputError(f"{where}: {key} is given twice")
        cleaned[key] = "no" if value is False and key.endswith("_strategy") else value
    return cleaned


def _name_families(runs: list[PlannedRun]) -> list[PlannedRun]:
    """Put every run into its family, by its flags.

    The main optimizer is the first that has a v0 or a warmup anywhere, or else the first; what is trained with another one is a
    family of that optimizer.
    """
    with_either = [run for run in runs if has_v0(run.arguments) or has_warmup(run.arguments)]
    main = get_optimizer((with_either or runs)[0].arguments)
    kinds = {(False, False): NONE, (False, True): WARMUP, (True, False): V0, (True, True): V0_AND_WARMUP}
    named = []
    for run in runs:
        family = kind = kinds[has_v0(run.arguments), has_warmup(run.arguments)]
        if get_optimizer(run.arguments) != main:
            family = run.optimizer if kind == NONE else f"{run.optimizer}, {kind}"
        named.append(replace(run, family=family))
    return named


def _require_one_meaning(runs: Iterable[PlannedRun]) -> None:
    """Refuse two runs that a reader could not tell apart: one setting, rate and seed with different flags."""
    by_place: dict[tuple, PlannedRun] = {}
    for run in runs:
        first = by_place.setdefault((run.setting, run.learning_rate, run.seed), run)
        keys = {*first.arguments, *run.arguments}
        flags = sorted(key for key in keys if first.arguments.get(key) != run.arguments.get(key))
        if flags:
            raise InputError(
                f"grids: two settings are named {run.setting!r} but differ in {', '.join(flags)}; give one another name"
            )
