"""From the runs to what the report says: verdicts from the second stage, what the first one has found, and tables of both.

Three rules hold throughout. A run that diverged counts with the loss at the start (its seed's), so that a setting does not look better
for losing its bad runs; one that failed for another reason counts nowhere, and is shown. Differences are taken seed by seed. Verdicts
come from fresh seeds, on which nothing was chosen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from . import files
from .plan import NONE, V0, WARMUP
from .results import Comparison
from .stages import Choice, Edge, choose_settings, find_edges
from .statistics import (
    Contrast,
    Interval,
    NonInferiority,
    compute_budget,
    compute_paired_interval,
    judge_contrasts,
    judge_replacement,
)

PLANNED = ((V0, WARMUP), (V0, NONE), (WARMUP, NONE))
ABSENT = "–"


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
    common, entries = comparison.plan.get("arguments") or {}, comparison.plan["runs"]
    entries = [{**entry, "arguments": {**common, **(entry.get("arguments") or {})}} for entry in entries]
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


# ------------------------------------------------------------------------------------------------------ the tables


def format_number(value: float | None, signed: bool = False) -> str:
    """Write a number of the metric: three decimals, one from 100 on; a dash for none."""
    if value is None or math.isnan(value):
        return ABSENT
    if math.isinf(value):
        return "diverged"
    return f"{value:{'+' if signed else ''}.{1 if abs(value) >= 100 else 3}f}"


def format_estimate(values: Iterable[float | None]) -> str:
    """Write mean ± standard deviation (n - 1) of the values that there are."""
    values = [float(value) for value in values if value is not None and not math.isnan(value)]
    if not values:
        return ABSENT
    mean = format_number(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {format_number(statistics.stdev(values))}"


def format_interval(interval: Interval | None) -> str:
    """Write a paired difference with its interval."""
    if interval is None:
        return ABSENT
    text = format_number(interval.mean, signed=True)
    if math.isnan(interval.low):
        return text
    return f"{text} ({format_number(interval.low, signed=True)} to {format_number(interval.high, signed=True)})"


def format_seconds(seconds: float | None) -> str:
    """Write a duration: 42 s, 3:20 min, 2:05 h."""
    if seconds is None or math.isnan(seconds):
        return ABSENT
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def make_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Make a table of rows; columns in which nothing stands are left out."""
    table = pd.DataFrame(rows).fillna(ABSENT)
    return table.loc[:, [not set(map(str, table[name])) <= {"", ABSENT, "nan"} for name in table.columns]]


def make_confirmed_table(comparison: Comparison, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Make the table of the confirmed settings: a row for each family of each condition, best first."""
    confirmed, rows = comparison.runs[comparison.runs["stage"] == files.CONFIRM].groupby(["condition", "family"]), []
    for here in conditions:
        targets = here.losses.get(WARMUP, {})
        for family, losses in here.losses.items():
            mine = confirmed.get_group((here.name, family))
            setting, rate = here.settings[family]
            interval = compute_paired_interval(losses, targets) if family != WARMUP else None
            row = {"condition": here.name, "family": family, "setting": setting, "lr": f"{rate:g}"}
            row |= {"seeds": str(len(losses)), "final loss": format_estimate(losses.values())}
            row["less the warmup (95% CI)"] = format_interval(interval)
            row |= {name: format_estimate(mine[name]) for name in comparison.plan.get("test_metrics") or []}
            row["training time"] = format_seconds(mine["train_seconds"].mean())
            row |= {state: f"{sum(mine['state'] == state)} of {len(mine)}" for state in (files.DIVERGED, files.FAILED)}
            rows.append(row)
    return make_table(rows)


def make_tuning_table(comparison: Comparison, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Make the table of what the first stage has chosen."""
    tuned, rows = comparison.get_counted(files.TUNE), []
    for here in conditions:
        for choice in here.choices:
            mine = tuned[(tuned["setting"] == choice.setting) & (tuned["learning_rate"] == choice.learning_rate)]
            edges = [f"{edge.flag} {edge.end}" for edge in here.edges if edge.choice is choice]
            row = {"condition": here.name, "family": choice.family, "chosen": choice.setting}
            row |= {"lr": f"{choice.learning_rate:g}", "trials": str(choice.num_trials)}
            row |= {"final loss": format_estimate(mine["scored_loss"]), "seeds": str(len(mine))}
            rows.append(row | {"at the edge of": ", ".join(edges)})
    return make_table(rows)


def make_rate_table(comparison: Comparison) -> pd.DataFrame:
    """Make the table of every setting of the first stage at each learning rate, best first, its best rate bold."""
    tuned, rows = comparison.get_counted(files.TUNE), []
    sign = -1.0 if comparison.greater_is_better else 1.0
    for (_, family, setting), group in tuned.groupby(["condition", "family", "setting"], sort=False):
        by_rate = group.groupby("learning_rate")["scored_loss"]
        means = sign * by_rate.mean()
        best = means.idxmin() if means.notna().any() else None
        row = {"family": family, "setting": setting}
        for rate in sorted(set(tuned["learning_rate"])):
            cell = format_estimate(by_rate.get_group(rate)) if rate in means.index else ABSENT
            row[f"lr {rate:g}"] = f"**{cell}**" if rate == best else cell
        rows.append((math.inf if best is None else means[best], row))
    return make_table([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def make_budget_table(conditions: Sequence[Condition]) -> pd.DataFrame:
    """Make the table of the best of k trials."""
    rows = []
    for here in conditions:
        for family, curve in here.budgets.items():
            row = {"condition": here.name, "family": family, "trials": str(len(curve))}
            for k in (1, 2, 4, 8, 16, 32):
                if k <= len(curve):
                    best, low, high = map(format_number, curve.iloc[k - 1])
                    row[f"best of {k}"] = f"{best} ({low} to {high})" if k < len(curve) else best
            rows.append(row)
    return make_table(rows)
