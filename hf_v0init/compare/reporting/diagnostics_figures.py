"""The report's figures from `v0_diagnostics.json`: size of the updates, drift of the second moment, and the measured multiplier."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .figure_canvas import Canvas, Look, plot_curve, use_log_scale

MAX_PANELS = 8
MAX_UNRESOLVED = 0.5


def _read(look: Look) -> list[dict]:
    return [content for run in look.arm.best.runs if (content := run.read_diagnostics()) is not None]


def draw_updates(canvas: Canvas, name: str) -> None:
    """Norm of the update, and its size in units of the learning rate, over the first 200 steps."""
    data = [
        (look, curves)
        for look in canvas.looks
        if (curves := [d["updates"] for d in _read(look) if d["updates"]["step"]])
    ]
    if not data:
        return
    caption = (
        "The first updates. Left: norm of the change of all weights by a step. Right: its root mean square over the weights, divided by "
        "the learning rate of that step; at 1 every weight moves by the learning rate, as in Adam's first step from v0 = 0. Means over "
        "the seeds; compare figures 1 and 2 of the paper."
    )
    with canvas.draw(name, "Size of the first updates", caption, 1, 2, figsize=(11.0, 4.7)) as (figure, axes):
        for look, curves in data:
            plot_curve(axes[0, 0], look, [(c["step"], _keep_positive(c["norm"])) for c in curves])
            plot_curve(axes[0, 1], look, [(c["step"], _keep_positive(c["rms_over_lr"])) for c in curves])
        axes[0, 1].axhline(1.0, color="0.6", lw=0.8)
        axes[0, 0].set_ylabel("norm of the update (units of the weights)")
        axes[0, 1].set_ylabel("RMS update of a weight / learning rate")
        for panel in axes[0]:
            panel.set_xlabel("optimizer step")
            panel.set_xlim(left=0)
            use_log_scale(panel, "y")
        canvas.add_legend(figure, axes[0, 0])


def draw_histograms(canvas: Canvas, name: str) -> None:
    """Histograms of the size of the update of a weight at a few steps."""
    data = [
        (look, found)
        for look in canvas.looks
        if (found := [d["histograms"] for d in _read(look) if d["histograms"]["steps"]])
    ]
    steps = sorted({int(step) for _, found in data for h in found for step in h["steps"]})
    if not steps:
        return
    caption = (
        f"How far single weights move at optimizer {'steps' if len(steps) > 1 else 'step'} {', '.join(map(str, steps))}: share of all "
        "weights by the size of their update, on a logarithmic scale; means over the seeds. Weights that do not move at all are left "
        "out, so an area can be less than 1."
    )
    columns = min(2, len(steps))
    rows = math.ceil(len(steps) / columns)
    kwargs = {"figsize": (11.0, 0.9 + 3.0 * rows), "sharex": True}
    with canvas.draw(name, "Histograms of the updates", caption, rows, columns, **kwargs) as (figure, axes):
        occupied = []
        for look, found in data:
            edges = found[0]["log10_edges"]
            for panel, step in zip(axes.flat, steps, strict=False):
                shares = [h["steps"][str(step)]["shares"] for h in found if str(step) in h["steps"]]
                if not shares:
                    continue
                means = [statistics.fmean(column) for column in zip(*shares, strict=True)]
                sizes = [10.0**edge for edge in edges]
                panel.stairs(means, sizes, color=look.colour, ls=look.style, lw=1.6, label=look.label)
                occupied += [i for i, mean in enumerate(means) if mean > 1e-4]
        for panel, step in zip(axes.flat, steps, strict=False):
            panel.set(title=f"step {step}", ylabel="share of the weights")
            if occupied:
                panel.set_xlim(10.0 ** edges[min(occupied)], 10.0 ** edges[max(occupied) + 1])
            use_log_scale(panel, "x")
        for panel in list(axes.flat)[len(steps) :]:
            panel.set_visible(False)
        for panel in axes[-1]:
            panel.set_xlabel("absolute update of a weight")
        canvas.add_legend(figure, axes.flat[0])


def draw_drift(canvas: Canvas, name: str) -> None:
    """How far the bias-corrected second moment is from where it ends, over time."""
    data = [
        (look, found)
        for look in canvas.looks
        if (found := [d["second_moment"] for d in _read(look) if len(d["second_moment"]["step"]) > 1])
    ]
    if not data:
        return
    caption = (
        "Drift of the second moment over the optimizer steps. Left: mean over the weights of abs(v_hat_t - v_hat_late), late being the "
        "last step looked at, where it is 0 and not drawn. Right: the median over the weights of its ratio to v_hat_late. v_hat is "
        "corrected for bias, so a v0 far above the gradients starts high. Means over the seeds."
    )
    with canvas.draw(name, "Drift of the second moment", caption, 1, 2, figsize=(11.0, 4.7)) as (figure, axes):
        for look, found in data:
            plot_curve(axes[0, 0], look, [(c["step"], _keep_positive(c["drift"])) for c in found])
            plot_curve(axes[0, 1], look, [(c["step"], _keep_positive(c["relative_drift"])) for c in found])
        axes[0, 0].set_ylabel("mean of |v_hat_t - v_hat_late| (gradient squared)")
        axes[0, 1].set_ylabel("median of |v_hat_t - v_hat_late| / v_hat_late")
        for panel in axes[0]:
            panel.set_xlabel("optimizer step")
            use_log_scale(panel, "x", "y")
        canvas.add_legend(figure, axes[0, 0])


def draw_multiplier(canvas: Canvas, name: str) -> None:
    """The factor that v0 puts on the step: measured, beside the closed form."""
    data = [
        (look, found) for look in canvas.looks if (found := [d["multiplier"] for d in _read(look) if d["multiplier"]])
    ]
    data = data[:MAX_PANELS]
    if not data:
        return
    caption = (
        "The factor that v0 puts on Adam's step, sqrt of what v_t would be from 0 over what it is, measured on the weights: median "
        "(line) and the range from the 10th to the 90th percentile (band), means over the seeds. Dashed: the closed form m(t) for the "
        "scale set; dash-dotted: m(t) for v0 / E[g²] as measured before the run. m(t) takes the gradients' size as constant, which in "
        "a real network it is not. Weights whose factor is smaller than their state's precision can tell are left out, and steps at "
        "which they are more than half."
    )
    columns = 2 if len(data) == 4 else min(3, len(data))
    rows = math.ceil(len(data) / columns)
    size = (max(5.5, 3.7 * columns), 1.2 + 3.0 * rows)
    kwargs = {"figsize": size, "sharex": True, "sharey": True}
    with canvas.draw(name, "Measured multiplier and closed form", caption, rows, columns, **kwargs) as (figure, axes):
        for panel, (look, found) in zip(axes.flat, data, strict=False):
            found = [_keep_resolved(content) for content in found]
            steps = found[0]["step"]
            low, median, high = (_average(found, f"quantile_{q}", steps) for q in ("0.1", "0.5", "0.9"))
            panel.fill_between(steps, low, high, color=look.colour, alpha=0.2, lw=0)
            panel.plot(steps, median, color=look.colour, lw=1.8, label="measured: median and 10-90%")
            for key, style, label in (
                ("closed_form", "--", "m(t), scale as set"),
                ("closed_form_of_measured_ratio", "-.", "m(t), ratio as measured"),
            ):
                values = _average(found, key, steps)
                if any(map(math.isfinite, values)):
                    panel.plot(steps, values, color="0.3", ls=style, lw=1.3, label=label)
            panel.set_title(look.label, fontsize=9)
        use_log_scale(axes.flat[0], "x", "y")  # the others share them
        for i, panel in enumerate(axes.flat):
            panel.set_visible(i < len(data))
            if i + columns >= len(data):  # nothing is shown below it
                panel.set_xlabel("optimizer step t")
                panel.tick_params(labelbottom=True)
        for panel in axes[:, 0]:
            panel.set_ylabel("factor on the step")
        richest = max(axes.flat, key=lambda panel: len(panel.get_legend_handles_labels()[1]))
        canvas.add_legend(figure, richest)


def _average(found: Sequence[dict], key: str, steps: Sequence[int]) -> list[float]:
    """Mean over the seeds by step; NaN where none has a value."""
    by_step: dict[int, list[float]] = {}
    for content in found:
        for step, value in zip(content["step"], content.get(key) or [], strict=False):
            if value is not None:
                by_step.setdefault(step, []).append(value)
    return [statistics.fmean(by_step[step]) if step in by_step else math.nan for step in steps]


def _keep_resolved(content: dict) -> dict:
    """Leave out the measured quantiles of steps at which most weights are unresolved: they would be those of a few."""
    kept = dict(content)
    for key in [key for key in content if key.startswith("quantile_")]:
        pairs = zip(content[key], content["unresolved"], strict=True)
        kept[key] = [value if unresolved <= MAX_UNRESOLVED else None for value, unresolved in pairs]
    return kept


def _keep_positive(values: Sequence[float | None]) -> list[float]:
    """For a logarithmic axis: NaN for what is missing or not above 0."""
    return [value if value is not None and value > 0 else math.nan for value in values]


DIAGNOSTICS_FIGURES = {
    "updates": draw_updates,
    "update_histograms": draw_histograms,
    "second_moment_drift": draw_drift,
    "multiplier": draw_multiplier,
}
