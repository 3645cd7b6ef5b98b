"""From the YAML file of a comparison to its runs: a list of flags and a folder name each. Starts nothing.

The file's grids are the first stage, `tune`. When its runs are over, the best setting of each family is trained on fresh seeds: the
second stage, `confirm` (see `stages`). A grid that leaves nothing to choose is its own confirmation.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from .axes import (
    NO_V0,
    NO_WARMUP,
    OF_THE_RUN,
    OWNERS,
    format_value,
    get_optimizer,
    has_v0,
    has_warmup,
    is_number,
    merge_axes,
    parse_optimizer,
    parse_v0,
    parse_warmup,
    suggest,
)
from .files import CONFIRM, TUNE, mask_secrets
from .launch import SCRIPT_MODULES, find_script, is_one_process, split_launch

DEFAULT_LEARNING_RATE, DEFAULT_SEED = 5e-5, 42  # transformers'
DEFAULT_CONFIRM_SEEDS, DEFAULT_MARGIN = 5, "1%"
# What a comparison needs and a single run does not; `arguments` may say otherwise.
DEFAULT_FLAGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False}
PARSERS = {"v0": parse_v0, "warmup": parse_warmup, "optimizer": parse_optimizer}
AXES = (*PARSERS, "learning_rate", "seed")
# What people write for an axis. A script would refuse most of them as unknown flags, but only when it is started.
OTHER_WORDS = {"lr": "learning_rate", "rate": "learning_rate", "learningrate": "learning_rate", "random_seed": "seed"}
OTHER_WORDS |= {"optimiser": "optimizer", "opt": "optimizer", "warm_up": "warmup", "init": "v0", "beta2": "adam_beta2"}
OTHER_WORDS |= {f"{axis}s": axis for axis in AXES} | {"lrs": "learning_rate"}
KEYS = (
    "title",
    "small",
    "script",
    "launch",
    "arguments_file",
    "arguments",
    "metric",
    "greater_is_better",
    "test_metrics",
)
KEYS += ("published", "grids", "confirm_seeds", "extend", "margin", "keep_models", "prune", "slurm")
SMALL_KEYS = ("arguments_file", "arguments", "test_metrics", "grids", "seed", "confirm_seeds")

PUBLISHED_FILE = Path(__file__).with_name("published.csv")  # what the paper reports, by table

NONE, WARMUP, V0, V0_AND_WARMUP = "no warmup", "warmup", "v0", "v0 + warmup"  # the families of the main optimizer

# Words of a metric's name, as `eval_accuracy` has the words eval and accuracy.
HIGHER_IS_BETTER = {
    "accuracy", "acc", "bleu", "sacrebleu", "chrf", "rouge", "rouge1", "rouge2", "rougel", "rougelsum", "meteor", "f1", "precision",
    "recall", "auc", "auroc", "map", "mrr", "ndcg", "matthews", "mcc", "pearson", "pearsonr", "spearman", "spearmanr", "kappa", "r2",
    "iou", "dice", "psnr", "ssim", "comet", "bertscore", "reward", "exact", "similarity",
}  # fmt: skip
LOWER_IS_BETTER = {
    "loss", "perplexity", "ppl", "nll", "entropy", "fid", "kid", "distance", "frechet", "error", "mse", "mae", "rmse", "mape", "wer",
    "cer", "ter", "bpc", "bpb", "brier", "ece",
}  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """One run: its folder name, its place in the grid, and all flags but the output folder.

    A setting is everything but learning rate and seed. `family` is what settings are chosen within, and `condition` the flags that
    are axes of their own (such as `adam_beta2=0.99`): families are compared under one condition.
    """

    name: str
    stage: str
    condition: str
    family: str
    setting: str
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
class Prune:
    """Stop a run of the first stage whose validation loss, at `after_step` or later, exceeds `above` x the best at that step."""

    after_step: int
    above: float


@dataclass(frozen=True)
class Plan:
    """A comparison: what the file says, and the runs, seed by seed."""

    title: str
    script: str
    runs: tuple[PlannedRun, ...]
    confirm_seeds: tuple[int, ...] = ()
    extend: bool = False
    margin: float = 0.01  # how much worse counts as no worse
    margin_is_relative: bool = True  # a fraction of the warmup's mean, not in the metric's unit
    small: bool = False
    launch: str = "python"
    metric: str = "eval_loss"
    greater_is_better: bool = False
    test_metrics: tuple[str, ...] = ()
    published: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    keep_models: bool = True
    prune: Prune | None = None
    slurm: dict[str, Any] = field(default_factory=dict)  # submitit's parameters
    command: str = ""

    def list_runs(self, *stages: str) -> list[PlannedRun]:
        """Return the runs of these stages, in order."""
        return [run for run in self.runs if run.stage in stages]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON types, as in `plan.json`: secrets masked, of each run what the others have not."""
        content = asdict(self) | {
            "arguments": mask_secrets(self.arguments),
            "runs": [self.describe_run(r) for r in self.runs],
        }
        return json.loads(json.dumps(content))

    def describe_run(self, run: PlannedRun) -> dict[str, Any]:
        """Return a run as plain JSON types; its `arguments` are those that differ from the plan's, null for one it lacks."""
        own = {key: value for key, value in run.arguments.items() if self.arguments.get(key) != value}
        own |= {key: None for key in self.arguments if key not in run.arguments}
        return json.loads(json.dumps(asdict(run) | {"arguments": mask_secrets(own)}))

    def add_run(self, like: PlannedRun, **changes: Any) -> Plan:
        """Return the plan with one more run: `like` another, but for these of its fields and, in `arguments`, flags."""
        arguments = {**like.arguments, **changes.pop("arguments", {})}
        run = replace(like, **changes, arguments=arguments)
        arguments |= {"learning_rate": run.learning_rate, "seed": run.seed}
        name = make_run_name(run.setting, run.learning_rate, run.seed, self.script, self.launch, arguments)
        if any(known.digest == name.rsplit("_", 1)[-1] for known in self.runs):
            return self
        return replace(self, runs=(*self.runs, replace(run, name=name, arguments=arguments)))


# ------------------------------------------------------------------------------------------------------- the file


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, `4:00:00` the text that it looks like, and a key given twice an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":int")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"the key {key.value!r} is given twice, again in line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


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
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}{suggest(key, KEYS)}; it may have {', '.join(KEYS)}")
    try:
        return _make_plan(_choose_scale(content, small), path, small)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _choose_scale(content: dict[str, Any], small: bool) -> dict[str, Any]:
    """Return the file's content at full or at small scale."""
    scale = content.get("small", False)
    if isinstance(scale, bool):
        if small and not scale:
            raise InputError("--small: the file has no small scale (a mapping `small`); leave the flag out")
        return content
    if not isinstance(scale, dict):
        raise InputError(f"small: {scale!r} must be true, false or a mapping of {', '.join(SMALL_KEYS)}")
    for key in scale:
        if key not in SMALL_KEYS:
            raise InputError(f"small: unknown key {key!r}{suggest(key, SMALL_KEYS)}; choose {', '.join(SMALL_KEYS)}")
    if not small:
        return {**content, "small": False}
    seeds, scale = scale.get("seed"), {key: value for key, value in scale.items() if key != "seed"}
    content = {**content, "arguments": {}, **scale, "small": True}
    if seeds is not None and isinstance(content.get("grids"), list):
        grids = content["grids"]
        content["grids"] = [{**grid, "seed": seeds} if isinstance(grid, dict) else grid for grid in grids]
    return content


def _make_plan(content: dict[str, Any], path: Path, small: bool) -> Plan:
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
    metric = _take(content, "metric", str, "eval_loss")
    runs = _name_families(list(_lay_out(grids, common, script, launch)))
    _require_one_meaning(runs)
    _require_evaluation(script, metric, runs)
    seeds = list(dict.fromkeys(run.seed for run in runs))
    candidates = {(run.condition, run.family, run.setting, run.learning_rate) for run in runs}
    has_choice = max(Counter(candidate[:2] for candidate in candidates).values()) > 1
    fresh = _read_confirm_seeds(content.get("confirm_seeds", DEFAULT_CONFIRM_SEEDS if has_choice else 0), seeds)
    if not has_choice and not fresh:  # nothing is chosen, so the grid's own seeds judge
        runs = [replace(run, stage=CONFIRM) for run in runs]
    published = _take_names(content, "published")
    known = {line.split(",")[0] for line in PUBLISHED_FILE.read_text(encoding="utf-8").splitlines()[1:]}
    if set(published) - known:
        raise InputError(
            f"published: {', '.join(set(published) - known)}: no such table of the paper; one of {', '.join(sorted(known))}"
        )
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
        test_metrics=_take_names(content, "test_metrics"),
        published=published,
        arguments=common,
        keep_models=_take(content, "keep_models", bool, True),
        prune=_read_prune(content.get("prune")),
        slurm=_read_slurm(content.get("slurm"), launch),
        command=f"hf-v0init compare {path.as_posix()} --output_dir FOLDER" + (" --small" if small else ""),
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


def _find_direction(metric: str, content: Mapping[str, Any]) -> bool:
    """Say whether a greater value of the metric is better: as given, else by its name."""
    if "greater_is_better" in content:
        return _take(dict(content), "greater_is_better", bool, None)
    words = set(metric.lower().replace("-", "_").split("_"))
    higher, lower = bool(words & HIGHER_IS_BETTER), bool(words & LOWER_IS_BETTER)
    if higher == lower:
        raise InputError(
            f"metric: {metric!r}: whether more of it is better cannot be told from its name; write greater_is_better: true or "
            "greater_is_better: false beside it"
        )
    return higher


def _read_confirm_seeds(value: Any, seeds: list[int]) -> tuple[int, ...]:
    """Read how many fresh seeds, or which, confirm: after the highest of the first stage unless they are named."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return tuple(range(max(seeds) + 1, max(seeds) + 1 + value))
    if not isinstance(value, list) or not value:
        raise InputError(f"confirm_seeds: {value!r} must be how many fresh seeds (0 for none), or a list of them")
    fresh = tuple(_require_seed(seed) for seed in value)
    used = sorted(set(fresh) & set(seeds))
    if used or len(set(fresh)) < len(fresh):
        words = (
            f"seed {used[0]} is one of the grids', by which settings are chosen" if used else "a seed is given twice"
        )
        raise InputError(f"confirm_seeds: {list(fresh)}: {words}; give fresh ones, each once")
    return fresh


def _read_margin(value: Any) -> tuple[float, bool]:
    """Read how much worse counts as no worse: '1%' of the warmup's mean, or a number in the metric's unit."""
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*%\s*", str(value))
    number = float(found[1]) / 100 if found else value
    if not is_number(number) or number <= 0:
        raise InputError(
            f"margin: {value!r} must be a percentage of the warmup's mean, such as 1%, or a number > 0 in the metric's unit"
        )
    return float(number), bool(found)


def _read_prune(value: Any) -> Prune | None:
    if value is None or value is False:
        return None
    if not isinstance(value, dict) or set(value) != {"after_step", "above"}:
        raise InputError(f"prune: {value!r}: write {{after_step: 400, above: 1.5}}, or null")
    step, above = value["after_step"], value["above"]
    if not is_number(step) or step < 1 or not float(step).is_integer():
        raise InputError(f"prune: after_step={step!r}: must be a whole number of optimizer steps >= 1")
    if not is_number(above) or above <= 1:
        raise InputError(f"prune: above={above!r}: must be a factor > 1 on the best validation loss")
    return Prune(int(step), float(above))


def _read_slurm(value: Any, launch: str) -> dict[str, Any]:
    """Read what a run asks of the cluster, in submitit's words."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise InputError(
            f"slurm: {value!r} must be a mapping, such as {{partition: gpu, time: 4:00:00, gpus_per_node: 1}}"
        )
    gpus = value.get("gpus_per_node", 1)
    if is_number(gpus) and gpus > 1 and is_one_process(launch):
        raise InputError(
            f"slurm: gpus_per_node={gpus} with launch: {launch}, where a run is one process and uses one GPU; write launch: torchrun "
            f"--nproc_per_node {gpus}, or gpus_per_node: 1"
        )
    return value


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
    cleaned: dict[str, Any] = {}
    for key, value in flags.items():
        key = str(key).lstrip("-").replace("-", "_")
        if key in cleaned:
            raise InputError(f"{where}: {key} is given twice")
        cleaned[key] = "no" if value is False and key.endswith("_strategy") else value
    return cleaned


def _require_evaluation(script: str, metric: str, runs: Iterable[PlannedRun]) -> None:
    """Refuse runs of the package's scripts that evaluate nothing: by their flags they would leave no metric."""
    for run in runs:
        flags = run.arguments
        evaluates = flags.get("do_eval") or flags.get("eval_strategy", "no") != "no"
        if script in SCRIPT_MODULES and metric.startswith("eval_") and not evaluates:
            raise InputError(
                f"metric: {metric} is of an evaluation, and there is none: write do_eval: true in `arguments`"
            )


# -------------------------------------------------------------------------------------------------------- the runs


def _lay_out(grids: list[dict], common: dict[str, Any], script: str, launch: str) -> Iterable[PlannedRun]:
    """Yield the runs of all grids in their order; a run equal to an earlier one is left out."""
    seen: set[str] = set()
    for number, grid in enumerate(grids, start=1):
        try:
            for run in _lay_out_grid(_clean_flags(grid, "grid"), common, script, launch):
                if run.digest not in seen:
                    seen.add(run.digest)
                    yield run
        except InputError as error:
            raise InputError(f"grids, number {number}: {error}") from None


def _lay_out_grid(grid: dict[str, Any], common: dict[str, Any], script: str, launch: str) -> Iterable[PlannedRun]:
    lists = _read_axes(grid)
    words = {axis: [parse(value) for value in lists.pop(axis)] for axis, parse in PARSERS.items() if axis in lists}
    lists.setdefault("seed", [common.get("seed", DEFAULT_SEED)])
    for named in itertools.product(*words.values()):
        values = dict(zip(words, named, strict=True))
        for further in itertools.product(*lists.values()):
            flags = dict(zip(lists, further, strict=True))
            given = {axis: value.flags for axis, value in values.items()} | {
                axis: {axis: flags[axis]} for axis in lists
            }
            other = {k: v for k, v in flags.items() if k not in AXES and common.get(k) != v}
            arguments = merge_axes(common, given)
            rate = float(arguments.setdefault("learning_rate", DEFAULT_LEARNING_RATE))
            arguments["learning_rate"] = rate
            v0 = values["v0"].name if "v0" in values else _name_by_flags("v0", arguments, NO_V0)
            warmup = values["warmup"].name if "warmup" in values else _name_by_flags("warmup", arguments, NO_WARMUP)
            optimizer = values["optimizer"].name if "optimizer" in values else "adamw"
            condition = ", ".join(f"{k}={format_value(v)}" for k, v in sorted(other.items()) if not k.startswith("v0_"))
            parts = [v0] if v0 != NO_V0 else []
            parts += [f"warmup {warmup}"] if warmup != NO_WARMUP else []
            parts += [optimizer] if optimizer != "adamw" else []
            parts += [f"{flag}={format_value(value)}" for flag, value in other.items()]
            setting = " + ".join(parts) or NONE
            name = make_run_name(setting, rate, arguments["seed"], script, launch, arguments)
            yield PlannedRun(
                name, TUNE, condition, "", setting, v0, warmup, optimizer, other, rate, arguments["seed"], arguments
            )


def _name_by_flags(axis: str, arguments: Mapping[str, Any], absent: str) -> str:
    """Name what another axis' mapping has set of an axis that the grid does not have."""
    if not (has_v0 if axis == "v0" else has_warmup)(arguments):
        return absent
    flags = [flag for flag, owner in OWNERS.items() if owner == axis and arguments.get(flag)]
    return " ".join(f"{flag}={format_value(arguments[flag])}" for flag in flags)


def _read_axes(grid: dict[str, Any]) -> dict[str, list]:
    """Return the values of each axis of a grid."""
    if not grid:
        raise InputError("it is empty; give at least one axis, such as v0: [zeros, random 100]")
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
        values = ["no" if value is False and axis.endswith("_strategy") else value for value in values]
        check = {"learning_rate": _require_rate, "seed": _require_seed}.get(axis)
        lists[axis] = [check(value) for value in values] if check else values
    return lists


def _require_rate(value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise InputError(f"learning_rate: {value!r} must be a number > 0")
    return float(value)


def _require_seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise InputError(f"seed: {value!r} must be a whole number from 0 to 2^32 - 1")
    return value


def _name_families(runs: list[PlannedRun]) -> list[PlannedRun]:
    """Put every run into its family, by its flags.

    The main optimizer is the first that has a v0 or a warmup anywhere, or else the first; what is trained with another one is a
    family of that optimizer.
    """
    with_either = [run for run in runs if has_v0(run.arguments) or has_warmup(run.arguments)]
    main = get_optimizer((with_either or runs)[0].arguments)
    named = []
    for run in runs:
        kind = {(False, False): NONE, (False, True): WARMUP, (True, False): V0, (True, True): V0_AND_WARMUP}[
            has_v0(run.arguments), has_warmup(run.arguments)
        ]
        other = get_optimizer(run.arguments) != main
        family = kind if not other else run.optimizer if kind == NONE else f"{run.optimizer}, {kind}"
        named.append(replace(run, family=family))
    return named


def _require_one_meaning(runs: list[PlannedRun]) -> None:
    """Refuse two runs that a reader could not tell apart: one setting, rate and seed with different flags."""
    by_place: dict[tuple, PlannedRun] = {}
    for run in runs:
        first = by_place.setdefault((run.setting, run.learning_rate, run.seed), run)
        if first is not run:
            keys = {*first.arguments, *run.arguments}
            flags = sorted(key for key in keys if first.arguments.get(key) != run.arguments.get(key))
            raise InputError(
                f"grids: two settings are named {run.setting!r} but differ in {', '.join(flags)}; give one another name"
            )


def make_run_name(setting: str, rate: float, seed: int, script: str, launch: str, arguments: Mapping[str, Any]) -> str:
    """Name a run's folder: its place in the grid, and a hash of script, launcher and flags, secrets left out."""
    digest = _compute_digest({"script": script, "launch": launch, "arguments": mask_secrets(dict(arguments))})
    slug = re.sub(r"[^\w.+=-]+", "-", setting.replace(" + ", "+"))[:60].strip("-")
    return f"{slug}_lr{rate:g}_seed{seed}_{digest}"


def _compute_digest(content: Any) -> str:
    """Compute 8 hex digits that say whether two runs have the same flags; 10 and 10.0 are the same."""
    return hashlib.sha256(json.dumps(_normalize(content), sort_keys=True).encode()).hexdigest()[:8]


def _normalize(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _normalize(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normalize(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
