"""From the runs to what the report says: verdicts from the second stage, and what the first one has found, as tables.

Three rules hold throughout. A run that diverged counts with the loss at the start (its seed's), so that a setting does not look better
for losing its bad runs; one that failed for another reason counts nowhere, and is shown. Differences are taken seed by seed. Verdicts
come from fresh seeds, on which nothing was chosen.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from . import files
from .axes import has_v0
from .plan import NONE, V0, WARMUP
from .results import Comparison
from .stages import Choice, Edge, choose_settings, find_edges
from .statistics import (
    BudgetCurve,
    Contrast,
    NonInferiority,
    compute_budget,
    compute_lr_sensitivity,
    compute_paired_interval,
    compute_steps_to_loss,
    judge_contrasts,
    judge_replacement,
)

PLANNED = ((V0, WARMUP), (V0, NONE), (WARMUP, NONE))
FEW_TRIALS = (1, 2, 4, 8, 16, 32)


@dataclass
class Condition:
    """The families under one setting of the other axes (`name`, "" if there are none).

    Attributes:
        settings: family -> the setting that was confirmed, and its learning rate.
        losses: family -> seed -> loss in the second stage.
        contrasts: the planned ones.
        replacement: whether v0 can replace the warmup; None without both.
        choices, edges: of the first stage.
        budgets: family -> the best of k trials of the first stage.
        sensitivities: setting -> its learning-rate sensitivity in the first stage.
    """

    name: str
    settings: dict[str, tuple[str, float]] = field(default_factory=dict)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    contrasts: list[Contrast] = field(default_factory=list)
    replacement: NonInferiority | None = None
    choices: list[Choice] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    budgets: dict[str, BudgetCurve] = field(default_factory=dict)
    sensitivities: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The confirmed family of the best mean; set by `summarize`."""
        return next(iter(self.losses), None)


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
    counted = comparison.counted
    confirmed = counted[(counted["stage"] == files.CONFIRM) & (counted["condition"] == here.name)]
    losses = {}
    for family, group in confirmed.groupby("family", sort=False):
        losses[family] = dict(zip(group["seed"], group["scored_loss"], strict=True))
        here.settings[family] = (group["setting"].iloc[0], float(group["learning_rate"].iloc[0]))
    sign = -1.0 if comparison.greater_is_better else 1.0
    here.losses = dict(sorted(losses.items(), key=lambda item: _order(sign, item[1].values())))
    here.contrasts = judge_contrasts(here.losses, PLANNED, comparison.greater_is_better)
    for contrast in here.contrasts:
        if (contrast.one, contrast.other) == (V0, WARMUP):
            margin = comparison.plan.get("margin", 0.01)
            if comparison.plan.get("margin_is_relative", True):
                margin *= abs(statistics.fmean(v for v in here.losses[WARMUP].values() if math.isfinite(v)))
            here.replacement = judge_replacement(contrast.interval, margin, comparison.greater_is_better)


def _order(sign: float, losses) -> float:
    losses = list(losses)
    return sign * statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf


def _add_tuning(here: Condition, comparison: Comparison) -> None:
    tuned = comparison.counted
    tuned = tuned[(tuned["stage"] == files.TUNE) & (tuned["condition"] == here.name)]
    rates = sorted(set(tuned["learning_rate"]))
    sign = -1.0 if comparison.greater_is_better else 1.0
    for family, group in tuned.groupby("family", sort=False):
        trials = group.set_index(["setting", "learning_rate", "seed"])["scored_loss"].unstack("seed")
        trials = trials.dropna(axis="columns")  # seeds that all trials have
        if trials.shape[1] and len(trials) > 1:
            curves = [compute_budget(list(trials[seed]), comparison.greater_is_better) for seed in trials]
            means = (
                [statistics.fmean(v) for v in zip(*(getattr(c, part) for c in curves), strict=True)]
                for part in ("expected", "low", "high")
            )
            here.budgets[family] = BudgetCurve(*means)
        for setting, of_setting in group.groupby("setting", sort=False):
            means = (sign * of_setting.groupby("learning_rate")["scored_loss"].mean()).dropna()
            if len(rates) > 1 and sorted(means.index) == rates:
                start = sign * of_setting["start_loss"].median()
                bound = math.inf if math.isnan(start) else start
                here.sensitivities[setting] = compute_lr_sensitivity(dict(means), bound)


# ------------------------------------------------------------------------------------------------------------- tables


def format_number(value: float | None, signed: bool = False) -> str:
    """Write a number of the metric: three decimals, one from 100 on; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "diverged"
    digits = 1 if abs(value) >= 100 else 3
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def format_estimate(values: Any) -> str:
    """Write mean ± standard deviation (n - 1) of the values that there are."""
    values = [float(value) for value in values if value is not None and not math.isnan(value)]
    if not values:
        return "–"
    mean = format_number(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {format_number(statistics.stdev(values))}"


def format_seconds(seconds: float | None) -> str:
    """Write a duration: 42 s, 3:20 min, 2:05 h."""
    if seconds is None or math.isnan(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def make_confirmed_table(comparison: Comparison, conditions: list[Condition]) -> pd.DataFrame:
    """Make the table of the confirmed settings: a row for each family of each condition, best first."""
    runs, rows = comparison.runs, []
    for here in conditions:
        targets = here.losses.get(WARMUP, {})
        for family, losses in here.losses.items():
            mine = runs[
                (runs["stage"] == files.CONFIRM) & (runs["condition"] == here.name) & (runs["family"] == family)
            ]
            setting, rate = here.settings[family]
            row = {
                "condition": here.name,
                "family": family,
                "setting": setting,
                "lr": f"{rate:g}",
                "seeds": str(len(losses)),
            }
            row["final loss"] = format_estimate(losses.values())
            interval = compute_paired_interval(losses, targets) if family != WARMUP else None
            row["less the warmup (95% CI)"] = format_interval(interval)
            row |= {name: format_estimate(mine[name]) for name in comparison.plan.get("test_metrics") or []}
            row |= _count_steps(comparison, mine, targets)
            row["training time"] = format_seconds(mine["train_seconds"].mean())
            row |= {state: f"{sum(mine['state'] == state)} of {len(mine)}" for state in (files.DIVERGED, files.FAILED)}
            rows.append(row)
    return drop_empty(pd.DataFrame(rows))


def _count_steps(comparison: Comparison, runs: pd.DataFrame, targets: Mapping[int, float]) -> dict[str, str]:
    """Steps until the warmup's final loss on the same seed: without and with the samples of the pass before training."""
    steps, charged, reached = [], [], 0
    curves = comparison.evaluations
    for run in runs.itertuples(index=False):
        curve = curves[curves["name"] == run.name]
        if run.seed in targets and len(curve):
            reached += 1
            found = compute_steps_to_loss(
                list(curve["step"]), list(curve["loss"]), targets[run.seed], comparison.greater_is_better
            )
            if found is not None:
                steps.append(found)
                charged.append(found + run.v0_extra_steps)
    if not reached:
        return {}
    row = {
        "steps to its loss": f"{statistics.fmean(steps):.0f} ({len(steps)} of {reached})"
        if steps
        else f"not reached (0 of {reached})"
    }
    mean = statistics.fmean(charged) if charged else math.nan
    return row | {"with the pass": "–" if math.isnan(mean) else f"{mean:.0f}"}


def format_interval(interval: Any) -> str:
    """Write a paired difference with its interval."""
    if interval is None:
        return "–"
    text = format_number(interval.mean, signed=True)
    if not math.isnan(interval.low):
        text += f" ({format_number(interval.low, signed=True)} to {format_number(interval.high, signed=True)})"
    return text


def make_tuning_table(comparison: Comparison, conditions: list[Condition]) -> pd.DataFrame:
    """Make the table of what the first stage has chosen."""
    tuned, rows = comparison.counted, []
    tuned = tuned[tuned["stage"] == files.TUNE]
    for here in conditions:
        for choice in here.choices:
            mine = tuned[(tuned["setting"] == choice.setting) & (tuned["learning_rate"] == choice.learning_rate)]
            edges = [f"{edge.flag} {edge.end}" for edge in here.edges if edge.choice is choice]
            row = {
                "condition": here.name,
                "family": choice.family,
                "chosen": choice.setting,
                "lr": f"{choice.learning_rate:g}",
            }
            row |= {"trials": str(choice.num_trials), "final loss": format_estimate(mine["scored_loss"])}
            row |= {"seeds": str(len(mine)), "at the edge of": ", ".join(edges)}
            rows.append(row)
    return drop_empty(pd.DataFrame(rows))


def make_rate_table(comparison: Comparison, conditions: list[Condition]) -> pd.DataFrame:
    """Make the table of every setting of the first stage at each learning rate, its best rate bold."""
    tuned = comparison.counted
    tuned = tuned[tuned["stage"] == files.TUNE]
    if tuned.empty:
        return pd.DataFrame()
    sensitivities = {
        (here.name, setting): value for here in conditions for setting, value in here.sensitivities.items()
    }
    order = "max" if comparison.greater_is_better else "min"
    rows = []
    for (condition, family, setting), group in tuned.groupby(["condition", "family", "setting"], sort=False):
        means = group.groupby("learning_rate")["scored_loss"].mean()
        best = getattr(means, f"idx{order}")() if means.notna().any() else None
        row = {"family": family, "setting": setting}
        for rate in sorted(set(tuned["learning_rate"])):
            cell = format_estimate(group[group["learning_rate"] == rate]["scored_loss"])
            row[f"lr {rate:g}"] = f"**{cell}**" if rate == best else cell
        value = sensitivities.get((condition, setting))
        rows.append((means.min() if order == "min" else -means.max(), row | {"sensitivity": format_number(value)}))
    return drop_empty(pd.DataFrame([row for _, row in sorted(rows, key=lambda item: (math.isnan(item[0]), item[0]))]))


def make_budget_table(conditions: list[Condition]) -> pd.DataFrame:
    """Make the table of the best of k trials."""
    rows = []
    for here in conditions:
        for family, curve in here.budgets.items():
            row = {"condition": here.name, "family": family, "trials": str(len(curve.expected))}
            for k in FEW_TRIALS:
                if k <= len(curve.expected):
                    band = f" ({format_number(curve.low[k - 1])} to {format_number(curve.high[k - 1])})"
                    row[f"best of {k}"] = format_number(curve.expected[k - 1]) + (
                        band if k < len(curve.expected) else ""
                    )
            rows.append(row)
    return drop_empty(pd.DataFrame(rows).fillna("–")) if rows else pd.DataFrame()


def make_run_table(comparison: Comparison) -> pd.DataFrame:
    """Make the table of all runs."""
    rows = []
    for run in comparison.runs.itertuples(index=False):
        steps = "–" if math.isnan(run.num_steps) else f"{run.num_steps:,.0f}"
        row = {"stage": run.stage, "run": run.name, "state": run.state, "step": steps}
        row |= {"final loss": format_number(run.final_loss), "time": format_seconds(run.seconds)}
        rows.append(row | {"remarks": "; ".join(part for part in (run.reason, run.problems) if part)})
    return drop_empty(pd.DataFrame(rows))


def make_settings(comparison: Comparison, conditions: list[Condition]) -> pd.DataFrame:
    """Make the table for programs: mean, deviation and number of every setting at every rate, stage by stage."""
    chosen = {(c.condition, c.setting, c.learning_rate) for here in conditions for c in here.choices}
    sensitivities = {
        (here.name, setting): value for here in conditions for setting, value in here.sensitivities.items()
    }
    figures, rows = ["scored_loss", *(comparison.plan.get("test_metrics") or []), "train_seconds"], []
    place = ["stage", "condition", "family", "setting", "v0", "warmup", "optimizer", "other", "learning_rate"]
    for key, group in comparison.counted.groupby(place, sort=False, dropna=False):
        row = dict(zip(place, key, strict=True))
        for figure in figures:
            name = "final" if figure == "scored_loss" else figure
            values = group[figure].dropna()
            row |= {f"{name}_mean": values.mean(), f"{name}_std": values.std(), f"{name}_n": len(values)}
        row["is_chosen"] = (row["condition"], row["setting"], row["learning_rate"]) in chosen
        row["lr_sensitivity"] = (
            sensitivities.get((row["condition"], row["setting"])) if row["stage"] == files.TUNE else None
        )
        rows.append(row)
    return pd.DataFrame(rows)


def drop_empty(table: pd.DataFrame) -> pd.DataFrame:
    """Drop the columns in which nothing stands."""
    if table.empty:
        return table
    kept = [name for name in table.columns if any(str(value) not in ("", "–", "nan") for value in table[name])]
    return table[kept]


def count_states(comparison: Comparison, stage: str) -> dict[str, int]:
    """Count the runs of a stage by state."""
    states = list(comparison.runs.loc[comparison.runs["stage"] == stage, "state"])
    return {state: states.count(state) for state in files.STATES if state in states}


def sum_hours(comparison: Comparison) -> dict[str, float]:
    """Sum the hours of each stage, runs that failed included."""
    return {
        stage: hours for stage, hours in comparison.runs.groupby("stage", sort=False)["hours"].sum().items() if hours
    }


def find_unknown_costs(comparison: Comparison) -> list[str]:
    """List the runs with a v0 that left no record of what it cost."""
    flags = {entry["name"]: comparison.get_arguments(entry) for entry in comparison.plan["runs"]}
    counted = comparison.counted
    unknown = counted[counted["v0_extra_steps"].isna()]
    return [name for name in unknown["name"] if has_v0(flags.get(name, {}))]


def describe_arguments(comparison: Comparison) -> dict[str, str]:
    """Return the flags that all runs share, as text."""
    arguments = comparison.plan.get("arguments") or {}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in sorted(arguments.items())}
