"""What the report's figures have in common: which arms they show, how, and where they are written."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...plots import PIXELS_PER_INCH, import_pyplot
from ..reading.budget import Budget
from ..reading.summary import OTHER_OPTIMIZER, V0, V0_AND_WARMUP, Arm, Summary
from .formats import format_rate, name_loss

MAX_MAIN_ARMS = 8
# Told apart by the colour-blind, and in grey by style and marker. The first three are for plain start, best warmup, best v0.
LOOKS = (
    ("#333333", ":", "s"),
    ("#D55E00", "--", "^"),
    ("#0072B2", "-", "o"),
    ("#009E73", "-", "D"),
    ("#CC79A7", "-.", "v"),
    ("#E69F00", "--", "P"),
    ("#56B4E9", "-", "X"),
    ("#882255", ":", "*"),
)
GREY = "0.6"
RULE_FOR_ARMS = (
    "Shown are, at their best learning rates, the plain start, the best warmup, the best arm of each v0 strategy without a warmup, "
    f"of v0 with a warmup and of other optimizers, then the next best, at most {MAX_MAIN_ARMS}."
)
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "svg.hashsalt": "hf_v0init",  # the same numbers give the same file
}


@dataclass(frozen=True)
class DrawnFigure:
    """A figure that was written: the name of its files without suffix, its title, and what it shows in words."""

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Look:
    """An arm to draw, and how."""

    arm: Arm
    colour: str
    style: str
    marker: str

    @property
    def label(self) -> str:
        """Arm and learning rate, for legends."""
        return f"{shorten(self.arm.name, 60)}, lr {format_rate(self.arm.best.learning_rate)}"


def shorten(name: str, most: int = 42) -> str:
    """Shorten a long name in its middle, where arms differ least; `$` is written as it is."""
    if len(name) > most:
        name = f"{name[: most // 2]}\u2026{name[-(most - most // 2 - 1) :]}"
    return name.replace("$", r"\$")


class Canvas:
    """Where figures go, and what they have in common: numbers, folder, arms and names."""

    def __init__(self, summary: Summary, folder: Path, budget: Budget | None = None) -> None:
        self.summary, self.folder, self.budget = summary, folder, budget
        self.plt = import_pyplot()
        comparison = summary.comparison
        self.loss = name_loss(comparison.metric, comparison.script)
        self.unit = self.loss.removeprefix("validation ")
        self.looks = [Look(arm, *look) for arm, look in zip(choose_main_arms(summary), LOOKS, strict=False)]
        self.drawn: list[DrawnFigure] = []

    @contextlib.contextmanager
    def draw(self, name: str, title: str, caption: str, rows: int, columns: int, **kwargs) -> Iterator[tuple]:
        """Give a figure and its axes (always a grid), and write it on leaving."""
        with self.plt.rc_context(STYLE):
            figure, axes = self.plt.subplots(rows, columns, squeeze=False, **kwargs)
            try:
                yield figure, axes
                self.folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(self.folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
                figure.set_layout_engine(
                    "none"
                )  # the layout stands; to find it again for the PNG takes as long as to draw it
                figure.savefig(self.folder / f"{name}.png", dpi=PIXELS_PER_INCH, metadata={"Software": None})
            finally:
                self.plt.close(figure)
        self.drawn.append(DrawnFigure(name, title, caption))

    def add_legend(self, figure, axes) -> None:
        """Put the legend of `axes` below the figure, in as many columns as fit."""
        handles, labels = axes.get_legend_handles_labels()
        width = figure.get_size_inches()[0]
        columns = max(1, min(len(labels), int(width * 13 / (max(map(len, labels), default=1) + 6))))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def choose_main_arms(summary: Summary) -> list[Arm]:
    """Choose the arms to draw together, by `RULE_FOR_ARMS`."""
    chosen = [arm for arm in (summary.plain, summary.best_warmup) if arm is not None]
    by_strategy: dict[str, Arm] = {}
    for arm in summary.list_arms(V0):
        by_strategy.setdefault(arm.v0.split()[0], arm)
    chosen += by_strategy.values()
    chosen += [arm for kind in (V0_AND_WARMUP, OTHER_OPTIMIZER) if (arm := summary.find_best(kind)) is not None]
    with_result = [arm for arm in summary.arms if arm.best is not None]
    chosen += [arm for arm in with_result if not any(arm is other for other in chosen)]
    return chosen[:MAX_MAIN_ARMS]


def compute_mean_curve(curves: Sequence[tuple[Sequence[int], Sequence[float]]]) -> tuple[list, list, list]:
    """Compute steps, mean and standard deviation (n - 1, 0 for one) of several curves; values that are not finite are left out."""
    values: dict[int, list[float]] = {}
    for steps, losses in curves:
        for step, loss in zip(steps, losses, strict=True):
            if loss is not None and math.isfinite(loss):
                values.setdefault(step, []).append(loss)
    steps = sorted(values)
    means = [statistics.fmean(values[step]) for step in steps]
    stds = [statistics.stdev(values[step]) if len(values[step]) > 1 else 0.0 for step in steps]
    return steps, means, stds


def plot_curve(axes, look: Look, curves: Sequence[tuple], *, markers: bool = False) -> None:
    """Plot mean and band (one standard deviation) of an arm's curves."""
    steps, means, stds = compute_mean_curve(curves)
    marker = {"marker": look.marker, "ms": 3.5} if markers else {}
    axes.plot(steps, means, color=look.colour, ls=look.style, lw=1.7, label=look.label, **marker)
    low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=look.colour, alpha=0.15, lw=0)


def find_start_loss(summary: Summary) -> float | None:
    """Return the loss at start, its mean over the seeds; None if it is not known."""
    starts = {run.seed: run.start_loss for run in summary.comparison.runs if run.start_loss is not None}
    return statistics.fmean(starts.values()) if starts else None


def compute_span(summary: Summary) -> float | None:
    """How far the best final loss is from that at start: the way that training can go; None where it is not known."""
    start = find_start_loss(summary)
    best = next((arm.best.final.mean for arm in summary.arms if arm.best is not None), None)
    if start is None or best is None or not math.isfinite(best):
        return None
    way = best - start if summary.greater_is_better else start - best
    return way if way > 0 else None


def use_log_scale(axes, *which: str) -> None:
    """Make the x or y axis, or both, logarithmic with plain labels; 2 and 5 get one too where there are few decades.

    To be called when everything is drawn. matplotlib's own labels are set as formulas, which takes most of a figure's time.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in which:
        axis = getattr(axes, f"{name}axis")
        getattr(axes, f"set_{name}scale")("log")
        low, high = axis.get_view_interval()
        if low <= 0.0:  # nothing was drawn
            getattr(axes, f"set_{name}scale")("linear")
            continue
        few = high < 100.0 * low
        axis.set_major_locator(LogLocator(numticks=9))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if few else tuple(range(2, 10)), numticks=99))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}") if few else NullFormatter())


def compute_limits(
    values: Iterable[float], anchors: Iterable[float] = (), reach: float = 3.0
) -> tuple[float, float] | None:
    """Compute the ends of an axis: those of the values, but no further than `reach` quartile ranges beyond the quartiles.

    `anchors` are always inside. A margin of 6% is added on both sides. None without a finite value.
    """
    ordered, anchors = sorted(filter(math.isfinite, values)), list(filter(math.isfinite, anchors))
    if not ordered and not anchors:
        return None
    low, high = min(ordered + anchors), max(ordered + anchors)
    if len(ordered) > 2:
        first, _, third = statistics.quantiles(ordered, n=4, method="inclusive")
        beyond = reach * max(third - first, 1e-3 * max(abs(first), abs(third)))
        low, high = min([max(low, first - beyond), *anchors]), max([min(high, third + beyond), *anchors])
    margin = 0.06 * (high - low) or 0.05 * max(abs(high), 1e-3)
    return low - margin, high + margin


def limit_curves(axes, canvas: Canvas, is_loss: bool) -> None:
    """Limit the y axis to what arms that did not diverge do, below 1.1 x the loss at start, and mark what is cut off by arrows."""
    diverged = {look.label for look in canvas.looks if look.arm.best.has_diverged}
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    sound = [line for line in lines if line.get_label() not in diverged] or lines
    limits = compute_limits([float(y) for line in sound for y in line.get_ydata()], reach=6.0)
    if limits is None:
        return
    start = find_start_loss(canvas.summary)
    low, high = limits
    if start is not None and is_loss and not canvas.summary.greater_is_better:
        high = min(high, 1.1 * start) if 1.1 * start > low else high
    axes.set_ylim(low, high)
    for line in lines:
        mark_cut(axes, line)


def mark_cut(axes, line) -> None:
    """Mark by an arrow at the edge where a line first leaves the axes above, and where below."""
    points = [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if math.isfinite(y)]
    for sign, edge, arrow in zip(
        (1, -1), reversed(axes.get_ylim()), (6, 7), strict=True
    ):  # carets that end at the edge
        i = next((i for i, (_, y) in enumerate(points) if sign * y > sign * edge), None)
        if i is None:
            continue
        (x, y), (x0, y0) = points[i], points[max(0, i - 1)]
        crossing = x if y == y0 else x0 + (x - x0) * (edge - y0) / (y - y0)
        axes.plot([crossing], [edge], marker=arrow, color=line.get_color(), ms=9, clip_on=False, zorder=5, ls="")


def draw_interval(axes, row: float, mean: float, ends: tuple[float, float] | None, colour: str, marker: str) -> None:
    """Draw a mean with its interval on a horizontal axis that has its limits; arrows where they cut it, the number where all is beyond."""
    low, high = axes.get_xlim()
    if not low <= mean <= high:
        beyond = mean > high
        number = "diverged" if not math.isfinite(mean) else f"{mean:,.3f}" if abs(mean) < 1000 else f"{mean:.3g}"
        text = f"{number} \u25b6" if beyond else f"\u25c0 {number}"
        place = {"xycoords": ("axes fraction", "data"), "ha": "right" if beyond else "left", "va": "center"}
        axes.annotate(text, (0.99 if beyond else 0.01, row), fontsize=8.5, color=colour, **place)
        return
    axes.plot([mean], [row], marker, color=colour, ms=13 if marker == "|" else 5, mew=2.2 if marker == "|" else 1.0)
    if ends is None:
        return
    axes.plot([max(low, ends[0]), min(high, ends[1])], [row, row], color=colour, lw=1.6)
    for end, edge, arrow in ((ends[0], low, 4), (ends[1], high, 5)):  # carets to the left and to the right
        cut = end < low if edge == low else end > high
        axes.plot([edge if cut else end], [row], marker=arrow if cut else "|", color=colour, ms=7, clip_on=False, ls="")
