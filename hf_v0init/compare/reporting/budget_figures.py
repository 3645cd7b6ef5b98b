"""The report's figures of tuning and its cost: what a budget of trials buys, every arm at every rate, quality against cost."""

from __future__ import annotations

import math

from ..reading.cost import name_hours, sum_hours
from ..reading.summary import OTHER_OPTIMIZER, PLAIN, V0, V0_AND_WARMUP, WARMUP, ArmAtRate
from .figure_canvas import GREY, LOOKS, Canvas, compute_limits, find_start_loss, shorten
from .formats import FAMILY_NAMES, count_of, format_number, format_rate

FAMILY_LOOKS = dict(zip((PLAIN, WARMUP, V0, V0_AND_WARMUP, OTHER_OPTIMIZER), LOOKS, strict=False))


def draw_tuning_budget(canvas: Canvas, name: str) -> None:
    """Expected best loss against the number of random trials, by family."""
    curves = canvas.budget.curves if canvas.budget is not None else []
    if all(curve.num_trials == 1 for curve in curves):
        return
    seeds = f"seed{'s' if len(canvas.budget.seeds) > 1 else ''} {', '.join(map(str, canvas.budget.seeds))}"
    caption = (
        "Expected best final validation loss after so many trials drawn at random from those of a family, one trial being one arm at one "
        f"learning rate ({seeds}); bands hold 8 of 10 draws. A line ends where all trials that were run are drawn: its end is the best of "
        "them. What is low on the left needs no tuning; what falls to the right is won by it."
    )
    with canvas.draw(name, "What a tuning budget buys", caption, 1, 1, figsize=(8.5, 4.9)) as (figure, grid):
        axes = grid[0, 0]
        _plot_budgets(axes, canvas, lambda curve, k: k)
        most = max(curve.num_trials for curve in curves)
        axes.set_xscale("log", base=2)
        ticks = [2**i for i in range(int(math.log2(most)) + 1)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(0.93, most * 1.08)
        axes.set(xlabel="number of trials", ylabel=f"expected best {canvas.loss}")
        canvas.add_legend(figure, axes)


def _plot_budgets(axes, canvas: Canvas, place) -> None:
    values, anchors = [], []
    for curve in canvas.budget.curves:
        colour, style, marker = FAMILY_LOOKS[curve.kind]
        pairs = [
            (place(curve, k), k - 1) for k in range(1, curve.num_trials + 1) if math.isfinite(curve.expected[k - 1])
        ]
        if not pairs or pairs[0][0] is None:
            continue
        xs, kept = [x for x, _ in pairs], [i for _, i in pairs]
        label = f"{FAMILY_NAMES[curve.kind]} ({count_of(curve.num_trials, 'trial')})"
        expected = [curve.expected[i] for i in kept]
        shown = {
            "marker": marker,
            "ms": 4.0 if len(xs) > 1 else 8.0,
            "markevery": [0, len(xs) - 1] if len(xs) > 1 else 1,
        }
        axes.plot(xs, expected, color=colour, ls=style, lw=1.9, label=label, **shown)
        low, high = [curve.low[i] for i in kept], [curve.high[i] for i in kept]
        axes.fill_between(xs, low, high, color=colour, alpha=0.12, lw=0)
        values += [value for value in (*low, *high) if math.isfinite(value)]
        anchors += expected
    if (limits := compute_limits(values, anchors)) is not None:
        axes.set_ylim(*limits)


def draw_learning_rate_map(canvas: Canvas, name: str) -> None:
    """Mean final loss of every arm at every learning rate, with the number of seeds in each cell."""
    rates = canvas.summary.comparison.learning_rates
    arms = [arm for arm in canvas.summary.arms if arm.best is not None]
    if len(rates) < 2:
        return
    caption = (
        "Mean final validation loss of every arm, best first, at every learning rate, and below it the number of seeds; framed the rate "
        "at which the arm is judged. Empty cells were not run. Colours go from the best to the third quartile range beyond, or to the "
        "loss at start; grey: every run diverged."
    )
    size = (2.6 + 0.95 * len(rates) + 2.2, 1.5 + 0.36 * len(arms))
    with canvas.draw(name, "Every arm at every learning rate", caption, 1, 1, figsize=size) as (figure, grid):
        axes = grid[0, 0]
        axes.grid(visible=False)
        cells = [[arm.rates.get(rate) for rate in rates] for arm in arms]
        means = [[_get_mean(cell) for cell in row] for row in cells]
        low, high = _limit_colours(canvas, [mean for row in means for mean in row])
        colours = canvas.plt.get_cmap("viridis" if canvas.summary.greater_is_better else "viridis_r").copy()
        colours.set_bad("white")
        image = axes.imshow(means, cmap=colours, vmin=low, vmax=high, aspect="auto")
        for i, row in enumerate(cells):
            for j, cell in enumerate(row):
                _write_cell(axes, canvas, image, i, j, cell)
                if cell is arms[i].best:
                    axes.add_patch(
                        canvas.plt.Rectangle((j - 0.47, i - 0.45), 0.94, 0.9, fill=False, ec="#D55E00", lw=1.8)
                    )
        axes.set_xticks(range(len(rates)), [format_rate(rate) for rate in rates])
        axes.set_yticks(range(len(arms)), [shorten(arm.name) for arm in arms], fontsize=8.5)
        axes.set_xlabel("learning rate")
        figure.colorbar(image, ax=axes, label=f"final {canvas.loss}", extend="both", shrink=min(1.0, 8.0 / size[1]))


def _get_mean(cell: ArmAtRate | None) -> float:
    unknown = cell is None or cell.final is None or cell.has_diverged or not math.isfinite(cell.final.mean)
    return math.nan if unknown else cell.final.mean


def _limit_colours(canvas: Canvas, means: list[float]) -> tuple[float, float]:
    limits = compute_limits(means, reach=1.5)
    if limits is None:
        return 0.0, 1.0
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = max(limits[0], min(known)), min(limits[1], max(known))
    start = find_start_loss(canvas.summary)
    if start is not None and not canvas.summary.greater_is_better and start > low:
        high = min(high, start)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _write_cell(axes, canvas: Canvas, image, row: int, column: int, cell: ArmAtRate | None) -> None:
    if cell is None or cell.final is None:
        return
    if cell.has_diverged:
        axes.add_patch(canvas.plt.Rectangle((column - 0.5, row - 0.5), 1.0, 1.0, color="0.8", lw=0))
    mean = _get_mean(cell)
    text = "diverged" if cell.has_diverged else format_number(mean)
    red, green, blue, _ = image.cmap(image.norm(mean)) if math.isfinite(mean) else (0.8, 0.8, 0.8, 1.0)
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
    axes.text(
        column, row, f"{text}\nn = {cell.final.n}", ha="center", va="center", fontsize=7.5, linespacing=1.0, color=ink
    )


def draw_quality_and_cost(canvas: Canvas, name: str) -> None:
    """Expected best loss against the hours of its trials, and each arm's best loss against the hours of all its runs."""
    runs = canvas.summary.comparison.runs
    arms = [arm for arm in canvas.summary.arms if arm.best is not None and sum_hours(arm.runs) is not None]
    arms = [arm for arm in arms if not arm.best.has_diverged and math.isfinite(arm.best.final.mean)]
    if len(arms) < 2:
        return
    unit = name_hours(runs)
    caption = (
        f"Left: the expected best loss of a family against the {unit} of the trials it takes. Right: each arm's mean final loss at its best "
        f"learning rate against the {unit} of all its runs; the best of each family is named. Arms that diverged at every rate "
        "are left out."
    )
    with canvas.draw(name, "Quality against cost", caption, 1, 2, figsize=(11.0, 4.9)) as (figure, grid):
        left, right = grid[0]
        _plot_budgets(left, canvas, lambda curve, k: None if not curve.hours else k * curve.hours)
        left.set(xlabel=unit, ylabel=f"expected best {canvas.loss}", title="Tuning")
        named = set()
        for arm in arms:
            hours, mean = sum_hours(arm.runs), arm.best.final.mean
            colour, _, marker = FAMILY_LOOKS[arm.kind]
            right.plot([hours], [mean], marker, color=colour, ms=6, alpha=0.85)
            if arm.kind not in named:
                named.add(arm.kind)
                place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
                right.annotate(shorten(arm.name, 28), (hours, mean), color=colour, **place)
        if (limits := compute_limits([arm.best.final.mean for arm in arms], [arms[0].best.final.mean])) is not None:
            right.set_ylim(*limits)
        right.set(xlabel=f"{unit} of all runs of the arm", ylabel=f"final {canvas.loss}", title="Arms")
        right.margins(x=0.25)
        for axes in (left, right):
            axes.set_xlim(left=0)
        for line in list(right.get_lines()):
            if line.get_ydata()[0] > right.get_ylim()[1]:
                right.plot(line.get_xdata(), [right.get_ylim()[1]], marker=6, color=GREY, ms=8, clip_on=False)
        canvas.add_legend(figure, left)


BUDGET_FIGURES = {
    "tuning_budget": draw_tuning_budget,
    "learning_rate_map": draw_learning_rate_map,
    "quality_and_cost": draw_quality_and_cost,
}
