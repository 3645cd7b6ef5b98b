"""The report's figures of losses: curves, gap to the best warmup, loss against learning rate, final losses with intervals.

Every figure is written as PNG and SVG. matplotlib is imported when the first one is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..reading.results import DIVERGED, RunResult
from ..reading.summary import Arm, Summary, compute_half_width
from .diagnostics_figures import DIAGNOSTICS_FIGURES
from .figure_canvas import (
    GREY,
    LOOKS,
    RULE_FOR_ARMS,
    Canvas,
    DrawnFigure,
    Look,
    compute_mean_curve,
    compute_span,
    find_start_loss,
    limit_losses,
    plot_curve,
)
from .formats import format_number, format_rate

LOW_END = 0.15  # of the way from the best final loss to the loss at start: what close-ups show


def draw_figures(summary: Summary, folder: Path) -> list[DrawnFigure]:
    """Draw every figure that the runs have data for into `folder`, and remove those of an earlier call that they have none for."""
    drawers: dict[str, Callable[[Canvas, str], None]] = {
        **LOSS_FIGURES,
        **DIAGNOSTICS_FIGURES,
        "all_arms": draw_all_arms,
    }
    for name in drawers:
        for suffix in (".png", ".svg"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    if not any(arm.best is not None for arm in summary.arms):
        return []
    canvas = Canvas(summary, folder)
    for name, draw in drawers.items():
        draw(canvas, name)
    return canvas.drawn


# -------------------------------------------------------------------------------------------------------------- the figures


def draw_loss_curves(canvas: Canvas, name: str) -> None:
    """Training and validation loss over the steps."""
    caption = (
        "Training (left) and validation loss (right) over the optimizer steps; lines are means over the seeds, bands one standard "
        f"deviation. {RULE_FOR_ARMS}"
    )
    with canvas.draw(name, "Loss curves", caption, 1, 2, figsize=(11.0, 4.9)) as (figure, axes):
        for look in canvas.looks:
            runs = look.arm.best.runs
            plot_curve(axes[0, 0], look, [(r.train_steps, r.train_losses) for r in runs])
            plot_curve(axes[0, 1], look, [(r.eval_steps, r.eval_losses) for r in runs], markers=True)
        for panel, word in zip(axes[0], ("Training", "Validation"), strict=True):
            panel.set(title=word, xlabel="optimizer step", ylabel=canvas.unit)
            panel.set_xlim(left=0)
            limit_losses(panel, canvas)
        canvas.add_legend(figure, axes[0, 1])


def draw_gap(canvas: Canvas, name: str) -> None:
    """Validation loss over the steps, less the best warmup's of the same seed."""
    best = canvas.summary.best_warmup
    if best is None or len(canvas.looks) < 2:
        return
    reference = {
        run.seed: dict(zip(run.eval_steps, run.eval_losses, strict=True)) for run in best.best.runs if run.is_counted
    }
    caption = (
        f"Validation loss less that of `{best.name}`, the best warmup, on the same seed and at the same step; mean and band of one "
        "standard deviation over the seeds. Below 0 is better than the warmup. Arms far above it are cut off."
    )
    with canvas.draw(name, "Gap to the best warmup over training", caption, 1, 1, figsize=(8.5, 4.7)) as (figure, grid):
        axes, ends = grid[0, 0], []
        axes.axhline(0.0, color=LOOKS[1][0], lw=1.2, ls="--", label=f"{best.name} (the best warmup)")
        for look in canvas.looks:
            if look.arm is best:
                continue
            curves = [
                _subtract(run, reference[run.seed])
                for run in look.arm.best.runs
                if run.is_counted and run.seed in reference
            ]
            plot_curve(axes, look, curves, markers=True)
            steps, means, stds = compute_mean_curve(curves)
            for step, mean, std in zip(steps, means, stds, strict=True):
                ends += [mean - std] + ([mean + std] if step >= steps[-1] / 2 else [])
        span = compute_span(canvas.summary)
        near = [end for end in ends if span is None or abs(end) <= LOW_END * span]
        if near:
            margin = 0.1 * max(max(near) - min(near), 1e-3)
            axes.set_ylim(min(0.0, *near) - margin, max(0.0, *near) + margin)
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
        "dots are single runs, a cross one that diverged and counts with the loss at start."
    )
    if best is not None:
        caption += " Right: the paired difference to the best warmup with its 95% interval; arrows point to arms beyond the axis."
    size = (11.0 if best is not None else 7.0, 1.6 + 0.3 * len(arms))
    with canvas.draw(name, "Final losses", caption, 1, 2 if best is not None else 1, figsize=size, sharey=True) as (
        _,
        grid,
    ):
        left = grid[0, 0]
        for row, arm in enumerate(arms):
            colour = next((look.colour for look in canvas.looks if look.arm is arm), GREY)
            final = arm.best.final
            for run in arm.best.runs:
                if run.is_counted and math.isfinite(run.scored_loss):
                    marker = "x" if run.state == DIVERGED else "o"
                    left.plot([run.scored_loss], [row], marker, color=colour, ms=4, alpha=0.5)
            if not math.isfinite(final.mean):
                continue
            half = compute_half_width(final.std, final.n) if final.std is not None else None
            left.errorbar([final.mean], [row], xerr=half, fmt="|", color=colour, ms=13, mew=2.2, lw=1.6, capsize=3)
        left.set_yticks(range(len(arms)), [arm.name for arm in arms])
        left.set(ylim=(len(arms) - 0.5, -0.5), xlabel=f"final {canvas.loss}", title="Final loss")
        _limit_final_losses(left, arms, canvas)
        if best is not None:
            _draw_differences(grid[0, 1], arms, canvas)


def _limit_final_losses(axes, arms: Sequence[Arm], canvas: Canvas) -> None:
    """Keep wide intervals of few seeds from squeezing everything else."""
    losses = [loss for arm in arms for loss in arm.best.losses.values() if math.isfinite(loss)]
    if losses:
        margin = 0.08 * max(max(losses) - min(losses), 1e-3)
        axes.set_xlim(min(losses) - margin, max(losses) + margin)


def _draw_differences(axes, arms: Sequence[Arm], canvas: Canvas) -> None:
    best, span = canvas.summary.best_warmup, compute_span(canvas.summary)
    axes.axvline(0.0, color=LOOKS[1][0], lw=1.2, ls="--")
    differences = {row: arm.to_warmup for row, arm in enumerate(arms) if arm.to_warmup is not None}
    near = [d.mean for d in differences.values() if span is None or abs(d.mean) <= LOW_END * span]
    ends = [0.0, *(near or [d.mean for d in differences.values()])]
    margin = 0.2 * (max(ends) - min(ends)) or 0.1
    low, high = min(ends) - margin, max(ends) + margin
    axes.set_xlim(low, high)
    for row, difference in differences.items():
        colour = next((look.colour for look in canvas.looks if look.arm is arms[row]), GREY)
        if low <= difference.mean <= high:
            half = None if difference.low is None else difference.high - difference.mean
            axes.errorbar([difference.mean], [row], xerr=half, fmt="o", color=colour, ms=5, lw=1.6, capsize=3)
            continue
        beyond = difference.mean > high
        place = {"xycoords": ("axes fraction", "data"), "ha": "right" if beyond else "left", "va": "center"}
        text = (
            f"{format_number(difference.mean, signed=True)} \u25b6"
            if beyond
            else f"\u25c0 {format_number(difference.mean, signed=True)}"
        )
        axes.annotate(text, (0.99 if beyond else 0.01, row), fontsize=8.5, color=colour, **place)
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
        "that diverged, which count with the loss at start (dotted line). Right: the low end of the same. The flatter and wider the "
        "bowl, the less a run depends on the learning rate."
    )
    with canvas.draw(name, "Robustness against the learning rate", caption, 1, 2, figsize=(11.0, 4.9)) as (
        figure,
        grid,
    ):
        lowest = math.inf
        for look in wide:
            rates = [r for r in look.arm.rates.values() if r.final is not None and math.isfinite(r.final.mean)]
            x, y = [rate.learning_rate for rate in rates], [rate.final.mean for rate in rates]
            lowest = min([lowest, *y])
            bars = [rate.final.std or 0.0 for rate in rates]
            sensitivity = "" if look.arm.sensitivity is None else f", sensitivity {format_number(look.arm.sensitivity)}"
            label = look.arm.name + sensitivity
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
        span = compute_span(canvas.summary)
        grid[0, 1].set_title("The low end")
        if span is not None and math.isfinite(lowest):
            grid[0, 1].set_ylim(lowest - 0.01 * span, lowest + LOW_END * span)
        canvas.add_legend(figure, grid[0, 0])


def draw_all_arms(canvas: Canvas, name: str) -> None:
    """Validation loss of every arm, one panel each, where there are more than the other figures show."""
    arms = [arm for arm in canvas.summary.arms if arm.best is not None]
    if len(arms) <= len(canvas.looks):
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
                f"{arm.name}\n{format_number(arm.best.final.mean)} at lr {format_rate(arm.best.learning_rate)}",
                fontsize=8.5,
            )
            axes.tick_params(labelsize=8)
        for axes in list(grid.flat)[len(arms) :]:
            axes.set_visible(False)
        limit_losses(grid[0, 0], canvas)
        figure.supxlabel("optimizer step", fontsize=10)
        figure.supylabel(canvas.loss, fontsize=10)


LOSS_FIGURES = {
    "loss_curves": draw_loss_curves,
    "gap_to_warmup": draw_gap,
    "final_losses": draw_final_losses,
    "learning_rates": draw_learning_rates,
}
