"""The report's figures of losses: curves, gap to the best warmup, loss against learning rate, final losses with intervals.

Axes are limited by arms that did not diverge; what lies beyond is marked by an arrow.

Every figure is written as PNG and SVG. matplotlib is imported when the first one is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..reading.budget import Budget
from ..reading.results import DIVERGED, RunResult
from ..reading.summary import Arm, Summary, compute_half_width
from .budget_figures import BUDGET_FIGURES
from .diagnostics_figures import DIAGNOSTICS_FIGURES
from .figure_canvas import (
    GREY,
    LOOKS,
    RULE_FOR_ARMS,
    Canvas,
    DrawnFigure,
    Look,
    compute_limits,
    compute_mean_curve,
    compute_span,
    draw_interval,
    find_start_loss,
    limit_curves,
    mark_cut,
    plot_curve,
    shorten,
)
from .formats import format_final, format_number, format_rate

LOW_END = 0.15  # of the way from the best final loss to the loss at start: what close-ups show


def draw_figures(
    summary: Summary, budget: Budget | None, folder: Path, keep: Sequence[DrawnFigure] = ()
) -> list[DrawnFigure]:
    """Draw every figure that the runs have data for into `folder`, and remove those of an earlier call that they have none for.

    Figures to `keep` stay as they are where the runs have no data for them, and are among those returned.
    """
    drawers: dict[str, Callable[[Canvas, str], None]] = {
        **BUDGET_FIGURES,
        **LOSS_FIGURES,
        **DIAGNOSTICS_FIGURES,
        "all_arms": draw_all_arms,
    }
    kept = [figure for figure in keep if (folder / f"{figure.name}.svg").is_file()]
    for name in drawers.keys() - {figure.name for figure in kept}:
        for suffix in (".png", ".svg"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    if not any(arm.best is not None for arm in summary.arms):
        return []
    canvas = Canvas(summary, folder, budget)
    if not any(run.train_steps for run in summary.comparison.runs) and any(f.name == "loss_curves" for f in kept):
        del drawers["loss_curves"]  # that of before shows more
    for name, draw in drawers.items():
        draw(canvas, name)
    drawn = {figure.name for figure in canvas.drawn}
    return canvas.drawn + [figure for figure in kept if figure.name not in drawn]


# -------------------------------------------------------------------------------------------------------------- the figures


def draw_loss_curves(canvas: Canvas, name: str) -> None:
    """Training and validation loss over the steps, as far as there are any."""
    runs = [run for look in canvas.looks for run in look.arm.best.runs]
    panels = ["Training"] if any(run.train_steps for run in runs) else []
    panels += ["Validation"] if any(run.has_curve for run in runs) else []
    if not panels:
        return
    losses = "Training (left) and validation loss (right)" if len(panels) > 1 else f"{panels[0]} loss"
    caption = (
        f"{losses} over the optimizer steps; lines are means over the seeds, bands one standard deviation, arrows mark lines that leave "
        f"the axes. {RULE_FOR_ARMS}"
    )
    size = (11.0 if len(panels) > 1 else 8.5, 4.9)
    with canvas.draw(name, "Loss curves", caption, 1, len(panels), figsize=size) as (figure, grid):
        for axes, word in zip(grid[0], panels, strict=True):
            is_training = word == "Training"
            for look in canvas.looks:
                curves = [
                    (r.train_steps, r.train_losses) if is_training else (r.eval_steps, r.eval_losses)
                    for r in look.arm.best.runs
                ]
                plot_curve(axes, look, curves, markers=not is_training)
            axes.set(title=word, xlabel="optimizer step", ylabel="loss" if is_training else canvas.unit)
            axes.set_xlim(left=0)
            limit_curves(axes, canvas, is_loss=is_training or not canvas.summary.greater_is_better)
        canvas.add_legend(figure, grid[0, -1])


def draw_gap(canvas: Canvas, name: str) -> None:
    """Validation loss over the steps, less the best warmup's of the same seed."""
    best = canvas.summary.best_warmup
    if best is None or len(canvas.looks) < 2 or not any(run.has_curve for run in best.best.runs):
        return
    reference = {
        run.seed: dict(zip(run.eval_steps, run.eval_losses, strict=True)) for run in best.best.runs if run.is_counted
    }
    better = "Above" if canvas.summary.greater_is_better else "Below"
    caption = (
        f"Validation loss less that of `{best.name}`, the best warmup, on the same seed and at the same step; mean and band of one "
        f"standard deviation over the seeds. {better} 0 is better than the warmup. Arms far on the other side are cut off, with an arrow."
    )
    sign = -1.0 if canvas.summary.greater_is_better else 1.0
    with canvas.draw(name, "Gap to the best warmup over training", caption, 1, 1, figsize=(8.5, 4.7)) as (figure, grid):
        axes, ends = grid[0, 0], []
        axes.axhline(0.0, color=LOOKS[1][0], lw=1.2, ls="--", label=f"{shorten(best.name)} (the best warmup)")
        for look in canvas.looks:
            if look.arm is best:
                continue
            curves = [
                _subtract(run, reference[run.seed])
                for run in look.arm.best.runs
                if run.is_counted and run.seed in reference
            ]
            plot_curve(axes, look, curves, markers=True)
            if look.arm.best.has_diverged:
                continue
            steps, means, stds = compute_mean_curve(curves)
            for step, mean, std in zip(steps, means, stds, strict=True):
                ends += [mean - sign * std] + ([mean + sign * std] if step >= steps[-1] / 2 else [])
        span = compute_span(canvas.summary)
        near = [end for end in ends if span is None or sign * end <= LOW_END * span]
        if (limits := compute_limits(near, [0.0, *(end for end in near if sign * end < 0)])) is not None:
            axes.set_ylim(*limits)
        for line in axes.get_lines()[1:]:
            mark_cut(axes, line)
        axes.set(xlabel="optimizer step", ylabel=f"difference of {canvas.unit}")
        axes.set_xlim(left=0)
        canvas.add_legend(figure, axes)


def _subtract(run: RunResult, reference: dict[int, float]) -> tuple[list[int], list[float]]:
    shared = [
        (s, loss - reference[s]) for s, loss in zip(run.eval_steps, run.eval_losses, strict=True) if s in reference
    ]
    return [s for s, _ in shared], [d for _, d in shared]


def draw_final_losses(canvas: Canvas, name: str) -> None:
    """Final loss of every arm with its interval, and the paired difference to the best warmup."""
    arms = [arm for arm in canvas.summary.arms if arm.best is not None]
    best = canvas.summary.best_warmup
    caption = (
        "Final validation loss of every arm at its best learning rate, best on top: mean and 95% Student-t interval over the seeds; "
        "dots are single runs, a cross one that diverged and counts with the loss at start. Arrows mark what lies beyond the axis."
    )
    if best is not None:
        caption += " Right: the paired difference to the best warmup with its 95% interval."
    size = (11.0 if best is not None else 7.0, 1.6 + 0.3 * len(arms))
    with canvas.draw(name, "Final losses", caption, 1, 2 if best is not None else 1, figsize=size, sharey=True) as (
        _,
        grid,
    ):
        left = grid[0, 0]
        sound = [arm for arm in arms if not arm.best.has_diverged] or arms
        losses = [loss for arm in sound for loss in arm.best.losses.values()]
        if (limits := compute_limits(losses, [arms[0].best.final.mean])) is not None:
            left.set_xlim(*limits)
        for row, arm in enumerate(arms):
            colour = next((look.colour for look in canvas.looks if look.arm is arm), GREY)
            if arm.best.has_diverged and arm in sound:
                left.axhline(row, color=GREY, lw=0.5, ls=":")
            _draw_final_loss(left, row, arm, colour)
        left.set_yticks(range(len(arms)), [shorten(arm.name) for arm in arms])
        left.set(ylim=(len(arms) - 0.5, -0.5), xlabel=f"final {canvas.loss}", title="Final loss")
        if best is not None:
            _draw_differences(grid[0, 1], arms, canvas)


def _draw_final_loss(axes, row: int, arm: Arm, colour: str) -> None:
    final = arm.best.final
    if arm.best.has_diverged:
        _say_diverged(axes, row, colour)
        return
    for run in arm.best.runs:
        if run.is_counted and math.isfinite(run.scored_loss):
            axes.plot([run.scored_loss], [row], "x" if run.state == DIVERGED else "o", color=colour, ms=4, alpha=0.5)
    half = compute_half_width(final.std, final.n) if final.std is not None else None
    ends = None if half is None else (final.mean - half, final.mean + half)
    draw_interval(axes, row, final.mean, ends, colour, "|")


def _say_diverged(axes, row: int, colour: str) -> None:
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
    axes.annotate("diverged \u25b6", (0.99, row), fontsize=8.5, color=colour, **place)


def _draw_differences(axes, arms: Sequence[Arm], canvas: Canvas) -> None:
    best, span = canvas.summary.best_warmup, compute_span(canvas.summary)
    sign = -1.0 if canvas.summary.greater_is_better else 1.0
    axes.axvline(0.0, color=LOOKS[1][0], lw=1.2, ls="--")
    differences = {row: arm.to_warmup for row, arm in enumerate(arms) if arm.to_warmup is not None}
    sound = [d for row, d in differences.items() if not arms[row].best.has_diverged]
    near = [d.mean for d in sound if span is None or sign * d.mean <= LOW_END * span] or [d.mean for d in sound]
    ends = [end for d in sound if d.mean in near and d.low is not None for end in (d.low, d.high)]
    limits = compute_limits(near + ends, [0.0, *near], reach=1.0)
    axes.set_xlim(*(limits or (-0.1, 0.1)))
    for row, difference in differences.items():
        colour = next((look.colour for look in canvas.looks if look.arm is arms[row]), GREY)
        if arms[row].best.has_diverged:
            _say_diverged(axes, row, colour)
            continue
        ends = None if difference.low is None else (difference.low, difference.high)
        draw_interval(axes, row, difference.mean, ends, colour, "o")
    axes.plot([0.0], [next(row for row, arm in enumerate(arms) if arm is best)], "|", color=LOOKS[1][0], ms=13, mew=2.2)
    unit = canvas.unit.removeprefix("loss").strip().strip("()")
    axes.set(xlabel="difference to the best warmup" + (f" ({unit})" if unit else ""), title="Paired difference")


def draw_learning_rates(canvas: Canvas, name: str) -> None:
    """Final loss against learning rate: the whole range, and the low end of it."""
    wide = [look for look in canvas.looks if sum(rate.final is not None for rate in look.arm.rates.values()) > 1]
    if not wide:
        return
    start = find_start_loss(canvas.summary)
    caption = (
        "Mean final validation loss against the learning rate, bars one standard deviation over the seeds. Hollow points hold runs "
        "that diverged, which count with the loss at start (dotted line). Right: the better end of the same. The flatter and wider the "
        "bowl, the less a run depends on the learning rate."
    )
    with canvas.draw(name, "Robustness against the learning rate", caption, 1, 2, figsize=(11.0, 4.9)) as (
        figure,
        grid,
    ):
        best = next(arm.best.final.mean for arm in canvas.summary.arms if arm.best is not None)
        for look in wide:
            rates = [r for r in look.arm.rates.values() if r.final is not None and math.isfinite(r.final.mean)]
            x, y = [rate.learning_rate for rate in rates], [rate.final.mean for rate in rates]
            bars = [rate.final.std or 0.0 for rate in rates]
            sensitivity = "" if look.arm.sensitivity is None else f", sensitivity {format_number(look.arm.sensitivity)}"
            label = shorten(look.arm.name, 60) + sensitivity
            for axes in grid[0]:
                axes.errorbar(x, y, yerr=bars, color=look.colour, ls=look.style, lw=1.7, capsize=2.5, label=label)
                for rate in rates:
                    face = "white" if rate.count(DIVERGED) else look.colour
                    axes.plot(
                        [rate.learning_rate],
                        [rate.final.mean],
                        look.marker,
                        color=look.colour,
                        mfc=face,
                        ms=6,
                        zorder=3,
                    )
        grid_rates = canvas.summary.comparison.learning_rates
        for axes in grid[0]:
            if start is not None and axes is grid[0, 0]:
                axes.axhline(start, color=GREY, lw=1.0, ls=":", label="loss at start")
            axes.set(xscale="log", xlabel="learning rate", ylabel=f"final {canvas.loss}")
            axes.set_xticks(grid_rates, [format_rate(rate) for rate in grid_rates])
            axes.tick_params(axis="x", labelrotation=45 if len(grid_rates) > 6 else 0)
            axes.minorticks_off()
        drawn = [
            rate.final.mean for look in wide for rate in look.arm.rates.values() if rate.final and not rate.has_diverged
        ]
        if (limits := compute_limits(drawn, [] if start is None else [start], reach=10.0)) is not None:
            grid[0, 0].set_ylim(*limits)
        span = compute_span(canvas.summary)
        grid[0, 1].set_title("The better end")
        if span is not None and math.isfinite(best):
            ends = (best - 0.01 * span, best + LOW_END * span)
            grid[0, 1].set_ylim(
                *((2 * best - ends[1], 2 * best - ends[0]) if canvas.summary.greater_is_better else ends)
            )
        elif limits is not None:
            grid[0, 1].set_ylim(*limits)
        canvas.add_legend(figure, grid[0, 0])


def draw_all_arms(canvas: Canvas, name: str) -> None:
    """Validation loss of every arm, one panel each, where there are more than the other figures show."""
    arms = [arm for arm in canvas.summary.arms if arm.best is not None]
    if len(arms) <= len(canvas.looks) or not any(run.has_curve for run in canvas.summary.comparison.runs):
        return
    columns = 4
    rows = math.ceil(len(arms) / columns)
    best = canvas.summary.best_warmup
    caption = "Validation loss of every arm at its best learning rate, best first: mean and band of one standard deviation over the seeds"
    caption += "." if best is None else f"; dashed the best warmup, `{best.name}`."
    kwargs = {"figsize": (11.0, 0.8 + 1.9 * rows), "sharex": True, "sharey": True}
    with canvas.draw(name, "All arms", caption, rows, columns, **kwargs) as (figure, grid):
        for axes, arm in zip(grid.flat, arms, strict=False):
            for shown, look in ((best, LOOKS[1]), (arm, LOOKS[2])):
                if shown is not None and not (shown is best and arm is best and look is LOOKS[2]):
                    plot_curve(axes, Look(shown, *look), [(r.eval_steps, r.eval_losses) for r in shown.best.runs])
            axes.set_title(
                f"{shorten(arm.name, 34)}\n{format_final(arm.best)} at lr {format_rate(arm.best.learning_rate)}",
                fontsize=7.5,
            )
            axes.tick_params(labelsize=8)
        for axes in list(grid.flat)[len(arms) :]:
            axes.set_visible(False)
        sound = [run for arm in arms if not arm.best.has_diverged for run in arm.best.runs if run.is_counted]
        limits = compute_limits([loss for run in sound for loss in run.eval_losses], reach=6.0)
        if limits is not None:
            grid[0, 0].set_ylim(*limits)
        figure.supxlabel("optimizer step", fontsize=10)
        figure.supylabel(canvas.loss, fontsize=10)


LOSS_FIGURES = {
    "loss_curves": draw_loss_curves,
    "gap_to_warmup": draw_gap,
    "final_losses": draw_final_losses,
    "learning_rates": draw_learning_rates,
}
