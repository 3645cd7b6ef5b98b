"""Lays out the runs of a comparison's grids: each the product of its axes, named, and sorted into families."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from . import axes
from .files import TUNE, is_secret
from .plan import NONE, V0, V0_AND_WARMUP, WARMUP, PlannedRun, make_run_name

DEFAULT_LEARNING_RATE, DEFAULT_SEED = 5e-5, 42  # transformers'
PARSERS = {"v0": axes.parse_v0, "warmup": axes.parse_warmup, "optimizer": axes.parse_optimizer}
AXES = (*PARSERS, "learning_rate", "seed")


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
            for run in _lay_out_grid(axes.clean_flags(grid), common, script, launch):
                runs.setdefault(run.digest, run)
        except InputError as error:
            raise InputError(f"grids, number {number}: {error}") from None
    _require_one_meaning(runs.values())
    return _name_families(list(runs.values()))


def _lay_out_grid(grid: dict, common: Mapping[str, Any], script: str, launch: str) -> Iterable[PlannedRun]:
    lists = _read_axes(grid)
    lists.setdefault("seed", [common.get("seed", DEFAULT_SEED)])
    by_axis = {axis: [parse(value) for value in lists.pop(axis)] for axis, parse in PARSERS.items() if axis in lists}
    by_axis |= {axis: [axes.AxisValue(axis, {axis: value}) for value in values] for axis, values in lists.items()}
    for combination in itertools.product(*by_axis.values()):
        values = dict(zip(by_axis, combination, strict=True))
        arguments = axes.merge_axes(common, {axis: value.flags for axis, value in values.items()})
        rate = require_number("learning_rate", arguments.get("learning_rate", DEFAULT_LEARNING_RATE))
        arguments["learning_rate"] = rate
        other = {axis: value.flags[axis] for axis, value in values.items() if axis not in AXES}
        other = {flag: value for flag, value in other.items() if common.get(flag) != value}
        named = dict(zip(other, axes.name_flags(other), strict=True))
        v0, warmup, optimizer = (
            values[axis].name if axis in values else _name_by_flags(axis, arguments) for axis in PARSERS
        )
        parts = [v0] if v0 != axes.NO_V0 or axes.has_v0(arguments) else []
        parts += [f"warmup {warmup}"] if warmup != axes.NO_WARMUP or axes.has_warmup(arguments) else []
        is_other = (
            "optimizer" in values and axes.get_optimizer(arguments) != axes.OPTIMIZERS[axes.MAIN_OPTIMIZER]["optim"]
        )
        parts += [optimizer] if optimizer != axes.MAIN_OPTIMIZER or is_other else []
        setting = " + ".join([*parts, *named.values()]) or NONE
        yield PlannedRun(
            name=make_run_name(setting, rate, arguments["seed"], script, launch, arguments),
            stage=TUNE,
            condition=", ".join(named[flag] for flag in sorted(named) if not flag.startswith("v0_")),
            family="",
            setting=setting,
            v0=v0,
            warmup=warmup,
            optimizer=optimizer,
            other=other,
            learning_rate=rate,
            seed=arguments["seed"],
            arguments=arguments,
        )


def _name_by_flags(axis: str, arguments: Mapping[str, Any]) -> str:
    """Name what another axis' mapping has set of an axis that the grid does not have."""
    if axis == "optimizer":
        return axes.MAIN_OPTIMIZER
    if not (axes.has_v0 if axis == "v0" else axes.has_warmup)(arguments):
        return axes.NO_V0 if axis == "v0" else axes.NO_WARMUP
    flags = {flag: arguments[flag] for flag, owner in axes.OWNERS.items() if owner == axis and arguments.get(flag)}
    return " ".join(axes.name_flags(flags))


def _read_axes(grid: dict[str, Any]) -> dict[str, list]:
    """Return the values of each axis of a grid."""
    lists = {}
    for axis, values in grid.items():
        if axis in axes.OWNERS:
            owner = axes.OWNERS[axis]
            raise InputError(f"{axis} is set by the axis {owner}; write it as a mapping there, {{{axis}: value}}")
        values = values if isinstance(values, list) else [values]
        if not values:
            raise InputError(f"{axis} has no values; give at least one, or leave the axis out")
        if axis not in PARSERS and any(is_secret(axis, value) for value in values):
            raise InputError(f"{axis} is a secret, by which nothing is compared; give it in `arguments`")
        if axis in ("learning_rate", "seed"):
            kind = int if axis == "seed" else float
            values = [require_number(axis, value, kind) for value in values]
        lists[axis] = [axes.clean_flags({axis: value})[axis] for value in values]
    return lists


def require_number(name: str, value: Any, kind: type = float) -> Any:
    """Return a value as a number of this kind, > 0 or, if it is whole, >= 0.

    Raises:
        InputError: it is none.
    """
    if not axes.is_number(value) or value < 0 or kind(value) != value or (kind is float and value == 0):
        raise InputError(f"{name}: {value!r} must be a {'whole number >= 0' if kind is int else 'number > 0'}")
    return kind(value)


def _name_families(runs: list[PlannedRun]) -> list[PlannedRun]:
    """Put every run into its family, by its flags.

    The main optimizer is the first that has a v0 or a warmup anywhere, or else the first; what is trained with another one is a
    family of that optimizer.
    """
    with_either = [run for run in runs if axes.has_v0(run.arguments) or axes.has_warmup(run.arguments)]
    main = axes.get_optimizer((with_either or runs)[0].arguments)
    kinds = {(False, False): NONE, (False, True): WARMUP, (True, False): V0, (True, True): V0_AND_WARMUP}
    named = []
    for run in runs:
        family = kind = kinds[axes.has_v0(run.arguments), axes.has_warmup(run.arguments)]
        if axes.get_optimizer(run.arguments) != main:
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
