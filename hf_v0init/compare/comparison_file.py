"""Reads the YAML file of a comparison: its keys, their defaults, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..yaml_file import read_mapping
from .axes import OF_THE_RUN, OWNERS, clean_flags, suggest
from .files import CONFIRM
from .grid import lay_out, require_number
from .launch import SCRIPT_MODULES, find_script, split_launch
from .plan import Plan, PlannedRun

DEFAULT_CONFIRM_SEEDS, DEFAULT_MARGIN = 5, "1%"
# What a comparison needs and a single run does not; `arguments` may say otherwise.
DEFAULT_FLAGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False}
KEYS = (
    "title small script launch arguments_file arguments metric greater_is_better test_metrics grids confirm_seeds extend "
    "margin keep_models slurm"
).split()
SMALL_KEYS = ("arguments_file", "arguments", "test_metrics", "grids", "seed", "confirm_seeds")
KINDS = {str: "text", bool: "true or false", dict: "a mapping", list: "a list"}


def read_plan(path: str | Path, small: bool = False) -> Plan:
    """Read the file of a comparison and lay out the runs of its first stage.

    Args:
        path: the YAML file.
        small: take the file's `small` mapping in place of what it says at the top: `arguments_file`, `arguments`, `test_metrics`,
            `grids`, `confirm_seeds`, and `seed`, which replaces the seeds of every grid. (`small: true` marks a file that has one
            scale only.)

    Raises:
        InputError: an unknown key or value, a flag that an axis owns, an empty grid, two settings of one name, a script or a file
            of arguments that is not there; `small` for a file without such a mapping.
    """
    path = Path(path)
    content = read_mapping(path)
    try:
        _require_keys(content, KEYS)
        return _make_plan(_choose_scale(content, small), path, small)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _require_keys(content: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in content:
        if key not in known:
            raise InputError(f"unknown key {key!r}{suggest(key, known)}; choose {', '.join(known)}")


def _choose_scale(content: dict[str, Any], small: bool) -> dict[str, Any]:
    """Return the file's content at full or at small scale."""
    scale = content.get("small", False)
    if small and not scale:
        raise InputError("--small: the file has no small scale (a mapping `small`); leave the flag out")
    if isinstance(scale, bool):
        return content
    scale = _take(content, "small", dict)
    _require_keys(scale, SMALL_KEYS)
    if not small:
        return {**content, "small": False}
    content = {**content, "arguments": {}, **scale, "small": True}
    seed = content.pop("seed", None)
    if seed is not None:
        content["grids"] = [{**grid, "seed": seed} for grid in _take_grids(content)]
    return content


def _make_plan(content: dict[str, Any], path: Path, small: bool) -> Plan:
    script = find_script(_take(content, "script", str), path.parent)
    launch = _take(content, "launch", str, "python")
    split_launch(launch)
    common = _read_common_arguments(content, path.parent)
    metric = _take(content, "metric", str, "eval_loss")
    runs = lay_out(_take_grids(content), common, script, launch)
    _require_evaluation(script, metric, runs)
    seeds = list(dict.fromkeys(run.seed for run in runs))
    candidates = {(run.condition, run.family, run.setting, run.learning_rate) for run in runs}
    has_choice = max(Counter(candidate[:2] for candidate in candidates).values()) > 1
    fresh = _read_confirm_seeds(content.get("confirm_seeds", DEFAULT_CONFIRM_SEEDS if has_choice else 0), seeds)
    if not has_choice and not fresh:  # nothing is chosen, so the grid's own seeds judge
        runs = [replace(run, stage=CONFIRM) for run in runs]
    margin, is_relative = _read_margin(content.get("margin", DEFAULT_MARGIN))
    return Plan(
        title=str(content.get("title", path.stem)),
        script=script,
        runs=tuple(sorted(runs, key=lambda run: seeds.index(run.seed))),  # stopped early, it has compared all settings
        confirm_seeds=fresh,
        extend=_take(content, "extend", bool, False),
        margin=margin,
        margin_is_relative=is_relative,
        small=_take(content, "small", bool, False),
        launch=launch,
        metric=metric,
        greater_is_better=_find_direction(metric, content),
        test_metrics=tuple(_take(content, "test_metrics", list, [])),
        arguments=common,
        keep_models=_take(content, "keep_models", bool, True),
        slurm=_take(content, "slurm", dict, {}),
        command=f"hf-v0init compare {path.as_posix()} --output_dir FOLDER" + (" --small" if small else ""),
    )


def _take(content: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = default if content.get(key) is None else content[key]
    if not isinstance(value, kind):
        raise InputError(f"{key} is missing" if value is None else f"{key}: {value!r} must be {KINDS[kind]}")
    return value


def _take_grids(content: Mapping[str, Any]) -> list[dict]:
    grids = [content["grids"]] if isinstance(content.get("grids"), dict) else _take(content, "grids", list)
    if not grids or not all(isinstance(grid, dict) and grid for grid in grids):
        raise InputError("grids: each must be a mapping of axes to values, such as - v0: [zeros, random 100]")
    return grids


def _find_direction(metric: str, content: Mapping[str, Any]) -> bool:
    """Say whether a greater value of the metric is better: as given, else not of a loss or perplexity."""
    if "greater_is_better" not in content and not metric.endswith(("loss", "perplexity")):
        raise InputError(
            f"metric: {metric}: write beside it whether more of it is better, greater_is_better: true or false"
        )
    return _take(content, "greater_is_better", bool, False)


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
    if content.get("arguments_file") is not None:
        name = Path(_take(content, "arguments_file", str))
        from_file = clean_flags(read_mapping(name if name.is_file() else folder / name))
        from_file = {key: value for key, value in from_file.items() if key not in OWNERS and key not in OF_THE_RUN}
    given = clean_flags(_take(content, "arguments", dict, {}))
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


def _require_evaluation(script: str, metric: str, runs: Iterable[PlannedRun]) -> None:
    """Refuse runs of the package's scripts that evaluate nothing: by their flags they would leave no metric."""
    for run in runs:
        evaluates = run.arguments.get("do_eval") or run.arguments.get("eval_strategy", "no") != "no"
        if script in SCRIPT_MODULES and metric.startswith("eval_") and not evaluates:
            raise InputError(
                f"metric: {metric} is of an evaluation, and there is none: write do_eval: true in `arguments`"
            )
