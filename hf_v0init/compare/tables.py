"""The report's tables: numbers as people read them, a row for each family, setting, budget or run."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from . import files
from .plan import WARMUP
from .results import Comparison
from .statistics import Interval, compute_paired_interval, compute_steps_to_loss
from .summary import Condition

ABSENT = "–"


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
            row |= _count_steps(comparison, mine, targets)
            row["training time"] = format_seconds(mine["train_seconds"].mean())
            row |= {state: f"{sum(mine['state'] == state)} of {len(mine)}" for state in (files.DIVERGED, files.FAILED)}
            rows.append(row)
    return make_table(rows)


def _count_steps(comparison: Comparison, runs: pd.DataFrame, targets: Mapping[int, float]) -> dict[str, str]:
    """Steps until the warmup's final loss on the same seed: without and with the samples of the pass before training."""
    steps, charged, num_compared = [], [], 0
    curves = comparison.evaluations
    for run in runs.itertuples(index=False):
        curve = curves[curves["name"] == run.name]
        if run.seed in targets and len(curve):
            num_compared += 1
            target, better = targets[run.seed], comparison.greater_is_better
            found = compute_steps_to_loss(list(curve["step"]), list(curve["loss"]), target, better)
            if found is not None:
                steps.append(found)
                charged.append(found + run.v0_extra_steps)
    if not num_compared:
        return {}
    if not steps:
        return {"steps to its loss": f"not reached (0 of {num_compared})", "with the pass": ABSENT}
    mean, mean_charged = statistics.fmean(steps), statistics.fmean(charged)
    with_pass = ABSENT if math.isnan(mean_charged) else f"{mean_charged:.0f}"
    return {"steps to its loss": f"{mean:.0f} ({len(steps)} of {num_compared})", "with the pass": with_pass}


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


def make_run_table(comparison: Comparison) -> pd.DataFrame:
    """Make the table of all runs."""
    rows = []
    for run in comparison.runs.itertuples(index=False):
        steps = ABSENT if math.isnan(run.num_steps) else f"{run.num_steps:,.0f}"
        row = {"stage": run.stage, "run": run.name, "state": run.state, "step": steps}
        row |= {"final loss": format_number(run.final_loss), "time": format_seconds(run.seconds)}
        rows.append(row | {"remarks": "; ".join(part for part in (run.reason, run.problems) if part)})
    return make_table(rows)


def describe_arguments(comparison: Comparison) -> pd.DataFrame:
    """Make the table of the flags that all runs share."""
    arguments = comparison.plan.get("arguments") or {}
    return pd.DataFrame(
        {"flag": name, "value": value if isinstance(value, str) else json.dumps(value)}
        for name, value in sorted(arguments.items())
    )
