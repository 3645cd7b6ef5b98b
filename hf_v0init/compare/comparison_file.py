"""Reads the YAML file of a comparison: its keys, their defaults, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..errors import InputError
from .axes import OF_THE_RUN, OWNERS, is_number, suggest
from .files import CONFIRM
from .grid import clean_flags, lay_out, require_seed
from .launch import SCRIPT_MODULES, find_script, is_one_process, split_launch
from .plan import Plan, PlannedRun, Prune

DEFAULT_CONFIRM_SEEDS, DEFAULT_MARGIN = 5, "1%"
# What a comparison needs and a single run does not; `arguments` may say otherwise.
DEFAULT_FLAGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False}
KEYS = (
    "title small script launch arguments_file arguments metric greater_is_better test_metrics published grids confirm_seeds "
    "extend margin keep_models prune slurm"
).split()
SMALL_KEYS = ("arguments_file", "arguments", "test_metrics", "grids", "seed", "confirm_seeds")
PUBLISHED_FILE = Path(__file__).with_name("published.csv")  # what the paper reports, by table

# Words of a metric's name, as `eval_accuracy` has the words eval and accuracy.
HIGHER_IS_BETTER = set(
    "accuracy acc bleu sacrebleu chrf rouge rouge1 rouge2 rougel rougelsum meteor f1 precision recall auc auroc map mrr ndcg "
    "matthews mcc pearson pearsonr spearman spearmanr kappa r2 iou dice psnr ssim comet bertscore reward exact similarity".split()
)
LOWER_IS_BETTER = set(
    "loss perplexity ppl nll entropy fid kid distance frechet error mse mae rmse mape wer cer ter bpc bpb brier ece".split()
)


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
    if isinstance(scale, bool):
        if small and not scale:
            raise InputError("--small: the file has no small scale (a mapping `small`); leave the flag out")
        return content
    if not isinstance(scale, dict):
        raise InputError(f"small: {scale!r} must be true, false or a mapping of {', '.join(SMALL_KEYS)}")
    try:
        _require_keys(scale, SMALL_KEYS)
    except InputError as error:
        raise InputError(f"small: {error}") from None
    if not small:
        return {**content, "small": False}
    content = {**content, "arguments": {}, **scale, "small": True}
    seed = content.pop("seed", None)
    if seed is not None and isinstance(content.get("grids"), list):
        content["grids"] = [{**grid, "seed": seed} if isinstance(grid, dict) else grid for grid in content["grids"]]
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
    runs = lay_out(grids, common, script, launch)
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
        test_metrics=_take_names(content, "test_metrics"),
        published=_read_published(content),
        arguments=common,
        keep_models=_take(content, "keep_models", bool, True),
        prune=_read_prune(content.get("prune")),
        slurm=_read_slurm(content.get("slurm"), launch),
        command=f"hf-v0init compare {path.as_posix()} --output_dir FOLDER" + (" --small" if small else ""),
    )


def _take(content: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key, default)
    if not isinstance(value, kind):
        words = {str: "text", bool: "true or false"}
        raise InputError(f"{key}: {value!r} must be {words[kind]}" if key in content else f"{key} is missing")
    return value


def _take_names(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = content.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{key}: {value!r} must be a list of names")
    return tuple(value)


def _find_direction(metric: str, content: Mapping[str, Any]) -> bool:
    """Say whether a greater value of the metric is better: as given, else by its name."""
    if "greater_is_better" in content:
        return _take(content, "greater_is_better", bool, None)
    words = set(metric.lower().replace("-", "_").split("_"))
    higher, lower = bool(words & HIGHER_IS_BETTER), bool(words & LOWER_IS_BETTER)
    if higher == lower:
        raise InputError(
            f"metric: {metric!r}: whether more of it is better cannot be told from its name; write greater_is_better: true or "
            "greater_is_better: false beside it"
        )
    return higher


def _read_published(content: Mapping[str, Any]) -> tuple[str, ...]:
    names = _take_names(content, "published")
    known = sorted(set(pd.read_csv(PUBLISHED_FILE)["table"])) if names else []
    for name in names:
        if name not in known:
            raise InputError(f"published: {name}: no such table of the paper; one of {', '.join(known)}")
    return names


def _read_confirm_seeds(value: Any, seeds: list[int]) -> tuple[int, ...]:
    """Read how many fresh seeds, or which, confirm: after the highest of the first stage unless they are named."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return tuple(range(max(seeds) + 1, max(seeds) + 1 + value))
    if not isinstance(value, list) or not value:
        raise InputError(f"confirm_seeds: {value!r} must be how many fresh seeds (0 for none), or a list of them")
    fresh = tuple(require_seed(seed) for seed in value)
    used = sorted(set(fresh) & set(seeds))
    if used or len(set(fresh)) < len(fresh):
        what = f"seed {used[0]} is one of the grids', by which settings are chosen" if used else "a seed is given twice"
        raise InputError(f"confirm_seeds: {list(fresh)}: {what}; give fresh ones, each once")
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


def _read_common_arguments(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Read the flags all runs have: this file's over those of `arguments_file` over the defaults of a comparison."""
    from_file: dict[str, Any] = {}
    name = content.get("arguments_file")
    if name is not None:
        place = next((p for p in (Path(str(name)), folder / str(name)) if p.is_file()), None)
        if place is None:
            raise InputError(f"arguments_file: there is no file {name}, here or in {folder}")
        from_file = clean_flags(read_mapping(place), "arguments_file")
        from_file = {key: value for key, value in from_file.items() if key not in OWNERS and key not in OF_THE_RUN}
    given = content.get("arguments") or {}
    if not isinstance(given, dict):
        raise InputError(f"arguments: {given!r} must be a mapping of flags to values")
    given = clean_flags(given, "arguments")
    for key in given:
        if key in OWNERS:
            raise InputError(f"arguments: {key} is set by the axis {OWNERS[key]} of a grid; name it there")
        if key in OF_THE_RUN:
            raise InputError(f"arguments: {key} is set by the comparison for each run; leave it out")
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
