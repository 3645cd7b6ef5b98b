"""The report's four figures, as SVG and PNG: what was confirmed, loss curves, learning rates, what a tuning budget buys."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..plots import PIXELS_PER_INCH, import_pyplot
from .files import CONFIRM, TUNE
from .plan import NONE, V0, V0_AND_WARMUP, WARMUP
from .results import Comparison
from .statistics import CONFIDENCE, compute_half_width, compute_paired_interval
from .summary import Condition

# Told apart by the colour-blind, and in grey by style and marker; in that order for further families.
LOOKS = {
    NONE: ("#333333", ":", "s"),
    WARMUP: ("#D55E00", "--", "^"),
    V0: ("#0072B2", "-", "o"),
    V0_AND_WARMUP: ("#009E73", "-.", "D"),
}
FURTHER = (("#CC79A7", "-.", "v"), ("#E69F00", "--", "P"), ("#56B4E9", "-", "X"), ("#882255", ":", "*"))
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.hashsalt": "hf_v0init",  # the same numbers give the same file
}
MAX_NAME = 46
MAX_CURVES = 8


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn: its title, and what it shows in words."""

    title: str
    caption: str


def draw_figures(
    comparison: Comparison, conditions: Sequence[Condition], folder: Path, suffixes: Sequence[str] = (".svg",)
) -> dict[str, Figure]:
    """Draw the figures for which there are numbers, and remove those that a former call has left.

    Returns name -> figure; the files are NAME.svg in `folder`, and such of the other `suffixes`.
    """
    pyplot = import_pyplot()
    drawn = {}
    draw = {
        "confirmed": _draw_confirmed,
        "loss_curves": _draw_loss_curves,
        "learning_rates": _draw_learning_rates,
        "tuning_budget": _draw_tuning_budget,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in draw.items():
        with pyplot.rc_context(STYLE):
            made = make(pyplot, comparison, conditions)
            if made is not None:
                figure, drawn[name] = made
                for suffix in suffixes:
                    metadata = {"Date": None} if suffix == ".svg" else {}
                    figure.savefig(
                        folder / f"{name}{suffix}", dpi=PIXELS_PER_INCH, bbox_inches="tight", metadata=metadata
                    )
                pyplot.close(figure)
    for file in folder.glob("*.*"):
        if file.suffix in (".svg", ".png") and file.stem not in drawn:
            file.unlink()
    return drawn


def _get_look(family: str, families: Sequence[str]) -> tuple[str, str, str]:
    further = [name for name in families if name not in LOOKS]
    return LOOKS.get(family) or FURTHER[further.index(family) % len(FURTHER)]


def _shorten(name: str) -> str:
    """Shorten a long name in its middle; `$` is written as it is."""
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME // 2]}…{name[-(MAX_NAME // 2 - 1) :]}"
    return name.replace("$", r"\$")


def _name_metric(comparison: Comparison) -> str:
    metric = comparison.plan.get("metric") or "eval_loss"
    return "validation loss" if metric == "eval_loss" else metric


def _list_families(conditions: Sequence[Condition]) -> list[str]:
    return list(dict.fromkeys(c.family for here in conditions for c in here.choices)) or list(
        dict.fromkeys(family for here in conditions for family in here.losses)
    )


def _draw_confirmed(pyplot, comparison: Comparison, conditions: Sequence[Condition]):
    rows = [(here, family) for here in conditions for family in here.losses]
    if not rows:
        return None
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.5, 1.4 + 0.42 * len(rows)), sharey=True, layout="constrained"
    )
    labels = []
    for place, (here, family) in enumerate(reversed(rows)):
        colour, _, marker = _get_look(family, _list_families(conditions))
        losses = {seed: loss for seed, loss in here.losses[family].items() if math.isfinite(loss)}
        setting, rate = here.settings[family]
        under = f" ({here.name})" if here.name else ""
        labels.append(_shorten(f"{setting}, lr {rate:g}{under}"))
        if not losses:
            continue
        left.plot(list(losses.values()), [place] * len(losses), marker, color=colour, markersize=4, alpha=0.45)
        values = list(losses.values())
        half = compute_half_width(values) if len(values) > 1 else None
        left.errorbar(statistics.fmean(values), place, xerr=half, fmt=marker, color=colour, markersize=7, capsize=3)
        interval = compute_paired_interval(losses, here.losses.get(WARMUP, {})) if family != WARMUP else None
        if interval is not None and not math.isnan(interval.mean):
            half = None if math.isnan(interval.low) else interval.high - interval.mean
            right.errorbar(interval.mean, place, xerr=half, fmt=marker, color=colour, markersize=7, capsize=3)
    values = [loss for here, family in rows for loss in here.losses[family].values() if math.isfinite(loss)]
    if values:
        pad = 0.3 * (max(values) - min(values)) or 0.1
        left.set_xlim(min(values) - pad, max(values) + pad)
        right.set_xlim(*(np.array([-1.3, 1.3]) * (max(values) - min(values) or 0.1)))
    left.set_yticks(range(len(rows)), labels)
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set_xlabel(f"final {_name_metric(comparison)}")
    right.set_xlabel("less the warmup, same seed")
    right.axvline(0.0, color="0.4", linewidth=1)
    for axes in (left, right):
        axes.xaxis.set_major_locator(pyplot.MaxNLocator(5))
    return figure, Figure(
        "Confirmed settings",
        f"Left: mean and {CONFIDENCE:.0%} t interval over the fresh seeds, small markers are single runs. Right: the paired difference to "
        "the warmup with its interval; what holds 0 is not significant by itself. Intervals may leave the frame, which is that of the runs.",
    )


def _draw_loss_curves(pyplot, comparison: Comparison, conditions: Sequence[Condition]):
    curves, runs = comparison.evaluations, comparison.counted
    curves = curves.merge(runs[runs["stage"] == CONFIRM][["name", "family", "condition"]], on="name")
    if curves["step"].nunique() < 3:
        return None
    figure, axes = pyplot.subplots(figsize=(8.0, 4.4), layout="constrained")
    families = _list_families(conditions)
    groups = list(curves.groupby(["condition", "family"], sort=False))
    for (condition, family), group in groups[:MAX_CURVES]:
        colour, style, _ = _get_look(family, families)
        by_step = group.replace([np.inf, -np.inf], np.nan).groupby("step")["loss"]
        mean = by_step.mean()
        here = next(here for here in conditions if here.name == condition)
        setting, rate = here.settings.get(family, (family, math.nan))
        under = f" ({condition})" if condition else ""
        axes.plot(mean.index, mean, style, color=colour, label=_shorten(f"{setting}, lr {rate:g}{under}"))
        axes.fill_between(mean.index, by_step.min(), by_step.max(), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(_name_metric(comparison))
    axes.legend(fontsize=8.5)
    return figure, Figure(
        "Loss curves", f"The {_name_metric(comparison)} along the confirmed runs: mean over the seeds, and their range."
    )


def _draw_learning_rates(pyplot, comparison: Comparison, conditions: Sequence[Condition]):
    tuned = comparison.counted
    tuned = tuned[(tuned["stage"] == TUNE) & tuned["scored_loss"].notna()]
    chosen = [c for here in conditions for c in here.choices]
    chosen = [c for c in chosen if tuned[(tuned["setting"] == c.setting)]["learning_rate"].nunique() > 1][:MAX_CURVES]
    if not chosen:
        return None
    figure, axes = pyplot.subplots(figsize=(7.0, 4.2), layout="constrained")
    for choice in chosen:
        colour, style, marker = _get_look(choice.family, _list_families(conditions))
        means = tuned[tuned["setting"] == choice.setting].groupby("learning_rate")["scored_loss"].mean()
        axes.plot(means.index, means, style, marker=marker, color=colour, label=_shorten(choice.setting))
    rates = sorted({rate for c in chosen for rate in tuned[tuned["setting"] == c.setting]["learning_rate"]})
    axes.set_xscale("log")
    axes.set_xticks(_keep_apart(rates), [f"{rate:g}" for rate in _keep_apart(rates)])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"final {_name_metric(comparison)}")
    axes.legend(fontsize=8.5)
    return figure, Figure(
        "Learning rates",
        "The first stage's chosen setting of each family at each learning rate it was tried at, mean over its seeds.",
    )


def _keep_apart(rates: Sequence[float], most: int = 8) -> list[float]:
    """Leave out tick labels so that those that stay do not run together."""
    span = math.log(max(rates) / min(rates)) or 1.0
    kept: list[float] = []
    for rate in rates:
        if not kept or math.log(rate / kept[-1]) >= span / most:
            kept.append(rate)
    return kept


def _draw_tuning_budget(pyplot, comparison: Comparison, conditions: Sequence[Condition]):
    with_budget = [here for here in conditions if here.budgets]
    if not with_budget:
        return None
    width = min(3, len(with_budget))
    height = math.ceil(len(with_budget) / width)
    figure, grid = pyplot.subplots(
        height, width, figsize=(max(6.5, 4.2 * width), 4.0 * height), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(with_budget) :]:
        axes.remove()
    for axes, here in zip(grid.flat, with_budget, strict=False):
        for family, curve in here.budgets.items():
            colour, style, marker = _get_look(family, _list_families(conditions))
            trials = range(1, len(curve.expected) + 1)
            axes.plot(trials, curve.expected, style, marker=marker, markersize=4, color=colour, label=family)
            axes.fill_between(trials, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0)
        axes.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True))
        axes.set_xlabel("random trials")
        axes.set_ylabel(f"best final {_name_metric(comparison)}")
        axes.set_title(here.name)
        axes.legend(fontsize=8.5)
    return figure, Figure(
        "What a tuning budget buys",
        "Expected best of so many random trials of a family, one trial being one setting at one learning rate; bands hold 8 of 10 draws. "
        "A line ends at the best of all that were run: what is low on the left needs no tuning.",
    )
