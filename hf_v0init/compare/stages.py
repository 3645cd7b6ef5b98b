"""The two stages: which setting of each family the first one chooses, and the runs of the second, on fresh seeds.

Both follow from the plan and the results of the first stage alone, so every worker that looks comes to the same runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .axes import OWNERS, format_value, is_number
from .executor import find_waiting
from .files import CONFIRM, COUNTED, TUNE
from .plan import Plan, PlannedRun
from .results import collect_runs
from .statistics import choose_best

MAX_EXTENSIONS = 3  # times that the axes are extended before stage 2
LENGTHS = ("warmup_steps", "v0_decay_steps", "v0_scale")  # flags that set how long a run is warmed up


@dataclass(frozen=True)
class Choice:
    """The setting of a family that the first stage has chosen, at its best learning rate, from `num_trials` (settings at one rate)."""

    condition: str
    family: str
    setting: str
    learning_rate: float
    num_trials: int


@dataclass(frozen=True)
class Edge:
    """An optimum at the lowest or highest value of an axis that was tried; `further` is the next by the axis' own factor."""

    choice: Choice
    flag: str
    value: float
    end: str
    further: float | None


def choose_settings(runs: pd.DataFrame, greater_is_better: bool = False) -> list[Choice]:
    """Choose the setting and rate of each family, condition by condition, from the runs of the first stage.

    A diverged run counts with the loss at the start, or as infinitely bad. A family in which everything diverged has no choice.
    """
    sign = -1.0 if greater_is_better else 1.0
    families: dict[tuple[str, str], dict[tuple[str, float], dict[int, float]]] = {}
    columns = ["stage", "state", "condition", "family", "setting", "learning_rate", "seed", "scored_loss"]
    for stage, state, condition, family, setting, rate, seed, loss in runs[columns].itertuples(index=False, name=None):
        if stage == TUNE and state in COUNTED:
            score = math.inf if math.isnan(loss) else sign * loss
            families.setdefault((condition, family), {}).setdefault((setting, rate), {})[seed] = score
    chosen = []
    for (condition, family), candidates in families.items():
        best = choose_best(candidates)
        if best is not None:
            chosen.append(Choice(condition, family, *best, len(candidates)))
    return chosen


def find_edges(choices: Sequence[Choice], entries: Sequence[Mapping[str, Any]]) -> list[Edge]:
    """Find the choices that lie at an edge of the learning rates or lengths that were tried with all else equal.

    Args:
        choices: of the first stage.
        entries: its runs, as mappings of `condition`, `family`, `setting`, `learning_rate` and all `arguments`.
    """
    edges = []
    for choice in choices:
        of_family = [e for e in entries if (e["condition"], e["family"]) == (choice.condition, choice.family)]
        mine = next(
            e for e in of_family if (e["setting"], e["learning_rate"]) == (choice.setting, choice.learning_rate)
        )
        for flag in ("learning_rate", *LENGTHS):
            value = mine["arguments"].get(flag)
            if not is_number(value) or value <= 0:
                continue
            alike = [e["arguments"] for e in of_family if _differ_in(e["arguments"], mine["arguments"]) <= {flag}]
            tried = sorted({of.get(flag) for of in alike if is_number(of.get(flag)) and of[flag] > 0})
            if flag in LENGTHS[:2]:  # steps and fractions of training are two scales
                tried = [other for other in tried if (other < 1) == (value < 1)]
            if len(tried) < 2 or value not in (tried[0], tried[-1]):
                continue
            end, neighbour = ("lowest", tried[1]) if value == tried[0] else ("highest", tried[-2])
            further = _go_further(flag, value, neighbour, mine["arguments"].get("max_steps", math.inf))
            edges.append(Edge(choice, flag, value, end, further))
    return edges


def _differ_in(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    return {key for key in {*one, *other} - {"seed"} if one.get(key) != other.get(key)}


def _go_further(flag: str, value: float, neighbour: float, max_steps: float) -> float | None:
    """Compute the next value of an axis beyond its edge by its own factor; None where there is none in the run."""
    further = float(f"{value * value / neighbour:.6g}")
    if flag in ("learning_rate", "v0_scale"):
        return further
    if value < 1:
        return further if further < 1 else None
    further = round(further)
    return further if 1 <= further < max_steps and further != value else None


def lay_out_stages(plan: Plan, folder: Path) -> tuple[Plan, list[PlannedRun]]:
    """Return the plan with all runs that are known by now, and those of them that are to be trained next.

    First the runs of the grids; with `extend`, while a choice is at an edge, its setting at the next value; then the chosen ones on
    the fresh seeds.
    """
    choices: list[Choice] = []
    for number in range(MAX_EXTENSIONS + 1 if plan.extend else 1):
        waiting = find_waiting(folder, plan.list_runs(TUNE))
        if waiting:
            return plan, waiting
        choices = choose_settings(collect_runs(plan.to_dict(), folder).runs, plan.greater_is_better)
        if plan.extend and number < MAX_EXTENSIONS:
            plan = _extend(plan, choices)
    for seed in plan.confirm_seeds:
        for choice in choices:
            plan = plan.add_run(_find_runs(plan, choice)[0], stage=CONFIRM, seed=seed)
    return plan, find_waiting(folder, plan.list_runs(CONFIRM))


def _find_runs(plan: Plan, choice: Choice) -> list[PlannedRun]:
    place = (TUNE, choice.condition, choice.family, choice.setting, choice.learning_rate)
    return [r for r in plan.runs if (r.stage, r.condition, r.family, r.setting, r.learning_rate) == place]


def _extend(plan: Plan, choices: Sequence[Choice]) -> Plan:
    """Add, for each choice at an edge, its setting at the next value on its seeds."""
    for edge in find_edges(choices, [vars(run) for run in plan.list_runs(TUNE)]):
        for run in _find_runs(plan, edge.choice) if edge.further is not None else []:
            if edge.flag == "learning_rate":
                plan = plan.add_run(run, learning_rate=edge.further)
            else:
                axis = OWNERS[edge.flag]
                old = getattr(run, axis)
                new = f"{old.split(' (')[0]} ({edge.flag}={format_value(edge.further)})"
                setting = run.setting.replace(old, new, 1)
                plan = plan.add_run(run, setting=setting, arguments={edge.flag: edge.further}, **{axis: new})
    return plan
