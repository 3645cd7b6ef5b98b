"""The report's four figures, as SVG and PNG: what was confirmed, loss curves, learning rates, what a tuning budget buys."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import PIXELS_PER_INCH, import_pyplot
from .files import CONFIRM, TUNE
from .plan import NONE, V0, V0_AND_WARMUP, WARMUP
from .results import Comparison
from .statistics import compute_half_width, compute_paired_interval
from .summary import Condition

# Told apart by the colour-blind, and in grey by style and marker; the first four are of no warmup, warmup, v0, v0 + warmup,
# the others in turn of further families.
LOOKS = (("#333333", ":", "s"), ("#D55E00", "--", "^"), ("#0072B2", "-", "o"), ("#009E73", "-.", "D"))
LOOKS += (("#CC79A7", "-.", "v"), ("#E69F00", "--", "P"), ("#56B4E9", "-", "X"), ("#882255", ":", "*"))
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.facecolor": "white",
    "svg.hashsalt": "hf_v0init",  # the same numbers give the same file
}
MAX_NAME = 46
MAX_CURVES = 8


def draw_figures(
    comparison: Comparison, conditions: Sequence[Condition], folder: Path, suffixes: Sequence[str] = (".svg",)
) -> list[str]:
    """Draw the figures for which there are numbers, NAME.svg and such other `suffixes`, in a folder that is emptied; return the names."""
    artist, drawn = _Artist(comparison, conditions), []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("confirmed", "loss_curves", "learning_rates", "tuning_budget"):
        with artist.pyplot.rc_context(STYLE):
            figure = getattr(artist, f"draw_{name}")()
            if figure is None:
                continue
            drawn.append(name)
            for suffix in suffixes:
                metadata = {"Date": None} if suffix == ".svg" else {}
                path = folder / f"{name}{suffix}"
                figure.savefig(path, dpi=PIXELS_PER_INCH, bbox_inches="tight", metadata=metadata)
            artist.pyplot.close(figure)
    return drawn


class _Artist:
    """Draws one comparison; each method returns a figure, or None where there are no numbers for it."""

    def __init__(self, comparison: Comparison, conditions: Sequence[Condition]) -> None:
        self.comparison, self.conditions, self.pyplot = comparison, conditions, import_pyplot()
        chosen = [choice.family for here in conditions for choice in here.choices]
        confirmed = [family for here in conditions for family in here.losses]
        families = dict.fromkeys([NONE, WARMUP, V0, V0_AND_WARMUP, *chosen, *confirmed])
        self.looks = dict(zip(families, itertools.chain(LOOKS, itertools.cycle(LOOKS[4:])), strict=False))
        metric = comparison.plan.get("metric") or "eval_loss"
        self.metric = "validation loss" if metric == "eval_loss" else metric

    def draw_confirmed(self) -> Any | None:
        rows = [(here, family) for here in self.conditions for family in here.losses]
        if not rows:
            return None
        size = (9.5, 1.4 + 0.42 * len(rows))
        figure, (left, right) = self.pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
        labels, shown = [], []
        for place, (here, family) in enumerate(reversed(rows)):
            colour, _, marker = self.looks[family]
            mean_look = {"fmt": marker, "color": colour, "markersize": 7, "capsize": 3}
            labels.append(self._name(here, family))
            losses = {seed: loss for seed, loss in here.losses[family].items() if math.isfinite(loss)}
            if not losses:
                continue
            values = list(losses.values())
            shown += values
            left.plot(values, [place] * len(values), marker, color=colour, markersize=4, alpha=0.45)
            half = compute_half_width(values) if len(values) > 1 else None
            left.errorbar(statistics.fmean(values), place, xerr=half, **mean_look)
            interval = compute_paired_interval(losses, here.losses.get(WARMUP, {})) if family != WARMUP else None
            if interval is not None and not math.isnan(interval.mean):
                half = None if math.isnan(interval.low) else interval.high - interval.mean
                right.errorbar(interval.mean, place, xerr=half, **mean_look)
        if shown:
            low, high = min(shown), max(shown)
            pad = 0.3 * (high - low) or 0.1
            left.set_xlim(low - pad, high + pad)
            right.set_xlim(-1.3 * (high - low or 0.1), 1.3 * (high - low or 0.1))
        left.set_yticks(range(len(rows)), labels)
        left.set(ylim=(-0.6, len(rows) - 0.4), xlabel=f"final {self.metric}")
        right.set_xlabel("less the warmup, same seed")
        right.axvline(0.0, color="0.4", linewidth=1)
        for axes in (left, right):
            axes.xaxis.set_major_locator(self.pyplot.MaxNLocator(5))
        return figure

    def draw_loss_curves(self) -> Any | None:
        runs = self.comparison.get_counted(CONFIRM)[["name", "family", "condition"]]
        curves = self.comparison.evaluations.merge(runs, on="name")
        if curves["step"].nunique() < 3:
            return None
        figure, axes = self.pyplot.subplots(figsize=(8.0, 4.4), layout="constrained")
        by_name = {here.name: here for here in self.conditions}
        for (condition, family), group in list(curves.groupby(["condition", "family"], sort=False))[:MAX_CURVES]:
            colour, style, _ = self.looks[family]
            by_step = group.replace([np.inf, -np.inf], np.nan).groupby("step")["loss"]
            mean = by_step.mean()
            axes.plot(mean.index, mean, style, color=colour, label=self._name(by_name[condition], family))
            axes.fill_between(mean.index, by_step.min(), by_step.max(), color=colour, alpha=0.12, linewidth=0)
        axes.set(xlabel="optimizer step", ylabel=self.metric)
        axes.legend()
        return figure

    def draw_learning_rates(self) -> Any | None:
        tuned = self.comparison.get_counted(TUNE)
        tuned = tuned[tuned["scored_loss"].notna()]
        chosen = [c for here in self.conditions for c in here.choices]
        chosen = [c for c in chosen if tuned[tuned["setting"] == c.setting]["learning_rate"].nunique() > 1][:MAX_CURVES]
        if not chosen:
            return None
        figure, axes = self.pyplot.subplots(figsize=(7.0, 4.2), layout="constrained")
        for choice in chosen:
            colour, style, marker = self.looks[choice.family]
            means = tuned[tuned["setting"] == choice.setting].groupby("learning_rate")["scored_loss"].mean()
            axes.plot(means.index, means, style, marker=marker, color=colour, label=_shorten(choice.setting))
        ticks = _keep_apart(sorted({rate for line in axes.lines for rate in line.get_xdata()}))
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.minorticks_off()
        axes.set(xlabel="learning rate", ylabel=f"final {self.metric}")
        axes.legend()
        return figure

    def draw_tuning_budget(self) -> Any | None:
        with_budget = [here for here in self.conditions if here.budgets]
        if not with_budget:
            return None
        width = min(3, len(with_budget))
        height = math.ceil(len(with_budget) / width)
        size = (max(6.5, 4.2 * width), 4.0 * height)
        figure, grid = self.pyplot.subplots(height, width, figsize=size, layout="constrained", squeeze=False)
        for axes in grid.flat[len(with_budget) :]:
            axes.remove()
        for axes, here in zip(grid.flat, with_budget, strict=False):
            for family, curve in here.budgets.items():
                colour, style, marker = self.looks[family]
                trials = curve.index + 1
                axes.plot(trials, curve["expected"], style, marker=marker, markersize=4, color=colour, label=family)
                axes.fill_between(trials, curve["low"], curve["high"], color=colour, alpha=0.12, linewidth=0)
            axes.xaxis.set_major_locator(self.pyplot.MaxNLocator(integer=True))
            axes.set(xlabel="random trials", ylabel=f"best final {self.metric}", title=here.name)
            axes.legend()
        return figure

    def _name(self, here: Condition, family: str) -> str:
        """Name the confirmed setting of a family."""
        setting, rate = here.settings.get(family, (family, math.nan))
        return _shorten(f"{setting}, lr {rate:g}" + (f" ({here.name})" if here.name else ""))


def _shorten(name: str) -> str:
    """Shorten a long name in its middle; `$` is written as it is."""
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME // 2]}…{name[-(MAX_NAME // 2 - 1) :]}"
    return name.replace("$", r"\$")


def _keep_apart(rates: Sequence[float], most: int = 8) -> list[float]:
    """Leave out tick labels so that those that stay do not run together."""
    span = math.log(max(rates) / min(rates)) or 1.0
    kept: list[float] = []
    for rate in rates:
        if not kept or math.log(rate / kept[-1]) >= span / most:
            kept.append(rate)
    return kept
