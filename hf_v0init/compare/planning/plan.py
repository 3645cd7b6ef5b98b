"""From the YAML file of a comparison to its runs: a list of flags and a folder name each. Starts nothing."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import InputError
from ..running.launch import find_script, is_one_process, split_launch
from .axes import (
    DEFAULT_OPTIMIZER,
    NO_V0,
    NO_WARMUP,
    OWNERS,
    combine_axes,
    is_number,
    name_arm,
    name_number,
    parse_optimizer,
    parse_v0,
    parse_warmup,
    suggest,
)
from .metrics import find_direction
from .published import get_published_tables
from .slurm import SlurmSettings, read_slurm

DEFAULT_LEARNING_RATE, DEFAULT_SEED = 5e-5, 42  # transformers'
OF_THE_RUN = ("output_dir", "overwrite_output_dir", "v0_record_run", "resume_from_checkpoint")
# What a comparison needs and a single run does not; `arguments` may say otherwise.
DEFAULT_FLAGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False}
AXES = ("v0", "warmup", "optimizer", "learning_rate", "seed")
# What people write for an axis. A script would refuse most of them as unknown flags, but only when it is started.
OTHER_WORDS = {"lr": "learning_rate", "rate": "learning_rate", "learningrate": "learning_rate", "random_seed": "seed"}
OTHER_WORDS |= {"optimiser": "optimizer", "opt": "optimizer", "warm_up": "warmup", "init": "v0"}
OTHER_WORDS |= {f"{axis}s": axis for axis in AXES} | {"lrs": "learning_rate"}


@dataclass(frozen=True)
class PlannedRun:
    """One run: its folder name, its place in the grid, and all flags but the output folder."""

    name: str
    arm: str
    v0: str
    warmup: str
    optimizer: str
    other: dict[str, Any]
    learning_rate: float
    seed: int
    arguments: dict[str, Any]

    @property
    def digest(self) -> str:
        """The end of the name: a hash of script, launcher and arguments."""
        return self.name.rsplit("_", 1)[-1]


@dataclass(frozen=True)
class StopHopeless:
    """Stop a run whose validation loss, at `after_step` or later, exceeds `above` x the best of any run at that step."""

    after_step: int
    above: float


@dataclass(frozen=True)
class Plan:
    """A comparison: what the file says, and the runs, seed by seed."""

    title: str
    script: str
    runs: tuple[PlannedRun, ...]
    pocket: bool = False
    launch: str = "python"
    metric: str = "eval_loss"
    greater_is_better: bool = False
    test_metrics: tuple[str, ...] = ()
    published: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    keep_models: bool = True
    stop_hopeless: StopHopeless | None = None
    slurm: SlurmSettings | None = None
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON types, as in `plan.json`."""
        return json.loads(json.dumps(asdict(self)))


KEYS = ("title", "pocket", "script", "launch", "arguments_file", "arguments", "metric", "test_metrics", "published")
KEYS += ("greater_is_better", "keep_models", "stop_hopeless", "slurm", "grids")
POCKET_KEYS = ("arguments_file", "arguments", "test_metrics", "grids", "seed")


# ------------------------------------------------------------------------------------------------------- the file


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, `4:00:00` the text that it looks like, and a key given twice an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":int")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if repeated is not None:
            raise yaml.YAMLError(f"the key {repeated!r} is given twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+|0[0-7_]+)$"),
    list("-+0123456789"),
)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping.

    Raises:
        InputError: missing or unreadable, bad syntax (with its line), no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} must be a mapping of names to values")
    return values


def read_plan(path: str | Path, pocket: bool = False) -> Plan:
    """Read the file of a comparison and lay out its runs.

    Args:
        path: the YAML file.
        pocket: take the file's `pocket` mapping in place of what it says at the top: `arguments_file`, `arguments`, `test_metrics`,
            `grids`, and `seed`, which replaces the seeds of every grid. (`pocket: true` marks a file that has one scale only.)

    Raises:
        InputError: an unknown key or value, a flag that an axis owns, an empty grid, two arms of one name, a script or a file
            of arguments that is not there; `pocket` for a file without such a mapping.
    """
    path = Path(path)
    content = read_mapping(path)
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}{suggest(key, KEYS)}; it may have {', '.join(KEYS)}")
    try:
        return _make_plan(_choose_scale(content, pocket), path, pocket)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _choose_scale(content: dict[str, Any], pocket: bool) -> dict[str, Any]:
    """Return the file's content at full or at pocket scale."""
    scale = content.get("pocket", False)
    if isinstance(scale, bool):
        if pocket and not scale:
            raise InputError("--pocket: the file has no pocket scale (a mapping `pocket`); leave the flag out")
        return content
    if not isinstance(scale, dict):
        raise InputError(f"pocket: {scale!r} must be true, false or a mapping of {', '.join(POCKET_KEYS)}")
    for key in scale:
        if key not in POCKET_KEYS:
            raise InputError(f"pocket: unknown key {key!r}{suggest(key, POCKET_KEYS)}; choose {', '.join(POCKET_KEYS)}")
    if not pocket:
        return {**content, "pocket": False}
    seeds, scale = scale.get("seed"), {key: value for key, value in scale.items() if key != "seed"}
    content = {**content, "arguments": {}, **scale, "pocket": True}
    if seeds is not None and isinstance(content.get("grids"), list):
        grids = content["grids"]
        content["grids"] = [{**grid, "seed": seeds} if isinstance(grid, dict) else grid for grid in grids]
    return content


def _make_plan(content: dict[str, Any], path: Path, pocket: bool = False) -> Plan:
    script = find_script(_take(content, "script", str, None), path.parent)
    launch = _take(content, "launch", str, "python")
    split_launch(launch)
    common = _read_common_arguments(content, path.parent)
    grids = content.get("grids")
    grids = [grids] if isinstance(grids, dict) else grids
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
        raise InputError(
            "grids: give a list with at least one mapping of axes to values, such as - v0: [zeros, random 100]"
        )
    identity = {"script": script, "launch": launch}
    runs = list(_lay_out(grids, common, identity))
    _require_one_meaning(runs)
    title = content.get("title", path.stem)
    published = _take_names(content, "published")
    get_published_tables(published)
    metric = _take(content, "metric", str, "eval_loss")
    direction = _take(content, "greater_is_better", bool, None) if "greater_is_better" in content else None
    return Plan(
        title=str(title),
        script=script,
        runs=tuple(_order_by_seed(runs)),
        pocket=_take(content, "pocket", bool, False),
        launch=launch,
        metric=metric,
        greater_is_better=find_direction(metric, direction),
        test_metrics=_take_names(content, "test_metrics"),
        published=published,
        arguments=common,
        keep_models=_take(content, "keep_models", bool, True),
        stop_hopeless=_read_stop_hopeless(content.get("stop_hopeless")),
        slurm=_read_slurm(content.get("slurm"), launch),
        command=f"hf-v0init compare {path.as_posix()} --output_dir FOLDER" + (" --pocket" if pocket else ""),
    )


def _take(content: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key, default)
    if not isinstance(value, kind):
        words = {str: "text", bool: "true or false"}
        raise InputError(f"{key}: {value!r} must be {words[kind]}" if key in content else f"{key} is missing")
    return value


def _take_names(content: dict[str, Any], key: str) -> tuple[str, ...]:
    value = content.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{key}: {value!r} must be a list of names")
    return tuple(value)


def _read_stop_hopeless(value: Any) -> StopHopeless | None:
    if value is None or value is False:
        return None
    if not isinstance(value, dict) or set(value) != {"after_step", "above"}:
        raise InputError(f"stop_hopeless: {value!r}: write {{after_step: 400, above: 1.5}}, or null")
    step, above = value["after_step"], value["above"]
    if not is_number(step) or step < 1 or not float(step).is_integer():
        raise InputError(f"stop_hopeless: after_step={step!r}: must be a whole number of optimizer steps >= 1")
    if not is_number(above) or above <= 1:
        raise InputError(f"stop_hopeless: above={above!r}: must be a factor > 1 on the best validation loss")
    return StopHopeless(int(step), float(above))


def _read_slurm(value: Any, launch: str) -> SlurmSettings | None:
    settings = read_slurm(value)
    if settings is not None and settings.gpus > 1 and is_one_process(launch):
        raise InputError(
            f"slurm: gpus={settings.gpus} with launch: {launch}, where a run is one process and uses one GPU; write launch: torchrun "
            f"--nproc_per_node {settings.gpus}, or gpus: 1"
        )
    return settings


# --------------------------------------------------------------------------------------------------- the arguments


def _read_common_arguments(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read the flags all runs have: this file's over those of `arguments_file` over the defaults of a comparison."""
    from_file: dict[str, Any] = {}
    name = content.get("arguments_file")
    if name is not None:
        place = next((p for p in (Path(str(name)), folder / str(name)) if p.is_file()), None)
        if place is None:
            raise InputError(f"arguments_file: there is no file {name}, here or in {folder}")
        from_file = _clean_flags(read_mapping(place), "arguments_file")
        from_file = {key: value for key, value in from_file.items() if key not in OWNERS and key not in OF_THE_RUN}
    given = content.get("arguments") or {}
    if not isinstance(given, dict):
        raise InputError(f"arguments: {given!r} must be a mapping of flags to values")
    given = _clean_flags(given, "arguments")
    for key in given:
        if key in OWNERS:
            raise InputError(f"arguments: {key} is set by the axis {OWNERS[key]} of a grid; name it there")
        if key in OF_THE_RUN:
            raise InputError(f"arguments: {key} is set by the comparison for each run; leave it out")
    common = {**DEFAULT_FLAGS, **from_file, **given}
    common = {key: value for key, value in common.items() if value is not None}
    if common.get("eval_strategy", "no") != "no":
        common.setdefault("eval_on_start", True)
    return common


def _clean_flags(flags: dict[str, Any], where: str) -> dict[str, Any]:
    """Write flags with underscores; `no` of a strategy, which YAML reads as false, is "no" again."""
    cleaned = {}
    for key, value in flags.items():
        key = key.lstrip("-").replace("-", "_")
        if key in cleaned:
            raise InputError(f"{where}: {key} is given twice")
        cleaned[key] = "no" if value is False and key.endswith("_strategy") else value
    return cleaned


# -------------------------------------------------------------------------------------------------------- the runs


def _lay_out(grids: list[dict], common: dict[str, Any], identity: dict[str, Any]) -> Iterable[PlannedRun]:
    """Yield the runs of all grids in their order; a run equal to an earlier one is left out."""
    seen: set[str] = set()
    for number, grid in enumerate(grids, start=1):
        try:
            axes, further = _read_axes(_clean_flags(grid, "grid"), common)
        except InputError as error:
            raise InputError(f"grids, number {number}: {error}") from None
        for v0, warmup, optimizer, rate, seed, *values in itertools.product(*axes.values(), *further.values()):
            other = {flag: value for flag, value in zip(further, values, strict=True) if common.get(flag) != value}
            flags = combine_axes({**common, **other}, v0, warmup, optimizer)
            flags |= {"learning_rate": rate, "seed": seed}
            flags = {key: value for key, value in flags.items() if value is not None}
            digest = compute_digest({**identity, "arguments": flags})
            if digest not in seen:
                seen.add(digest)
                arm = name_arm(v0, warmup, optimizer, other)
                name = f"{_make_slug(arm)}_lr{name_number(rate)}_seed{seed}_{digest}"
                yield PlannedRun(name, arm, v0.name, warmup.name, optimizer.name, other, rate, seed, flags)


def _read_axes(grid: dict[str, Any], common: dict[str, Any]) -> tuple[dict[str, list], dict[str, list]]:
    """Return the five axes with their values parsed, and the axes of other flags."""
    for axis, values in grid.items():
        if axis in OWNERS:
            raise InputError(f"{axis} is no axis of its own: it belongs to the axis {OWNERS[axis]}")
        if axis in OF_THE_RUN:
            raise InputError(f"{axis} is set by the comparison for each run")
        meant = OTHER_WORDS.get(axis.lower()) or next(iter(difflib.get_close_matches(axis, AXES, 1, 0.8)), axis)
        if meant != axis:
            raise InputError(
                f"{axis} is no axis; did you mean {meant}? (a flag of the script by that name goes into `arguments`)"
            )
        if isinstance(values, list) and not values:
            raise InputError(f"{axis}: an empty list, so there is no run; give at least one value")
    if not grid:
        raise InputError("it is empty; give at least one axis, such as v0: [zeros]")
    lists = {axis: values if isinstance(values, list) else [values] for axis, values in grid.items()}
    lists.setdefault("learning_rate", [common.get("learning_rate", DEFAULT_LEARNING_RATE)])
    lists.setdefault("seed", [common.get("seed", DEFAULT_SEED)])
    axes = {
        "v0": [parse_v0(value) for value in lists.get("v0", [NO_V0])],
        "warmup": [parse_warmup(value) for value in lists.get("warmup", [NO_WARMUP])],
        "optimizer": [parse_optimizer(value) for value in lists.get("optimizer", [DEFAULT_OPTIMIZER])],
        "learning_rate": [_require_rate(value) for value in lists["learning_rate"]],
        "seed": [_require_seed(value) for value in lists["seed"]],
    }
    further = {axis: values for axis, values in lists.items() if axis not in AXES}
    for axis, values in further.items():
        further[axis] = ["no" if value is False and axis.endswith("_strategy") else value for value in values]
    return axes, further


def _require_rate(value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise InputError(f"learning_rate: {value!r} must be a number > 0")
    return float(value)


def _require_seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise InputError(f"seed: {value!r} must be a whole number from 0 to 2^32 - 1")
    return value


def _require_one_meaning(runs: list[PlannedRun]) -> None:
    """Refuse two runs that a reader could not tell apart: one arm, rate and seed with different flags."""
    by_place: dict[tuple, PlannedRun] = {}
    for run in runs:
        first = by_place.setdefault((run.arm, run.learning_rate, run.seed), run)
        if first is not run:
            flags = sorted(
                k for k in {*first.arguments, *run.arguments} if first.arguments.get(k) != run.arguments.get(k)
            )
            raise InputError(
                f"grids: two arms are named {run.arm!r} but differ in {', '.join(flags)}; give one another name"
            )


def _order_by_seed(runs: list[PlannedRun]) -> list[PlannedRun]:
    """Put all runs of the first seed first, so that a comparison that is stopped early compares all arms."""
    seeds = list(dict.fromkeys(run.seed for run in runs))
    return sorted(runs, key=lambda run: seeds.index(run.seed))


def compute_digest(content: Any) -> str:
    """Compute 8 hex digits that say whether two runs have the same flags; 10 and 10.0 are the same."""
    text = json.dumps(_normalize(content), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _normalize(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _normalize(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normalize(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _make_slug(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", text.replace(" + ", "+"))[:60].strip("-")
