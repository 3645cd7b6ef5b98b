"""The report's tables as text, and the same numbers in full precision as rows of CSV files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..planning.published import SOURCE, START_VALUES, PublishedTable
from ..reading.budget import Budget
from ..reading.cost import name_hours, sum_hours
from ..reading.results import DIVERGED, FAILED, RunResult
from ..reading.summary import (
    V0,
    WARMUP,
    Arm,
    ArmAtRate,
    Estimate,
    Interval,
    Summary,
    compute_cost_to_loss,
)
from .formats import (
    FAMILY_NAMES,
    KINDS,
    MISSING,
    count_of,
    format_estimate,
    format_final,
    format_hours,
    format_interval,
    format_number,
    format_rate,
    format_seconds,
    format_test,
    name_loss,
    name_test_metric,
)


@dataclass(frozen=True)
class Table:
    """Headings and cells, all text. `num_left` columns from the left are words, the others numbers."""

    headings: list[str]
    rows: list[list[str]]
    num_left: int = 1

    def to_markdown(self) -> str:
        """Write the table as GitHub's Markdown."""
        rule = [":---"] * self.num_left + ["---:"] * (len(self.headings) - self.num_left)
        lines = [self.headings, rule, *self.rows]
        return "\n".join("| " + " | ".join(escape_cell(cell) for cell in line) + " |" for line in lines)


def escape_cell(text: str) -> str:
    """Make text safe inside a table of Markdown: one line, no column breaks, no HTML, no links and no images."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text.replace("](", "]\\(").replace("![", "!\\[")


# --------------------------------------------------------------------------------------------------------------- the tables


COST_HEADINGS = [
    "steps to the best warmup's loss",
    "with the pass",
    "time, with the pass",
    "reached",
    "diverged",
    "failed",
]


def make_arm_table(summary: Summary) -> Table:
    """Every arm that has a result, at its best learning rate, best first."""
    comparison = summary.comparison
    loss = name_loss(comparison.metric, comparison.script)
    headings = ["arm", "kind", "best lr", "n", f"final {loss}", "best"]
    headings += [name_test_metric(name) for name in comparison.test_metrics]
    headings += COST_HEADINGS
    rows = []
    for arm in (arm for arm in summary.arms if arm.best is not None):
        start = [_name_arm(arm, summary), KINDS[arm.kind], format_rate(arm.best.learning_rate)]
        rows.append([*start, *_make_rate_cells(arm.best, summary), *_count_bad(arm.runs)])
    return Table(headings, rows, num_left=2)


def make_rate_table(summary: Summary) -> Table:
    """Every arm at every learning rate, in the plan's order."""
    comparison = summary.comparison
    headings = ["arm", "lr", "n", "final loss", "best"]
    headings += [name_test_metric(name) for name in comparison.test_metrics]
    headings += COST_HEADINGS
    rows = []
    for arm in summary.arms:
        for rate in arm.rates.values():
            cells = [*_make_rate_cells(rate, summary), *_count_bad(rate.runs)]
            rows.append([arm.name, format_rate(rate.learning_rate), *cells])
    return Table(headings, rows)


def _make_rate_cells(rate: ArmAtRate, summary: Summary) -> list[str]:
    cells = [str(rate.final.n if rate.final else 0), format_final(rate), format_estimate(rate.best)]
    cells += [_format_test(rate.tests.get(name), rate) for name in summary.comparison.test_metrics]
    cells += [format_estimate(rate.steps_to, 0), format_estimate(rate.steps_to_charged, 0)]
    cells.append(format_seconds(rate.seconds_to.mean if rate.seconds_to else None))
    reached = rate.steps_to.n if rate.steps_to else 0
    cells.append(f"{reached} of {rate.num_with_target}" if rate.num_with_target else MISSING)
    return cells


def _format_test(estimate: Estimate | None, rate: ArmAtRate) -> str:
    """The mean over runs that have the figure; their number where it is not that of the losses."""
    if estimate is None or estimate.n == rate.final.n:
        return format_test(estimate)
    return f"{format_test(estimate)} (n = {estimate.n})"


def _count_bad(runs: Sequence[RunResult]) -> list[str]:
    """How many runs of those that have ended diverged, and how many failed."""
    diverged, failed = (sum(run.state == state for run in runs) for state in (DIVERGED, FAILED))
    ended = failed + sum(run.is_counted for run in runs)
    return [f"{number} of {ended}" if number else "none" for number in (diverged, failed)]


def _name_arm(arm: Arm, summary: Summary) -> str:
    return f"{arm.name} (best warmup)" if arm is summary.best_warmup else arm.name


def make_difference_table(summary: Summary) -> Table:
    """Paired differences of final losses: each arm against the best warmup, and against the plain start of its optimizer."""
    headings = [
        "arm",
        "lr",
        "against the best warmup",
        "n",
        "beyond noise",
        "against a plain start",
        "n",
        "beyond noise",
    ]
    rows = []
    for arm in summary.arms:
        if arm.best is None:
            continue
        row = [_name_arm(arm, summary), format_rate(arm.best.learning_rate)]
        for interval in (arm.to_warmup, arm.to_plain):
            difference = "diverged" if interval and arm.best.has_diverged else format_interval(interval)
            row += [difference, str(interval.n) if interval else MISSING, _judge(interval)]
        rows.append(row)
    return Table(headings, rows)


def _judge(interval: Interval | None) -> str:
    if interval is None:
        return MISSING
    return {"better": "better", "worse": "worse", "unclear": "no", "unknown": "one seed: unknown"}[interval.verdict]


def make_budget_table(budget: Budget) -> Table:
    """The expected best loss after 1, 2, 4, ... trials of each family, with the band, and what a trial costs."""
    most = max(curve.num_trials for curve in budget.curves)
    columns = [k for k in BUDGETS if k <= most] + ([most] if most not in BUDGETS else [])
    rows = []
    for curve in budget.curves:
        cells = []
        for k in columns:
            known = k <= curve.num_trials
            ends = sorted((curve.low[k - 1], curve.high[k - 1])) if known else []
            text = format_number(curve.expected[k - 1]) if known else MISSING
            cells.append(f"{text} ({' to '.join(map(format_number, ends))})" if known and ends[0] != ends[1] else text)
        rows.append([FAMILY_NAMES[curve.kind], str(curve.num_trials), *cells, format_hours(curve.hours)])
    headings = ["family", "trials run", *(f"best of {k}" if k > 1 else "one trial" for k in columns), "hours per trial"]
    return Table(headings, rows)


BUDGETS = (1, 2, 4, 8, 16, 32, 64)


def make_cost_table(summary: Summary) -> Table | None:
    """What each arm cost, over all its runs, and all together; None if no run's time is known."""
    runs = summary.comparison.runs
    total = sum_hours(runs)
    if total is None:
        return None
    rows = []
    for arm in summary.arms:
        hours = sum_hours(arm.runs)
        if hours is not None:
            rate = arm.best
            seconds = format_seconds(rate.train_seconds.mean if rate and rate.train_seconds else None)
            rows.append([_name_arm(arm, summary), KINDS[arm.kind], str(len(arm.runs)), format_hours(hours), seconds])
    rows.append(["all", "", str(len(runs)), format_hours(total), ""])
    return Table(["arm", "kind", "runs", name_hours(runs), "training time of a run at the best rate"], rows, num_left=2)


def make_group_table(summary: Summary) -> Table | None:
    """Within each optimizer and setting: the best v0 without warmup against the best warmup; None if there is only one such group."""
    groups: dict[tuple[str, str], dict[str, Arm]] = {}
    for arm in summary.arms:
        if arm.best is not None:
            groups.setdefault(arm.group, {}).setdefault(arm.kind, arm)
    both = {group: best for group, best in groups.items() if V0 in best and WARMUP in best}
    if len(both) < 2:
        return None
    rows = []
    for (optimizer, other), best in both.items():
        difference = summary.subtract(best[V0].best, best[WARMUP].best)
        row = [f"{optimizer}, {other}" if other else optimizer, best[V0].name, best[WARMUP].name]
        row += [format_estimate(best[kind].best.final) for kind in (V0, WARMUP)]
        rows.append(
            [*row, format_interval(difference), str(difference.n) if difference else MISSING, _judge(difference)]
        )
    headings = [
        "optimizer and settings",
        "best v0",
        "best warmup",
        "final loss of v0",
        "of the warmup",
        "difference",
        "n",
        "beyond noise",
    ]
    return Table(headings, rows, num_left=3)


def make_learning_rate_table(summary: Summary) -> Table:
    """Mean final loss by learning rate, with the numbers of seeds and of diverged runs, and the sensitivity, of each arm."""
    grid = summary.comparison.learning_rates
    rows = []
    for arm in (arm for arm in summary.arms if arm.best is not None):
        cells = [_write_cell_of_rate(arm.rates.get(learning_rate)) for learning_rate in grid]
        rows.append([_name_arm(arm, summary), *cells, format_number(arm.sensitivity)])
    return Table(["arm", *(f"lr {format_rate(rate)}" for rate in grid), "lr sensitivity"], rows)


def _write_cell_of_rate(rate: ArmAtRate | None) -> str:
    """The final loss with its number of seeds."""
    if rate is None or rate.final is None:
        return MISSING
    return f"{format_final(rate)} (n = {rate.final.n})"


def make_run_table(summary: Summary) -> Table:
    """Every run of the plan with its state."""
    headings = ["run", "state", "reason", "steps", "final loss", "training time"]
    rows = []
    for run in summary.comparison.runs:
        reason = "; ".join([*([run.reason] if run.reason else []), *run.problems])
        steps = MISSING if run.num_steps is None else f"{run.num_steps:,}"
        final = MISSING if run.final_loss is None else format_number(run.final_loss)
        rows.append([run.name, run.state.replace("_", " "), reason, steps, final, format_seconds(run.train_seconds)])
    return Table(headings, rows, num_left=3)


def make_published_table(table: PublishedTable) -> Table:
    """A table of the paper as it stands there."""
    return Table(
        ["", *table.columns], [[name, *map(_write_published, figures)] for name, figures in table.rows.items()]
    )


def make_table_beside(table: PublishedTable, summary: Summary) -> Table | None:
    """The paper's figures above ours of the same shape, each row with its source; None where the table has another shape."""
    metric = find_test_metric(table, summary.comparison.test_metrics)
    if table.columns != START_VALUES or metric is None:
        return None
    rows = [
        [f"published: {SOURCE}, 5 seeds", name, *map(_write_published, figures)] for name, figures in table.rows.items()
    ]
    for optimizer in dict.fromkeys(arm.optimizer for arm in summary.arms):
        for warmup in ("without warmup", "with warmup"):
            cells = []
            for start in START_VALUES:
                arm = next(
                    (
                        a
                        for a in summary.arms
                        if a.best is not None
                        and a.optimizer == optimizer
                        and not a.group[1]
                        and a.v0.split()[0] == start
                        and (a.warmup == "none") == (warmup == "without warmup")
                    ),
                    None,
                )
                estimate = arm.best.tests.get(metric) if arm else None
                cells.append(f"{format_test(estimate)} (n = {estimate.n}; {arm.name})" if estimate else MISSING)
            if set(cells) != {MISSING}:
                rows.append(["measured here", f"{optimizer}, {warmup}", *cells])
    return Table(["source", "", *table.columns], rows, num_left=2)


def find_test_metric(table: PublishedTable, names: Sequence[str]) -> str | None:
    """Find which of our test metrics is the table's."""
    word = table.metric.split()[-1].lower()
    return next((name for name in names if word in name.lower()), None)


def _write_published(figure: float | str | None) -> str:
    return MISSING if figure is None else figure if isinstance(figure, str) else f"{figure:.2f}"


# ---------------------------------------------------------------------------------------------------------------- the files


def write_results(path: Path, summary: Summary) -> None:
    """Write one row a run: what it was, how it ended, its losses and costs. Empty cells are unknown."""
    comparison = summary.comparison
    columns: dict[str, Callable[[RunResult], object]] = {
        name: (lambda run, name=name: getattr(run, name))
        for name in (
            "name",
            "arm",
            "v0",
            "warmup",
            "optimizer",
            "learning_rate",
            "seed",
            "state",
            "reason",
            "exit_status",
        )
    }
    columns["other"] = lambda run: json.dumps(run.other) if run.other else None
    for name in (
        "num_steps",
        "final_loss",
        "scored_loss",
        "best_loss",
        "start_loss",
        "start_source",
        "train_seconds",
        "seconds",
    ):
        columns[name] = lambda run, name=name: getattr(run, name)
    for name in ("v0_samples", "v0_extra_steps", "v0_seconds", "held_back"):
        columns[name] = lambda run, name=name: getattr(run, name)
    for i, name in enumerate(("steps_to_target", "steps_to_target_charged", "seconds_to_target")):
        columns[name] = lambda run, i=i: _find_cost(run, summary, i)
    columns["target_loss"] = lambda run: summary.targets.get(run.seed)
    for name in comparison.test_metrics:
        columns[name] = lambda run, name=name: run.metrics.get(name)
    for part in ("initial_weights", "rng"):
        columns[part] = lambda run, part=part: (run.fingerprint or {}).get(part)
    columns["batches"] = lambda run: " ".join((run.fingerprint or {}).get("batches") or []) or None
    _write_csv(path, list(columns), [[get(run) for get in columns.values()] for run in comparison.runs])


def _find_cost(run: RunResult, summary: Summary, index: int) -> float | None:
    if not run.is_counted or run.seed not in summary.targets:
        return None
    cost = compute_cost_to_loss(run, summary.targets[run.seed])
    return None if cost is None else cost[index]


def write_arms(path: Path, summary: Summary) -> None:
    """Write one row an arm and learning rate: the numbers of the tables in full precision."""
    estimates = ("final", "best", "steps_to", "steps_to_charged", "seconds_to", "train_seconds")
    tests = summary.comparison.test_metrics
    columns = ["arm", "kind", "v0", "warmup", "optimizer", "other", "learning_rate", "is_best_rate", "is_best_warmup"]
    columns += ["num_runs", "num_counted", "num_diverged", "num_failed", "num_with_target"]
    columns += [f"{name}_{part}" for name in (*estimates, *tests) for part in ("mean", "std", "n")]
    columns += [f"{name}_{part}" for name in ("to_best_warmup", "to_plain") for part in ("mean", "low", "high", "n")]
    columns.append("lr_sensitivity")
    rows = []
    for arm in summary.arms:
        for rate in arm.rates.values():
            is_best = rate is arm.best
            row = [arm.name, arm.kind, arm.v0, arm.warmup, arm.optimizer, json.dumps(arm.other) if arm.other else None]
            row += [rate.learning_rate, is_best, is_best and arm is summary.best_warmup, len(rate.runs)]
            row += [rate.final.n if rate.final else 0, rate.count(DIVERGED), rate.count(FAILED), rate.num_with_target]
            for estimate in (*(getattr(rate, name) for name in estimates), *(rate.tests.get(name) for name in tests)):
                row += [estimate.mean, estimate.std, estimate.n] if estimate else [None, None, 0]
            for interval in (arm.to_warmup, arm.to_plain) if is_best else (None, None):
                row += [interval.mean, interval.low, interval.high, interval.n] if interval else [None, None, None, 0]
            rows.append([*row, arm.sensitivity])
    _write_csv(path, columns, rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([[_write_cell(value) for value in row] for row in rows])


def _write_cell(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "" if value is None else value


def describe_settings(settings: Sequence[Mapping]) -> str:
    """Describe what the runs were made with, versions or hardware: one list if all agree, else each with its number of runs."""
    texts: dict[str, int] = {}
    for entry in settings:
        known = {name.replace("_", " "): value for name, value in entry.items() if value is not None}
        text = ", ".join(f"{name} {_join(value)}" for name, value in known.items())
        texts[text] = texts.get(text, 0) + 1
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{text} ({count_of(number, 'run')})" for text, number in texts.items())


def _join(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)
