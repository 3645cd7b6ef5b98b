"""Reads the YAML file of a comparison, and lays out the runs of its grids.

Each grid is the product of its axes; its runs are named, and sorted into families.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..yaml_file import read_mapping
from . import axes
from .axes import OF_THE_RUN, OWNERS, clean_flags, suggest
from .files import CONFIRM, TUNE, is_secret
from .launch import SCRIPT_MODULES, find_script, split_launch
from .plan import NONE, V0, V0_AND_WARMUP, WARMUP, Plan, PlannedRun, make_run_name

DEFAULT_LEARNING_RATE, DEFAULT_SEED = 5e-5, 42  # transformers'
AXES = ("v0", "warmup", "optimizer", "learning_rate", "seed")
DEFAULT_CONFIRM_SEEDS, DEFAULT_MARGIN = 5, "1%"
# What a comparison needs and a single run does not; `arguments` may say otherwise.
DEFAULT_FLAGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False}
# Of keys whose value is of one kind; those of `AS_GIVEN` are the plan's as they are.
KINDS: dict[str, type] = dict.fromkeys(("script", "launch", "arguments_file", "metric"), str)
KINDS |= dict.fromkeys(("arguments", "slurm"), dict) | {"test_metrics": list}
KINDS |= dict.fromkeys(("greater_is_better", "extend", "keep_models"), bool)
AS_GIVEN = ("launch", "metric", "greater_is_better", "extend", "keep_models", "slurm")
KEYS = ("title", "small", "grids", "confirm_seeds", "margin", *KINDS)
SMALL_KEYS = ("arguments_file", "arguments", "test_metrics", "grids", "seed", "confirm_seeds")
KIND_WORDS = {str: "text", bool: "true or false", dict: "a mapping", list: "a list"}


def read_plan(path: str | Path, small: bool = False) -> Plan:
    """Read the file of a comparison and lay out the runs of its first stage.

    Args:
        path: the YAML file.
        small: take the file's `small` mapping in place of what it says at the top; its `seed` replaces those of every grid.
            (`small: true` marks a file that has one scale only.)

    Raises:
        InputError: an unknown key or value, a flag that an axis owns, an empty grid, two settings of one name, a script or a file
            of arguments that is not there; `small` for a file without such a mapping.
    """
    path = Path(path)
    content = read_mapping(path)
    try:
        command = f"hf-v0init compare {path.as_posix()} --output_dir FOLDER" + (" --small" if small else "")
        return _make_plan(_choose_scale(_take_known(content, KEYS), small), path, command)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _take_known(content: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return the keys that have a value; refuse unknown ones, and values of another kind."""
    for key, value in content.items():
        if key not in known:
            raise InputError(f"unknown key {key!r}{suggest(key, known)}; choose {', '.join(known)}")
        if value is not None and not isinstance(value, KINDS.get(key, object)):
            raise InputError(f"{key}: {value!r} must be {KIND_WORDS[KINDS[key]]}")
    return {key: value for key, value in content.items() if value is not None}


def _choose_scale(content: dict[str, Any], small: bool) -> dict[str, Any]:
    """Return the file's content at full or at small scale."""
    scale = content.get("small", False)
    if not isinstance(scale, bool | dict):
        raise InputError(f"small: {scale!r} must be true, false or a mapping")
    if small and not scale:
        raise InputError("--small: the file has no small scale (a mapping `small`); leave the flag out")
    if isinstance(scale, bool):
        return content
    _take_known(scale, SMALL_KEYS)
    if not small:
        return {**content, "small": False}
    content = {**content, "arguments": {}, **scale, "small": True}  # null takes away what the full scale has
    content = {key: value for key, value in content.items() if value is not None}
    seed = content.pop("seed", None)
    return content if seed is None else {**content, "grids": [{**grid, "seed": seed} for grid in _take_grids(content)]}


def _make_plan(content: dict[str, Any], path: Path, command: str) -> Plan:
    if "script" not in content:
        raise InputError("script is missing")
    plan = Plan(
        title=str(content.get("title", path.stem)),
        script=find_script(content["script"], path.parent),
        runs=(),
        small=content.get("small", False),
        test_metrics=tuple(content.get("test_metrics", [])),
        arguments=_read_common_arguments(content, path.parent),
        command=command,
        **{key: content[key] for key in AS_GIVEN if key in content},
    )
    split_launch(plan.launch)
    if "greater_is_better" not in content and not plan.metric.endswith(("loss", "perplexity")):
        raise InputError(
            f"metric: {plan.metric}: write beside it whether more of it is better, greater_is_better: true or false"
        )
    runs = _lay_out(_take_grids(content), plan)
    _require_evaluation(plan, runs)
    seeds = list(dict.fromkeys(run.seed for run in runs))
    candidates = {(run.condition, run.family, run.setting, run.learning_rate) for run in runs}
    has_choice = max(Counter(candidate[:2] for candidate in candidates).values()) > 1
    fresh = _read_confirm_seeds(content.get("confirm_seeds", DEFAULT_CONFIRM_SEEDS if has_choice else 0), seeds)
    if not has_choice and not fresh:  # nothing is chosen, so the grid's own seeds judge
        runs = [replace(run, stage=CONFIRM) for run in runs]
    runs = tuple(sorted(runs, key=lambda run: seeds.index(run.seed)))  # stopped early, it has compared all settings
    margin, is_relative = _read_margin(content.get("margin", DEFAULT_MARGIN))
    return replace(plan, runs=runs, confirm_seeds=fresh, margin=margin, margin_is_relative=is_relative)


def _take_grids(content: Mapping[str, Any]) -> list[dict]:
    grids = content.get("grids")
    grids = [grids] if isinstance(grids, dict) else grids
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) and grid for grid in grids):
        raise InputError("grids: needs at least one mapping of axes to values, such as - v0: [zeros, data_driven]")
    return grids


def _read_confirm_seeds(value: Any, seeds: list[int]) -> tuple[int, ...]:
    """Read how many fresh seeds, or which, confirm: after the highest of the first stage unless they are named."""
    if not isinstance(value, list):
        value = range(max(seeds) + 1, max(seeds) + 1 + require_number("confirm_seeds", value, int))
    fresh = [require_number("confirm_seeds", seed, int) for seed in value]
    if set(fresh) & set(seeds) or len(set(fresh)) < len(fresh):
        raise InputError(f"confirm_seeds: {fresh}: give fresh ones, each once; the grids have {seeds}")
    return tuple(fresh)


def _read_margin(value: Any) -> tuple[float, bool]:
    """Read how much worse counts as no worse: '1%' of the warmup's mean, or a number in the metric's unit."""
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*%\s*", str(value))
    return require_number("margin", float(found[1]) / 100 if found else value), bool(found)


def _read_common_arguments(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Read the flags all runs have: this file's over those of `arguments_file` over the defaults of a comparison."""
    from_file: dict[str, Any] = {}
    if "arguments_file" in content:
        name = Path(content["arguments_file"])
        from_file = clean_flags(read_mapping(name if name.is_file() else folder / name))
        from_file = {key: value for key, value in from_file.items() if key not in OWNERS and key not in OF_THE_RUN}
    given = clean_flags(content.get("arguments", {}))
    for key in given:
        if key in OWNERS or key in OF_THE_RUN:
            owner = (
                f"the axis {OWNERS[key]} of a grid; name it there" if key in OWNERS else "the comparison; leave it out"
            )
            raise InputError(f"arguments: {key} is set by {owner}")
    common = {key: value for key, value in {**DEFAULT_FLAGS, **from_file, **given}.items() if value is not None}
    if common.get("eval_strategy", "no") != "no":
        common.setdefault("eval_on_start", True)
    return common


def _require_evaluation(plan: Plan, runs: Iterable[PlannedRun]) -> None:
    """Refuse runs of the package's scripts that evaluate nothing: by their flags they would leave no metric."""
    flags = [run.arguments for run in runs if plan.script in SCRIPT_MODULES and plan.metric.startswith("eval_")]
    if not all(given.get("do_eval") or given.get("eval_strategy", "no") != "no" for given in flags):
        raise InputError(
            f"metric: {plan.metric} is of an evaluation, and there is none: write do_eval: true in `arguments`"
        )


# ------------------------------------------------------------------------------------------------------- the grids


def _lay_out(grids: Iterable[dict], plan: Plan) -> list[PlannedRun]:
    """Lay out the runs of all grids in their order; a run equal to an earlier one is left out."""
    runs: dict[str, PlannedRun] = {}
    for number, grid in enumerate(grids, start=1):
        try:
            for run in _lay_out_grid(axes.clean_flags(grid), plan):
                runs.setdefault(run.digest, run)
        except InputError as error:
            raise InputError(f"grids, number {number}: {error}") from None
    _require_one_meaning(runs.values())
    return _name_families(list(runs.values()))


def _lay_out_grid(grid: dict, plan: Plan) -> Iterable[PlannedRun]:
    lists, common = _read_axes(grid), plan.arguments
    lists.setdefault("seed", [common.get("seed", DEFAULT_SEED)])
    by_axis = {axis: [axes.parse_value(axis, value) for value in lists.pop(axis)] for axis in AXES[:3] if axis in lists}
    by_axis |= {axis: [axes.AxisValue(axis, {axis: value}) for value in values] for axis, values in lists.items()}
    for combination in itertools.product(*by_axis.values()):
        values = dict(zip(by_axis, combination, strict=True))
        arguments = axes.merge_axes(common, {axis: value.flags for axis, value in values.items()})
        rate = require_number("learning_rate", arguments.get("learning_rate", DEFAULT_LEARNING_RATE))
        arguments["learning_rate"] = rate
        other = {axis: value.flags[axis] for axis, value in values.items() if axis not in AXES}
        other = {flag: value for flag, value in other.items() if common.get(flag) != value}
        named = dict(zip(other, axes.name_flags(other), strict=True))
        words = {axis: values[axis].name if axis in values else _name_by_flags(axis, arguments) for axis in AXES[:3]}
        v0, warmup, optimizer = words.values()
        parts = [v0] if v0 != axes.NO_V0 or axes.has_v0(arguments) else []
        parts += [f"warmup {warmup}"] if warmup != axes.NO_WARMUP or axes.has_warmup(arguments) else []
        is_other = (
            "optimizer" in values and axes.get_optimizer(arguments) != axes.OPTIMIZERS[axes.MAIN_OPTIMIZER]["optim"]
        )
        parts += [optimizer] if optimizer != axes.MAIN_OPTIMIZER or is_other else []
        setting = " + ".join([*parts, *named.values()]) or NONE
        yield PlannedRun(
            name=make_run_name(setting, rate, arguments["seed"], plan.script, plan.launch, arguments),
            stage=TUNE,
            condition=", ".join(named[flag] for flag in sorted(named) if not flag.startswith("v0_")),
            family="",
            setting=setting,
            **words,
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
        if axis not in AXES and any(is_secret(axis, value) for value in values):
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
