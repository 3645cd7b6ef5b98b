"""From the runs to what the report says: verdicts from the second stage, and what the first one has found.

Three rules hold throughout. A run that diverged counts with the loss at the start (its seed's), so that a setting does not look better
for losing its bad runs; one that failed for another reason counts nowhere, and is shown. Differences are taken seed by seed. Verdicts
come from fresh seeds, on which nothing was chosen.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import pandas as pd

from . import files
from .axes import has_v0
from .plan import NONE, V0, WARMUP
from .results import Comparison
from .stages import Choice, Edge, choose_settings, find_edges
from .statistics import (
    Contrast,
    NonInferiority,
    compute_budget,
    judge_contrasts,
    judge_replacement,
)

PLANNED = ((V0, WARMUP), (V0, NONE), (WARMUP, NONE))


@dataclass
class Condition:
    """The families under one setting of the other axes (`name`, "" if there are none).

    Attributes:
        settings: family -> the setting that was confirmed, and its learning rate.
        losses: family -> seed -> loss in the second stage, the family of the best mean first.
        contrasts: the planned ones.
        replacement: whether v0 can replace the warmup; None without both.
        choices, edges: of the first stage.
        budgets: family -> the best of k trials of the first stage.
    """

    name: str
    settings: dict[str, tuple[str, float]] = field(default_factory=dict)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    contrasts: list[Contrast] = field(default_factory=list)
    replacement: NonInferiority | None = None
    choices: list[Choice] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    budgets: dict[str, pd.DataFrame] = field(default_factory=dict)


def summarize(comparison: Comparison) -> list[Condition]:
    """Compute what each condition has shown; the families of each are in the order of their means, best first."""
    runs = comparison.runs
    entries = [{**entry, "arguments": comparison.get_arguments(entry)} for entry in comparison.plan["runs"]]
    choices = choose_settings(runs, comparison.greater_is_better)
    edges = find_edges(choices, [entry for entry in entries if entry["stage"] == files.TUNE])
    conditions = []
    for name in dict.fromkeys(runs["condition"]):
        here = Condition(name, choices=[c for c in choices if c.condition == name])
        here.edges = [edge for edge in edges if edge.choice.condition == name]
        _add_verdicts(here, comparison)
        _add_tuning(here, comparison)
        conditions.append(here)
    return conditions


def _add_verdicts(here: Condition, comparison: Comparison) -> None:
    confirmed, losses = comparison.get_counted(files.CONFIRM), {}
    for family, group in confirmed[confirmed["condition"] == here.name].groupby("family", sort=False):
        losses[family] = dict(zip(group["seed"], group["scored_loss"], strict=True))
        here.settings[family] = (group["setting"].iloc[0], float(group["learning_rate"].iloc[0]))
    sign = -1.0 if comparison.greater_is_better else 1.0
    means = {family: sign * statistics.fmean(by_seed.values()) for family, by_seed in losses.items()}
    order = sorted(means, key=lambda family: means[family] if math.isfinite(means[family]) else math.inf)
    here.losses = {family: losses[family] for family in order}
    here.contrasts = judge_contrasts(here.losses, PLANNED, comparison.greater_is_better)
    for contrast in here.contrasts:
        if (contrast.one, contrast.other) == (V0, WARMUP):
            margin = comparison.plan.get("margin", 0.01)
            if comparison.plan.get("margin_is_relative", True):
                margin *= abs(statistics.fmean(v for v in here.losses[WARMUP].values() if math.isfinite(v)))
            here.replacement = judge_replacement(contrast.interval, margin, comparison.greater_is_better)


def _add_tuning(here: Condition, comparison: Comparison) -> None:
    tuned = comparison.get_counted(files.TUNE)
    tuned = tuned[tuned["condition"] == here.name]
    for family, group in tuned.groupby("family", sort=False):
        trials = group.set_index(["setting", "learning_rate", "seed"])["scored_loss"].unstack("seed")
        trials = trials.dropna(axis="columns")  # seeds that all trials have
        if trials.shape[1] and len(trials) > 1:
            curves = [compute_budget(trials[seed], comparison.greater_is_better) for seed in trials]
            here.budgets[family] = sum(curves) / len(curves)


def find_unknown_costs(comparison: Comparison) -> list[str]:
    """List the runs with a v0 that left no record of what it cost."""
    with_v0 = [entry["name"] for entry in comparison.plan["runs"] if has_v0(comparison.get_arguments(entry))]
    counted = comparison.counted
    return list(counted.loc[counted["v0_extra_steps"].isna() & counted["name"].isin(with_v0), "name"])
